"""minilm.measure: bytes counted by hand, on the CPU and on a GPU, and what checkpoints save."""

import math
import tracemalloc

import numpy as np
import pytest
from conftest import close
from threadpoolctl import threadpool_limits

from minilm import data, ops
from minilm.measure import KINDS, Ledger, held
from minilm.measure.losses import alike, bits_per_byte, loss_of
from minilm.optim import SGD, AdamW
from minilm.peft import add_lora, use_adapter
from minilm.quantize import quantize_model
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

GPT2 = Config.gpt2(64, 32, layers=2, heads=2, width=32)
MB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """BLAS's threads wait for each other where tests run side by side."""
    with threadpool_limits(1, "blas"):
        yield


def measured(model, optimizer, batch=4, length=32):
    """The ledger of a second step: the first one fills caches."""
    tokens, targets = np.random.default_rng(0).integers(0, 64, (2, batch, length))
    for _ in range(2):
        with Ledger(model, optimizer) as ledger:
            optimizer.zero_grad()
            loss = ops.cross_entropy(model(tokens), targets)
            ledger.forward_done()
            loss.backward()
            optimizer.step()
    assert tuple(ledger.peak) == KINDS
    return ledger.peak


class Hand:
    """An optimizer and a model with nothing to count."""

    def __init__(self):
        self.model = Transformer(Config.gpt2(1, 1, 1, 1, 1))
        self.optimizer = SGD(self.model.parameters())


def test_what_comes_and_goes_is_counted_to_the_byte():
    hand = Hand()
    before = np.ones(3 * MB, np.uint8)
    with Ledger(hand.model, hand.optimizer) as ledger:
        kept = np.ones(MB, np.uint8)
        gone = np.ones(7 * MB, np.uint8)
        del gone, before  # what was there before the step is not the step's
        ledger.forward_done()
        more = np.ones(5 * MB, np.uint8)
        del kept, more
    peak = ledger.peak
    assert peak["activations"] == pytest.approx(MB, abs=2000)
    assert peak["workspace"] == pytest.approx(7 * MB, abs=4000)


def test_micro_batches_keep_one_after_another():
    """The most that was alive when a forward pass was done; the last pass may be a short one."""
    hand = Hand()
    with Ledger(hand.model, hand.optimizer) as ledger:
        for size in 4, 9, 2:
            kept = np.ones(size * MB, np.uint8)
            ledger.forward_done()
            del kept
    assert ledger.peak["activations"] == pytest.approx(9 * MB, abs=4000)
    assert 0 <= ledger.peak["workspace"] < 4000


def test_a_ledger_within_a_trace_leaves_it_running():
    hand = Hand()
    tracemalloc.start()
    before = np.ones(3 * MB, np.uint8), np.ones(9 * MB, np.uint8)
    before = before[0]
    with Ledger(hand.model, hand.optimizer) as ledger:
        np.ones(MB, np.uint8)
    assert tracemalloc.is_tracing() and before.size
    tracemalloc.stop()
    assert ledger.peak["workspace"] == pytest.approx(MB, abs=4000)
    with Ledger(hand.model, hand.optimizer):
        assert tracemalloc.is_tracing()
    assert not tracemalloc.is_tracing()


def test_a_step_that_raises_is_measured_too():
    hand = Hand()
    with pytest.raises(MemoryError), Ledger(hand.model, hand.optimizer) as ledger:
        kept = np.ones(MB, np.uint8)
        raise MemoryError(str(kept.size))
    assert ledger.peak["workspace"] == pytest.approx(MB, abs=4000)
    assert not tracemalloc.is_tracing()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stays_is_counted_by_hand(dtype):
    """Widths are multiples of 4, so that the flat buffers have no gaps."""
    full = Transformer(GPT2).astype(dtype)
    n = sum(p.size for p in full.parameters())
    size, masters = (4, 0) if dtype == "float32" else (2, 4)
    assert held(full, AdamW(full.parameters())) == dict(
        weights=n * size, adapters=0, gradients=4 * n, optimizer=(8 + masters) * n)
    lora = add_lora(Transformer(GPT2).astype(dtype), 4, 8)
    adapted = 2 * 2 * 4 * (32 + 32)
    counted = dict(weights=n * size, adapters=adapted * size, gradients=4 * adapted)
    assert held(lora, AdamW(lora.parameters())) == counted | {"optimizer": (8 + masters) * adapted}
    assert held(lora, SGD(lora.parameters())) == counted | {"optimizer": masters * adapted}


def test_codes_are_weights_and_an_adapter_that_rests_is_an_adapter():
    model = quantize_model(Transformer(GPT2))
    codes = sum(t.data.nbytes for _, t in model.named_tensors())
    add_lora(model, 4, 8)
    add_lora(model, 2, 4, name="second")
    found = held(model, AdamW(model.parameters()))
    assert found["weights"] == codes
    assert found["adapters"] == 3 * found["gradients"] == 3 * 4 * 2 * 2 * 2 * (32 + 32)
    use_adapter(model, "default")
    assert held(model, AdamW(model.parameters()))["gradients"] == 2 * found["gradients"]


def test_frozen_weights_keep_less():
    full, lora = Transformer(GPT2), add_lora(Transformer(GPT2), 4, 8)
    full, lora = (measured(m, AdamW(m.parameters())) for m in (full, lora))
    assert lora["weights"] == full["weights"] and lora["activations"] < full["activations"]


SIXTEEN = Config.gpt2(64, 64, layers=16, heads=2, width=48)


def sixteen(method):
    """16 blocks, trained in three ways."""
    model = Transformer(SIXTEEN)
    if method == "qlora":
        quantize_model(model)
    return model if method == "full" else add_lora(model, 4, 8, "all-linear")


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_checkpoints_every_sqrt_n_blocks_keep_2_sqrt_n_of_n(method):
    """And a block more; not only between the passes, but at the highest moment of the step."""
    n, found = SIXTEEN.layers, []
    for every in 0, math.isqrt(n):
        model = sixteen(method)
        model.checkpoint_every = every
        found.append(measured(model, AdamW(model.parameters()), batch=8, length=64))
    plain, checkpointed = (p["activations"] + p["workspace"] for p in found)
    block = found[0]["activations"] / n
    assert checkpointed <= 2 * math.sqrt(n) / n * found[0]["activations"] + block
    assert found[1]["activations"] < found[0]["activations"] / 8 and checkpointed < plain
    kinds = KINDS[:4]
    assert [found[0][k] for k in kinds] == [found[1][k] for k in kinds]


def test_a_frozen_segment_keeps_nothing():
    """Of four segments the lower two have no adapter: not even their inputs are kept."""
    taken = []
    for blocks in range(16), range(8, 16):
        paths = tuple(f"blocks.{i}.attention.q" for i in blocks)
        model = add_lora(Transformer(SIXTEEN), 4, 8, paths)
        model.checkpoint_every = 4
        taken.append(measured(model, AdamW(model.parameters()), 8, 64)["activations"])
    one = 8 * 64 * 48 * 4
    assert taken[0] - taken[1] == pytest.approx(2 * one, rel=0.02)


@pytest.mark.kernels
def test_on_a_gpu_the_pool_is_asked(cupy):
    model = add_lora(Transformer(GPT2), 4, 8).to("cuda")
    optimizer = AdamW(model.parameters())
    before = cupy.get_default_memory_pool().used_bytes()
    found = measured(model, optimizer)
    cpu = add_lora(Transformer(GPT2), 4, 8)
    stays = held(cpu, AdamW(cpu.parameters()))
    assert {kind: found[kind] for kind in stays} == stays
    assert sum(stays.values()) <= before  # the pool gives whole blocks of 512 bytes
    on_cpu = measured(cpu, AdamW(cpu.parameters()))
    assert 0.5 < found["activations"] / on_cpu["activations"] < 2
    with Ledger(model, optimizer) as ledger:
        kept = cupy.ones(MB, np.uint8)
        gone = cupy.ones(7 * MB, np.uint8)
        del gone
        ledger.forward_done()
        del kept
    assert (ledger.peak["activations"], ledger.peak["workspace"]) == (MB, 7 * MB)


# Losses

TOKENS, TARGETS = np.random.default_rng(3).integers(0, 64, (2, 5, 6))


@pytest.mark.parametrize("config", [GPT2, Config.bert(64, 32, 2, 2, 32, 64)], ids=["gpt2", "bert"])
@pytest.mark.parametrize("fill", [-100, 5])
def test_the_loss_of_padded_rows_is_that_of_their_text(config, fill):
    model = Transformer(config, seed=1).astype("float64")
    alone = loss_of(model, TOKENS, TARGETS, batch=2)
    tokens, targets, mask = (np.pad(a, ((0, 3), (0, 4)), constant_values=v) for a, v in (
        (TOKENS, 7), (TARGETS, fill), (np.ones_like(TOKENS), 0)))
    close(loss_of(model, tokens, targets, mask, batch=3), alone, "float64")
    with Trainer(model, SGD(model.parameters())) as trainer:
        close(trainer.evaluate(tokens, targets, mask, batch=3)[0], alone, "float64")


def test_the_loss_of_nothing_is_an_error():
    model, none = Transformer(GPT2), np.full_like(TARGETS, -100)
    trainer = Trainer(model, SGD(model.parameters()))
    for use in (loss_of, lambda model, *rows: trainer.evaluate(*rows)):
        for rows in ((TOKENS, none), (TOKENS[:0], none[:0]), (TOKENS, TARGETS, np.zeros((5, 6)))):
            with pytest.raises(ValueError, match=r"there is nothing to .*: every target is -100"):
                use(model, *rows)
    with pytest.raises(ValueError, match="batch must be at least 1, got -1"):
        loss_of(model, TOKENS, TARGETS, batch=-1)
    for wrong in (dict(targets=0, size=1), dict(targets=1, size=0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            bits_per_byte(1.0, **wrong)


@pytest.mark.parametrize("use", ["loss_of", "evaluate", "step"])
def test_a_masked_model_is_not_asked_for_what_it_sees(use):
    rows = data.cut(np.random.default_rng(0).integers(0, 64, 100), 32)
    outputs = rows[0], np.where(np.arange(32) < 20, -100, rows[1])  # instructions and answers
    text = np.full((4, 32), ord("a"))  # the hardest case of what is allowed
    masked = data.corrupt(text, np.random.default_rng(1), data.ByteTokenizer())
    for config, seen in ((Config.gpt2(258, 32, 1, 2, 8), False),
                         (Config.bert(258, 32, 1, 2, 8, 16), True)):
        model = Transformer(config)
        trainer = Trainer(model, SGD(model.parameters(), lr=0.0))
        run = {"loss_of": lambda *rows, model=model: loss_of(model, *rows),
               "evaluate": trainer.evaluate, "step": lambda *rows, t=trainer: t.step(0, rows)}[use]
        run(*masked)
        for batch in (rows, outputs):
            if seen:
                with pytest.raises(ValueError, match="next tokens, which a masked model sees"):
                    run(*batch)
            else:
                run(*batch)


@pytest.mark.parametrize("measure", [loss_of, lambda model, *rows: Trainer(
    model, SGD(model.parameters())).evaluate(*rows)[0]], ids=["loss_of", "evaluate"])
def test_a_long_row_does_not_fill_up_the_others(measure, monkeypatch):
    """And the loss is that of the rows one by one, without what fills them up."""
    model = Transformer(Config.gpt2(20, 64, layers=1, heads=2, width=8), seed=1)
    rng, forward, seen = np.random.default_rng(0), Transformer.forward, []
    tokens = rng.integers(0, 20, (40, 64))
    targets, lengths = np.roll(tokens, -1, 1), [3, 64, *[4] * 37, 2]
    for row, n in zip(targets, lengths):
        row[n:] = data.IGNORED
    alone = [loss_of(model, tokens[i : i + 1, :n], targets[i : i + 1, :n])
             for i, n in enumerate(lengths)]

    def noted(self, tokens, *mask):
        seen.append(tokens.size)
        return forward(self, tokens, *mask)
    monkeypatch.setattr(Transformer, "forward", noted)
    assert abs(measure(model, tokens, targets) - np.average(alone, weights=lengths)) < 1e-6
    assert sum(seen) == 39 * 4 + 64


def test_rows_of_like_length_come_whole_and_in_their_order():
    model = Transformer(Config.gpt2(20, 64, layers=1, heads=2, width=8))
    targets = np.ones((5, 6), int)
    targets[1, 4:] = targets[4, 3:] = data.IGNORED
    masked = Transformer(Config.bert(20, 64, 1, 2, 8, 16))
    uneven = np.where(np.arange(6) < np.array([[1], [1], [6], [1], [1]]), 1, data.IGNORED)
    for found in (alike(model, targets, batch=2), alike(masked, uneven, batch=2),
                  alike(model, uneven, np.ones((5, 6)), batch=2)):
        assert [(rows.tolist(), n) for rows, n in found] == [([0, 1], 6), ([2, 3], 6), ([4], 6)]
    assert [(rows.tolist(), n) for rows, n in alike(model, uneven, batch=3)] == [
        ([0, 1, 3], 1), ([4], 1), ([2], 6)]


@pytest.mark.parametrize("targets", [None, [[1, 2]], np.ones((1, 1), int), np.ones((64, 2), int)])
def test_tokens_and_targets_have_one_shape(targets):
    """Twice as many targets as rows halved the loss, if the rows filled a batch."""
    model = Transformer(Config.gpt2(20, 64, layers=1, heads=2, width=8))
    with pytest.raises(ValueError, match=r"^tokens, targets and mask must be arrays of one shape"):
        loss_of(model, np.ones((32, 2), int), targets)
