"""T5's laws: the bias depends on distances alone, padding changes nothing, the decoder takes no
notice of what comes later, one by one is all at once; and what adapts a Transformer adapts it."""

from functools import partial

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.cache import Cache
from minilm.decode import caches
from minilm.distill import Distillation, student_from_teacher
from minilm.generate import generate, stream
from minilm.graph import no_grad
from minilm.measure.losses import loss_of
from minilm.optim import AdamW
from minilm.peft import (
    add_bottleneck,
    add_ia3,
    add_lora,
    add_prefix,
    add_prompt,
    merge_lora,
    train_top,
)
from minilm.peft.adapted import Adapter, insert_adapters
from minilm.quantize import QuantizedLinear, quantize_model
from minilm.seq2seq import T5, EncoderDecoder, Stack, bucket
from minilm.train import AnswerLoss, Trainer

SIZES = dict(vocab_size=23, layers=2, decoder_layers=3, heads=4, width=16, hidden=24, head_width=3,
             buckets=8, max_distance=12)
V11 = dict(activation="geglu_tanh", tied=False, scaled_head=False)
FORMS = {"v1.0": {}, "v1.1": V11}
seeds = st.integers(0, 2**32 - 1)


def model_of(form="v1.0", **changes):
    """In float64, with norms that are not all 1."""
    model = EncoderDecoder(T5(**SIZES | FORMS[form] | changes), seed=1).astype("float64")
    rng = np.random.default_rng(2)
    for path, x in model.named_tensors():
        if "norm" in path:
            x.data[...] = rng.normal(size=x.shape)
    return model


def drawn(seed, *shape):
    return np.random.default_rng(seed).integers(0, 23, shape)


@given(n=st.integers(4, 70), far=st.integers(1, 300), causal=st.booleans())
def test_buckets(n, far, causal):
    """All are used, in order; near distances have their own, and those from far on the last."""
    c = T5(**SIZES | dict(buckets=n, max_distance=n // 2 + far))
    d = np.arange(c.max_distance + 3)
    before = bucket(-d, c, causal)
    own = n if causal else n // 2
    assert before[0] == 0 and (np.diff(before) >= 0).all()
    assert (before[: own // 2] == d[: own // 2]).all()
    assert (before[c.max_distance :] == own - 1).all() and before.max() == own - 1
    behind = bucket(d[1:], c, causal)
    assert (behind == (0 if causal else before[1:] + own)).all()


def test_the_published_buckets():
    """32 for distances up to 128, as in all of the paper's models."""
    c = T5(9, 1, 1, heads=1, width=4, hidden=4, head_width=4)
    borders = np.flatnonzero(np.diff(bucket(-np.arange(200), c, causal=True))) + 1
    assert borders.tolist() == [*range(1, 17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87,
                                99, 113]
    borders = np.flatnonzero(np.diff(bucket(np.arange(200), c, causal=False))) + 1
    assert borders.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


@given(T=st.integers(1, 30), past=st.integers(0, 30), causal=st.booleans())
def test_the_bias_depends_on_distance_alone(T, past, causal):
    model = model_of()
    stack = model.decoder if causal else model.encoder
    bias = stack.bias(T, past).data
    assert bias.shape == (1, 4, T, past + T)
    for offset in range(-past - T + 1, T):
        along = bias[0].diagonal(offset + past, 1, 2)  # key - query = offset
        number = bucket(np.array(offset), model.config, causal)
        assert (along == stack.distances.weight.data[number][:, None]).all()


@pytest.mark.parametrize("form", FORMS)
@given(seed=seeds, before=st.integers(0, 9), after=st.integers(0, 9))
def test_padding_changes_nothing(form, seed, before, after):
    """Of either text, on either side, whatever the padding's ids are."""
    model, text, written = model_of(form), drawn(seed, 2, 7), drawn(seed + 1, 2, 5)
    expected = model(text, written).data

    def padded(tokens):
        mask = np.pad(np.ones_like(tokens), [(0, 0), (before, after)])
        return np.where(mask, np.pad(tokens, [(0, 0), (before, after)]), drawn(seed, *mask.shape)
                        ), mask

    (text, mask), (longer, decoder_mask) = padded(text), padded(written)
    close(model(text, written, mask).data, expected, "float64", scale=1)
    logits = model(text, longer, mask, decoder_mask).data
    close(logits[:, before : before + 5], expected, "float64", scale=1)


@given(seed=seeds, at=st.integers(1, 6))
def test_the_decoder_takes_no_notice_of_what_comes_later(seed, at):
    model, text, written = model_of(), drawn(seed, 2, 5), drawn(seed, 2, 7)
    before = model(text, written).data
    written[:, at:] = (written[:, at:] + 1) % 23
    after = model(text, written).data
    close(after[:, :at], before[:, :at], "float64", scale=1)
    assert (np.abs(after[:, at] - before[:, at]) > 1e-6).any()


def test_the_encoder_sees_what_comes_later():
    model, text, written = model_of(), drawn(0, 1, 7), drawn(1, 1, 3)
    changed = text.copy()
    changed[:, -1] = (text[:, -1] + 1) % 23
    rows = [model.encoder(model.embed(tokens)).data[:, 0] for tokens in (text, changed)]
    assert np.abs(rows[0] - rows[1]).max() > 1e-6
    assert np.abs(model(text, written).data - model(changed, written).data).max() > 1e-6


@pytest.mark.parametrize("form", FORMS)
@given(seed=seeds, parts=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_part_by_part_is_all_at_once(form, seed, parts):
    """With a cache of the decoder's keys; those of the encoder's rows are made once."""
    model, text, written = model_of(form), drawn(seed, 2, 6), drawn(seed + 1, 2, sum(parts))
    expected = model(text, written).data
    with no_grad():
        reader = model.read(text)
        cache, start = Cache.empty(reader), 0
        for part in parts:
            logits = reader(written[:, start : start + part], cache=cache).data
            close(logits, expected[:, start : start + part], "float64", scale=1)
            start += part
    assert cache.length == start


def test_generation_begins_with_start_and_stops_at_the_end():
    model, text = model_of(start=5), drawn(3, 4, 6)
    free = generate(model, text, 12, temperature=0)
    assert free.shape == (4, 13) and (free[:, 0] == 5).all()
    first = next(stream(model, text, temperature=0))
    assert (first == free[:, 1]).all()
    ended = generate(model, text, 12, temperature=0, eos=int(free[0, 1]))
    assert (ended[0, 1:] == free[0, 1]).all()
    assert (generate(model, text, 5, seed=1) == generate(model, text, 5, seed=1)).all()
    assert (generate(model, text, 5, seed=1) != generate(model, text, 5, seed=2)).any()


@pytest.mark.parametrize("dtype, size", [("float64", 1e-12), ("float32", 2e-5), ("bfloat16", 0.2)])
def test_dtypes(dtype, size):
    text, written = drawn(0, 2, 9), drawn(1, 2, 5)
    expected = model_of("v1.1")(text, written).data
    logits = model_of("v1.1").astype(dtype)(text, written)
    assert logits.dtype == dtype
    assert np.abs(logits.data.astype("float64") - expected).max() <= size * np.abs(expected).max()


def test_it_learns_to_write_backwards():
    """Two tokens in the other order: it needs positions, both stacks and what joins them."""
    rng = np.random.default_rng(0)
    model = EncoderDecoder(T5(**SIZES | dict(vocab_size=8, layers=1, decoder_layers=1)))
    optimizer = AdamW(model.parameters(), lr=0.01)
    for _ in range(120):
        text = rng.integers(1, 8, (32, 2))
        loss = ops.cross_entropy(model(text, model.shifted(text[:, ::-1])), text[:, ::-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = rng.integers(1, 8, (64, 2))
    written = generate(model, text, 2, temperature=0)
    assert (written[:, 1:] == text[:, ::-1]).mean() > 0.95


def test_training_is_the_same_however_a_batch_is_split():
    """In parts, on two threads: the losses and norms of the whole batch, with padding and without
    one text's targets."""
    text, targets = drawn(0, 4, 9), drawn(1, 4, 5)
    mask, targets[2], targets[3, 3:] = (np.arange(9) < [[9], [4], [9], [2]]).astype(int), -100, -100

    def steps(workers, accumulate):
        model = model_of("v1.1")
        optimizer = AdamW(model.parameters(), lr=0.01)
        with Trainer(model, optimizer, workers=workers, loss=AnswerLoss()) as trainer:
            done = [trainer.step(i, (text, targets, mask), accumulate=accumulate) for i in (0, 1)]
        assert [s.targets for s in done] == [13, 13]
        return [x for s in done for x in (s.loss, s.norm)]

    whole = steps(1, 1)
    close(steps(1, 3), whole, "float64")
    close(steps(2, 1), whole, "float64")
    model = model_of("v1.1")
    logits = model(text, model.shifted(targets), mask).data
    P = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = targets != -100
    close(whole[0], -np.log(P[kept, targets[kept]]).mean(), "float64")


def test_lora_on_four_bits():
    """QLoRA: 4-bit bases, adapters on q and v of all three attentions, and only those learn."""
    model, text, written = model_of().astype("float32"), drawn(0, 2, 9), drawn(1, 2, 5)
    plain = model(text, written).data
    quantize_model(model, "nf4")
    layers = {p: m for p, m in model.named_modules() if type(m) is QuantizedLinear}
    assert len(layers) == 2 * 6 + 3 * 10 and "head" not in layers
    rounded = model(text, written).data
    assert 0 < np.abs(rounded - plain).max() < np.abs(plain).max()
    add_lora(model, r=2, alpha=2)
    adapted = {p.rpartition(".A")[0] for p, _ in model.named_parameters() if p.endswith(".A")}
    assert len(adapted) == 2 * 2 + 3 * 4
    assert np.array_equal(model(text, written).data, rounded)
    assert caches(model.read(text))
    loss = ops.cross_entropy(model(text, model.shifted(written)), written)
    loss.backward()
    assert all((p.grad != 0).any() for path, p in model.named_parameters() if path.endswith("B"))
    for p in model.parameters():
        p.data += 0.1
    before = generate(model, text, 6, temperature=0)
    close(merge_lora(model)(text, written).data, merged := model(text, written).data, "float32")
    assert merged.shape == (2, 5, 23) and before.shape == (2, 7)


def test_ia3_and_what_looks_at_whole_texts():
    model, text = model_of(), drawn(0, 2, 9)
    assert caches(model.read(text))
    expected = generate(model, text, 6, temperature=0, eos=())
    add_ia3(model)
    assert (generate(model, text, 6, temperature=0, eos=()) == expected).all()

    class Mean(Adapter):
        """Adds the mean of all rows so far."""

        def forward(self, x, base):
            y, T = base(x), x.shape[1]
            return y + np.tri(T)[None] / np.arange(1, T + 1)[:, None] @ y

    model = model_of()
    insert_adapters(model, "mean", {"decoder.blocks.0.mlp.down": Mean()})
    assert not caches(model.read(text))
    written = generate(model, text, 6, temperature=0, eos=())
    logits = model(text, written[:, :-1]).data
    assert (logits.argmax(-1) == written[:, 1:]).all()


@pytest.mark.parametrize("changes, said", [
    (dict(layers=0), "layers must be positive"), (dict(activation="gelu"), "activation must be"),
    (dict(buckets=3), "buckets must be at least 4"), (dict(max_distance=4), "half of the 8"),
    (dict(start=23), "start 23 must be an id below 23"), (dict(dropout=1.0), "dropout")])
def test_impossible_facts(changes, said):
    with pytest.raises(ValueError, match=said):
        T5(**SIZES | changes)


def test_what_is_for_transformers_alone_says_so():
    for make in (student_from_teacher, lambda model: Distillation(model, model)):
        with pytest.raises(TypeError, match="must be Transformers; there is one EncoderDecoder"):
            make(model_of())
    model, rows = model_of(), (drawn(0, 2, 5), drawn(1, 2, 5), np.ones((2, 5), int))
    trainer = Trainer(model, AdamW(model.parameters()))
    for run in (partial(loss_of, model), trainer.evaluate, lambda *rows: trainer.step(0, rows)):
        with pytest.raises(TypeError, match=r"its loss is train\.AnswerLoss"):
            run(*rows)
    for add in (partial(add_bottleneck, m=2), partial(add_prompt, length=2),
                partial(add_prefix, length=2), partial(train_top, k=1)):
        with pytest.raises(TypeError, match="for a Transformer, not for EncoderDecoder"):
            add(model_of())


def test_flags_are_flags():
    with pytest.raises(TypeError, match="scaled_head must be True or False, got 1"):
        T5(**SIZES | dict(scaled_head=1))


@pytest.mark.parametrize("tokens, written, masks, said", [
    ([1, 2], [[0]], {}, r"\(B, T >= 1\), got int64 \(2,\)"),
    ([[1, 2]], [[]], {}, r"got float64 \(1, 0\)"), ([[1, 23]], [[0]], {}, "23 rows"),
    ([[1, 2]], [[0]], dict(mask=[[1]]), r"mask \(1, 1\) must have the shape \(1, 2\)"),
    ([[1, 2]], [[0]], dict(decoder_mask=[[1, 1]]), r"\(1, 2\) must have the shape \(1, 1\)"),
    ([[1, 2]], [[0]], dict(mask=[[1, 2]]), "must be 1 for a token"),
    ([[1, 2]], [[0], [1]], {}, "does not go with k")])
def test_wrong_tokens_and_masks(tokens, written, masks, said):
    with pytest.raises(ValueError, match=said):
        model_of()(tokens, written, **masks)


def test_shifted():
    model = model_of(start=4)
    targets = np.array([[7, 8, -100], [9, -100, 3]])
    assert model.shifted(targets).tolist() == [[4, 7, 8], [4, 9, 4]]
    assert targets[0, 2] == -100
    assert isinstance(model.encoder, Stack)
