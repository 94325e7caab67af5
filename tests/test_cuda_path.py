"""Models on CuPy arrays: training, adapters, quantized weights and generation as on NumPy's.

Where no GPU is, CuPy is the stand-in of tests/emulated_cupy: what runs there uses only what CuPy
has, and mixes no NumPy array in. Values are compared with the same work on the CPU.
"""

import cProfile
import math
import pstats
from dataclasses import replace
from pathlib import Path

import emulated_cupy
import numpy as np
import pytest
from conftest import close, counted_launches

import minilm
from minilm import cuda, ops
from minilm.backend import array_module, memory_limit, peak_memory, to_device
from minilm.blas import matmul
from minilm.cache import Cache
from minilm.generate import generate
from minilm.optim import SGD, AdamW, LossScaler, clip_grad_norm, flat
from minilm.peft import (
    add_lora,
    add_prefix,
    add_prompt,
    merge_lora,
    requantize_lora,
    settle_prefix,
)
from minilm.quantize import quantize_model
from minilm.rope import Dynamic, Llama3, Long, Yarn
from minilm.run import RunDirectory
from minilm.seq2seq import T5, EncoderDecoder
from minilm.tensor import Tensor, no_grad
from minilm.train import Diverged, Trainer
from minilm.transformer import Config, Transformer

pytestmark = pytest.mark.kernels  # names and signatures are held against CuPy where it is installed
SHAPE = dict(vocab_size=13, context=8, layers=2, heads=2, width=16)
FAMILIES = {
    "gpt2": Config.gpt2(**SHAPE, dropout=0.1),
    "llama": Config.llama(**SHAPE | {"heads": 4}, kv_heads=2, hidden=24),
    "bert": Config.bert(**SHAPE, hidden=32, dropout=0.1),
    "roberta": Config.bert(**SHAPE, hidden=32, positions="counted", padding=3, segments=1),
    "later": Config.llama(**SHAPE, hidden=24, head_width=16, qk_norm="head", window=3,
                          unrotated=(0,), bias=("q", "k", "v"), rope=Llama3(4.0, 6)),
    "gemma": Config.llama(**SHAPE, hidden=24, qk_norm="width", norm_output=True, norm_plus_one=True,
                          scaled_embedding=True, activation="geglu_tanh", rope=Dynamic(2.0, 4)),
    "gemma 2": Config.llama(**SHAPE, hidden=24, head_width=16, norm_both=True, window=3,
                            unwindowed=(1,), window_theta=50.0, attention_scale=0.3,
                            attention_cap=2.0, logits_cap=3.0),
    "scaled": Config.llama(**SHAPE, hidden=24, head_width=16, attention_scale=0.5),
    "stretched": Config.llama(**SHAPE, hidden=24, rope=Yarn(2.0, 5)),
    "long": Config.llama(**SHAPE, hidden=24, rope=Long((1.0,) * 4, (2.0,) * 4, 5)),
}
family = pytest.mark.parametrize("family", FAMILIES)
rng = np.random.default_rng(0)
TOKENS, TARGETS = rng.integers(0, 13, (2, 4, 8))
TARGETS[0, :3] = -100
MASK = np.ones((4, 8), int)
MASK[1, 5:] = 0


@pytest.fixture(autouse=True)
def same_dropout(monkeypatch):
    """The CPU drops what the card does: the generator that counts is there its specification."""
    monkeypatch.setattr(ops, "drawn", lambda rng, shape, p: cuda.kept(
        shape, p, int(rng.integers(2**63))))


def pair(family, change=lambda model: None, dtype="float32"):
    """The same model twice, on the CPU and on the GPU, its weights far from their first values."""
    models = []
    for device in ("cpu", "cuda"):
        model, rng = Transformer(FAMILIES[family], seed=1), np.random.default_rng(2)
        for _, t in model.named_tensors():
            t.data += rng.normal(0, 0.2, t.shape).astype("float32")
        model.astype(dtype)
        change(model)
        models.append(model.to(device))
    return models


def on_cpu(array):
    return to_device(array, "cpu").astype("float64")


def same(actual, expected, dtype="float32", scale=0.0):
    """The first on the GPU, the second on the CPU, of one dtype and with the same values."""
    assert array_module(actual) is not np and array_module(expected) is np
    assert actual.dtype == expected.dtype
    close(on_cpu(actual), on_cpu(expected), dtype, scale)


def same_parameters(gpu, cpu, dtype="float32"):
    """Against the size of weights: AdamW divides by gradients that may be almost nothing."""
    for p, q in zip(gpu.parameters(), cpu.parameters(), strict=True):
        same(p.data, q.data, dtype, scale=0.2)


def trained(model, steps=2, eps=1e-3, scaler=None, **settings):
    """What two steps with AdamW report, and the losses after them."""
    opt = AdamW(model.parameters(), lr=0.01, eps=eps, weight_decay=0.1)
    with Trainer(model, opt, seed=3, scaler=scaler) as trainer:
        done = [trainer.step(i, (TOKENS, TARGETS), clip=1.0, **settings) for i in range(steps)]
        found = trainer.evaluate(TOKENS, TARGETS, batch=3)
    return [x for s in done for x in (s.loss, s.norm)], found


@family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_and_gradients(cupy, family, dtype):
    cpu, gpu = pair(family, dtype=dtype)
    logits = [model.eval()(TOKENS, MASK) for model in (cpu, gpu)]
    same(logits[1].data, logits[0].data, dtype)
    for y in logits:
        ops.cross_entropy(y, TARGETS).backward()
    largest = max(float(abs(p.grad).max()) for p in cpu.parameters())
    for p, q in zip(gpu.parameters(), cpu.parameters(), strict=True):
        same(p.grad, q.grad, dtype, scale=largest)  # those of k's bias cancel to nothing


@pytest.mark.parametrize("family, pooler, on_card", [
    pytest.param(family, pooler, on_card, id=f"{pooler}, sorted {'there' if there else 'here'}")
    for family, pooler in [("bert", "tanh"), ("bert", "relu"), ("llama", None)]
    for on_card in (False, True) for there in [on_card or family == "llama"]])
def test_classes_of_texts(cupy, monkeypatch, family, pooler, on_card):
    """With padding by its id as well. Tokens, mask and segments are NumPy's, or on the card."""
    config = replace(FAMILIES[family], head="classes", labels=("a", "b"), pooler=pooler, padding=3)
    monkeypatch.setitem(FAMILIES, family, config)
    cpu, gpu = pair(family)
    labels, segments = np.array([0, 1, 1, 0]), (TOKENS > 6) * 1
    given = (TOKENS, MASK, None, segments if config.segments else None)
    moved = [a if a is None or not on_card else cupy.asarray(a) for a in given]
    found = gpu.eval()(*moved), cpu.eval()(*given)
    same(found[0].data, found[1].data)
    for y in found:
        ops.cross_entropy(y, labels).backward()
    largest = max(float(abs(p.grad).max()) for p in cpu.parameters())
    for p, q in zip(gpu.parameters(), cpu.parameters(), strict=True):
        same(p.grad, q.grad, scale=largest)
    assert not gpu.embed.weight.grad[3].any()


@family
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_steps(cupy, family, accumulate):
    cpu, gpu = pair(family)
    expected, actual = trained(cpu, accumulate=accumulate), trained(gpu, accumulate=accumulate)
    close(actual[0], expected[0], "float32")
    close(actual[1], expected[1], "float32")
    same_parameters(gpu, cpu)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_in_16_bits(cupy, dtype, launched):
    """AdamW's kernel runs on the float32 masters."""
    cpu, gpu = pair("llama", dtype=dtype)
    scaler = (lambda: LossScaler(2.0**10)) if dtype == "float16" else lambda: None
    expected = trained(cpu, scaler=scaler(), accumulate=2)
    close(trained(gpu, scaler=scaler(), accumulate=2)[0], expected[0], dtype)
    same_parameters(gpu, cpu, dtype)
    assert launched["adamw"] == 2 and gpu.parameters()[0].dtype == dtype


def test_a_step_that_overflows_is_skipped(cupy, launched):
    _, gpu = pair("gpt2", dtype="float16")
    before, scaler = [p.data.copy() for p in gpu.parameters()], LossScaler(2.0**30)
    trained(gpu, scaler=scaler)
    assert (scaler.scale, scaler.skipped, launched["adamw"]) == (2.0**28, 2, 0)
    for p, q in zip(gpu.parameters(), before, strict=True):
        np.testing.assert_array_equal(on_cpu(p.data), on_cpu(q))


def test_checkpointed_blocks(cupy):
    def change(model): model.checkpoint_every = 1
    cpu, gpu = pair("gpt2", change)
    close(trained(gpu)[0], trained(cpu)[0], "float32")
    same_parameters(gpu, cpu)


def test_lora(cupy):
    cpu, gpu = pair("gpt2")
    for model in (cpu, gpu):
        add_lora(model, 2, alpha=4, targets="all-linear", dropout=0.1)
    close(trained(gpu)[0], trained(cpu)[0], "float32")
    same_parameters(gpu, cpu)
    for model in (cpu, gpu):
        merge_lora(model)
    with no_grad():
        same(gpu.eval()(TOKENS).data, cpu.eval()(TOKENS).data)


@pytest.mark.parametrize("family, dtype", [
    ("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32")])
@pytest.mark.parametrize("kind", ["nf4", "nf3", "int8", "llm.int8"])
def test_qlora(cupy, family, kind, dtype):
    cpu, gpu = pair(family, dtype=dtype)
    for model in (cpu, gpu):
        quantize_model(model, kind)
        add_lora(model, 2, alpha=4, targets="all-linear")
    assert all(np.array_equal(on_cpu(a), on_cpu(b))
               for a, b in zip(gpu.state_dict().values(), cpu.state_dict().values(), strict=True))
    close(trained(gpu)[0], trained(cpu)[0], dtype)
    same_parameters(gpu, cpu, dtype)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_trains(cupy, family, dtype):
    """Keys and values in front, one for the whole batch; a mask speaks of them too."""
    results = []
    for model, device in zip(pair(family, dtype=dtype), ("cpu", "cuda")):
        rng, c = np.random.default_rng(3), model.config
        shape = 1, c.kv_heads, 3, c.width // c.heads
        k1, v1, k2, v2 = prefix = [
            Tensor(to_device(rng.standard_normal(shape).astype(dtype), device), requires_grad=True)
            for _ in range(4)]
        cache, mask = Cache.of([(k1, v1), (k2, v2)]), np.ones((4, 8), int)
        mask[0, :2] = 0
        y = model.freeze().eval()(TOKENS[:, :5], mask, cache)
        y.backward(y.data)
        results.append([y.data, *(x.grad for x in prefix)])
    for actual, expected in zip(*reversed(results)):
        same(actual, expected, dtype)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "bert"])
@pytest.mark.parametrize("add, settings", [
    (add_prompt, {}), (add_prompt, dict(ids=[5])), (add_prefix, {}), (add_prefix, dict(ids=[5])),
    (add_prefix, dict(hidden=4))])
def test_prompts_and_prefixes(cupy, family, add, settings):
    """Made on the card, masked, checkpointed and trained; settled; and generation."""
    cpu, gpu = pair(family)
    found, tokens = [], TOKENS[:, :5]
    for model in (cpu, gpu):
        model.checkpoint_every = 1
        add(model.eval(), 3, **settings)
        y = model(tokens, MASK[:, :5])
        ops.cross_entropy(y, TARGETS[:, :5]).backward()
        found.append([y.data, *(p.grad for p in model.parameters())])
    largest = max(float(abs(a).max()) for a in found[0][1:])
    for actual, expected in zip(*reversed(found), strict=True):
        same(actual, expected, "float32", scale=largest)
    if "hidden" in settings:
        gpu, cpu = settle_prefix(gpu), settle_prefix(cpu)
    same_parameters(gpu, cpu)
    if cpu.config.causal:
        assert np.array_equal(*(generate(m, [[1, 2]], 6, temperature=0) for m in (cpu, gpu)))


def test_quantized_on_the_cpu_and_moved(cupy):
    def change(model):
        quantize_model(model, "nf4", double_quant="int8")
        add_lora(model, 2, alpha=4, dropout=0.1)
    cpu, gpu = pair("gpt2", change)
    close(trained(gpu)[0], trained(cpu)[0], "float32")
    survived = []
    for model in (cpu, gpu):
        merge_lora(model)
        survived.append([v for s in requantize_lora(model).values() for v in s])
    close(survived[1], survived[0], "float32", scale=1)


@pytest.fixture
def launched():
    """How often each kernel was launched."""
    with counted_launches() as count:
        yield count


def test_qlora_launches_the_kernels_and_nothing_in_their_place(cupy, launched):
    """Each quantized layer's weight is made once forward and once for dx, which the first block's
    q, k and v have no need of; and few rows of bfloat16 do without."""
    sizes = SHAPE | dict(width=64, heads=4)
    gpu = Transformer(Config.llama(**sizes, kv_heads=2, hidden=64)).astype("bfloat16").to("cuda")
    quantize_model(gpu)
    assert launched == {"nf4_quantize": 14}
    add_lora(gpu, 2, alpha=4, targets="all-linear").astype("float32")
    launched.clear()
    with Trainer(gpu, AdamW(gpu.parameters())) as trainer:
        trainer.step(0, (TOKENS, TARGETS))
    assert launched == {"nf4_dequantize": 14 + 14 - 3, "adamw": 1, "swiglu": 2,
                        "swiglu_backward": 2, "rms_norm": 5, "rms_norm_backward": 5 - 1,
                        "rotary": 2 * 2 * 2}
    gpu.astype("bfloat16")
    launched.clear()
    with no_grad():
        gpu(TOKENS[:2])
    assert launched == {"nf4_matmul": 14, "attention_forward": 2, "swiglu": 2, "rms_norm": 5,
                        "rotary": 2 * 2}
    launched.clear()
    with no_grad():
        gpu(TOKENS[:1, :1])  # one row, as where a token is written
    assert launched["nf4_matmul"] == 14 and "nf4_dequantize" not in launched


@pytest.mark.parametrize("settings, fused", [({}, 1), (dict(scale=0.5), 1), (dict(cap=2.0), 0),
                                             (dict(scale=0.5, cap=2.0), 0)])
def test_a_scale_goes_to_the_kernel_and_a_cap_to_the_tiles(cupy, launched, settings, fused):
    """Both ways give what the CPU gives."""
    rng, results = np.random.default_rng(0), []
    q, k, v, dy = rng.standard_normal((4, 1, 2, 5, 16)).astype("bfloat16")
    for device in ("cuda", "cpu"):
        leaves = [Tensor(to_device(x, device), requires_grad=True) for x in (q, k, v)]
        y = ops.attention(*leaves, causal=True, **settings)
        y.backward(to_device(dy, device))
        results.append([y.data, *(x.grad for x in leaves)])
    assert launched["attention_forward"] == fused
    for actual, expected in zip(*results):
        close(on_cpu(actual), on_cpu(expected), "bfloat16", scale=1)


def qlora_step(layers):
    """A function that trains a bfloat16 Llama for a step, with more rows than nf4_matmul takes."""
    tokens = np.random.default_rng(0).integers(0, 13, (2, 9))
    sizes = SHAPE | dict(width=64, heads=4, layers=layers, context=9)
    gpu = Transformer(Config.llama(**sizes, kv_heads=2, hidden=64)).astype("bfloat16")
    quantize_model(gpu.to("cuda"))
    add_lora(gpu, 2, alpha=4, targets="all-linear")
    opt = AdamW(gpu.parameters())

    def step():
        opt.zero_grad()
        ops.cross_entropy(gpu(tokens), tokens).backward()
        opt.step()
    return step


def test_launches_of_a_qlora_step(cupy):
    """The host decides how long a step takes: each launch is 5 to 40 us of it. At 22 layers and
    more rows than nf4_matmul takes, 56 products and 38 launches a layer, 869 in all."""
    counts = []
    for layers in (1, 2):
        step = qlora_step(layers)
        step()
        emulated_cupy.reset()
        step()
        counts.append(emulated_cupy.launches.copy())
    products = [count.pop("gemmEx", 0) for count in counts]
    one, two = (sum(count.values()) for count in counts)
    assert products[1] - products[0] <= 56
    assert two - one <= 38 and one + 21 * (two - one) <= 869


def test_python_calls_of_a_qlora_step(cupy):
    """What the host does for a launch counts as much as the launch: calls of minilm's functions,
    a number that no machine changes."""
    counts = []
    for layers in (1, 2):
        step, profile = qlora_step(layers), cProfile.Profile()
        step()
        profile.runcall(step)
        counts.append(sum(row[1] for (file, *_), row in pstats.Stats(profile).stats.items()
                          if Path(file).is_relative_to(Path(minilm.__file__).parent)))
    assert counts[1] - counts[0] <= 1101  # 20 for each product


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_llamas_norms_rotary_and_swiglu_are_kernels(cupy, launched, dtype):
    _, gpu = pair("llama", dtype=dtype)
    ops.cross_entropy(gpu(TOKENS), TARGETS).backward()
    assert launched == {"swiglu": 2, "swiglu_backward": 2, "rms_norm": 5, "rms_norm_backward": 5,
                        "rotary": 2 * 2 * 2, "scatter_add": 1}


def test_a_run_on_the_gpu_is_saved_and_goes_on_as_if_it_had_not_stopped(cupy, tmp_path):
    _, gpu = pair("gpt2")
    opt, run = AdamW(gpu.parameters(), 1e-2), RunDirectory(tmp_path)
    with Trainer(gpu, opt) as trainer:
        trainer.step(0, (TOKENS, TARGETS))
        run.save(1, gpu, opt)
        trainer.step(1, (TOKENS, TARGETS))
    _, again = pair("gpt2")
    fresh = AdamW(again.parameters(), 1e-2)
    assert run.restore(again, fresh) == 1
    with Trainer(again, fresh) as trainer:
        trainer.step(1, (TOKENS, TARGETS))
    for a, b in zip(gpu.state_dict().values(), again.state_dict().values(), strict=True):
        np.testing.assert_array_equal(on_cpu(a), on_cpu(b))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", [dict(temperature=0), dict(top_k=5), dict(top_p=0.9)])
def test_generation(cupy, family, settings):
    cpu, gpu = pair(family)
    expected, actual = (generate(model, TOKENS[:1, :3], 9, **settings) for model in (cpu, gpu))
    np.testing.assert_array_equal(actual, expected)


def test_sgd_and_clipping(cupy):
    cpu, gpu = pair("gpt2")
    norms = []
    for model in (cpu, gpu):
        model.eval()
        opt = SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        ops.cross_entropy(model(TOKENS), TARGETS).backward()
        norms.append(clip_grad_norm(model.parameters(), 0.5))
        opt.step()
    close(norms[1], norms[0], "float32")
    same_parameters(gpu, cpu)


def test_state_comes_back_from_the_host(cupy):
    cpu, gpu = pair("llama")
    before = {name: on_cpu(a).astype("float32") for name, a in gpu.state_dict().items()}
    for p in gpu.parameters():
        p.data *= 0
    gpu.load_state_dict(before)
    with no_grad():
        same(gpu(TOKENS).data, cpu(TOKENS).data)
    cpu.load_state_dict(gpu.state_dict())
    assert all(array_module(a) is np for a in cpu.state_dict().values())


def test_a_step_reads_back_numbers_only(cupy):
    """Whatever waits for the card or crosses the bus: loss and norm, and never an array."""
    _, gpu = pair("llama")
    opt = AdamW(gpu.parameters())
    with Trainer(gpu, opt) as trainer:
        trainer.step(0, (TOKENS, TARGETS))
        emulated_cupy.reset()
        trainer.step(1, (TOKENS, TARGETS))
        assert set(emulated_cupy.to_host) <= {"float", "sdot"}
        assert sum(emulated_cupy.to_host.values()) <= 2, "loss, norm"
        assert sum(emulated_cupy.to_device.values()) <= 4, "ids, their order, targets, counted"
        trainer.evaluate(TOKENS, TARGETS)
        assert emulated_cupy.to_host["get"] <= 1, "the guesses"


def test_threads_share_a_gpu(cupy):
    """The flat buffers are cut where the kernels can begin."""
    cpu, gpu = pair("llama")
    for model, workers in (cpu, 1), (gpu, 3):
        with Trainer(model, AdamW(model.parameters(), 1e-2, eps=1e-3), workers) as trainer:
            trainer.step(0, (TOKENS, TARGETS))
    same_parameters(gpu, cpu)


def test_processes_cannot_share_a_gpu(cupy):
    _, gpu = pair("llama")
    with pytest.raises(ValueError, match="processes cannot share a GPU's memory"):
        Trainer(gpu, AdamW(gpu.parameters()), workers=2, processes=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_norm_is_as_exact_as_float32(cupy, dtype, monkeypatch):
    """A product of 16-bit vectors would be rounded to 16 bits, and in float16 be infinite."""
    monkeypatch.setattr(flat, "PIECE", 300)
    x = np.random.default_rng(0).normal(0, 30, 1000).astype(dtype)
    expected = float((x.astype(np.float64) ** 2).sum())
    assert flat.squares(cupy.asarray(x)) == pytest.approx(expected, rel=1e-6)
    assert flat.squares(x) == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_is_not_finite(cupy):
    _, gpu = pair("gpt2")
    gpu.parameters()[0].data[0, 0] = np.nan
    with pytest.raises(Diverged):
        trained(gpu)


def test_bad_ids_and_targets_are_refused(cupy):
    _, gpu = pair("llama")
    with pytest.raises(ValueError, match="ids from 0 to 13"):
        gpu(np.array([[0, 13]]))
    with pytest.raises(ValueError, match="targets from 0 to 13"):
        ops.cross_entropy(gpu(np.array([[0, 1]])), np.array([[0, 13]]))


def test_memory_that_was_refused_does_not_count(cupy):
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    with memory_limit(before + (1 << 20)), peak_memory() as peak, pytest.raises(MemoryError):
        cupy.empty(1 << 24, "uint8")
    assert peak.bytes == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_not_rounded_on_the_way(cupy, dtype):
    """Long ones of few results are what cuBLAS cuts in parts. 1 + 2^-5 ... is lost in 16 bits, and
    float16 cannot hold the sum before it is scaled. Nor is it rounded on a CPU."""
    from cupy_backends.cuda.libs import cublas

    a = np.full((16, 1 << 16), 1 + 2**-5, dtype)
    for array in (cupy.asarray, np.asarray):
        y = matmul(array(a), array(a.T), alpha=2.0**-10)
        assert (on_cpu(y) == float(np.asarray((1 + 2**-5) ** 2 * 64).astype(dtype))).all()
    assert getattr(cublas, "math_mode", 16) == 16  # the stand-in keeps it


@pytest.mark.parametrize("a, b", [((3, 2, 4), (4, 5)), ((2, 4), (3, 4, 5)),
                                  ((3, 1, 2, 4), (2, 4, 5))])
def test_stacks_of_matrices_broadcast(cupy, a, b):
    a, b = (np.arange(math.prod(shape)).reshape(shape).astype(np.float16) for shape in (a, b))
    assert np.array_equal(on_cpu(matmul(cupy.asarray(a), cupy.asarray(b))), matmul(a, b))


@pytest.mark.parametrize("activation", ["relu", "geglu_tanh"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_t5(cupy, activation, dtype):
    """Its biases of distances, with padding, and what it writes one token at a time."""
    facts = T5(13, 2, 1, heads=2, width=16, hidden=24, head_width=16, buckets=8, max_distance=12,
               activation=activation)
    cpu, gpu = (EncoderDecoder(facts).astype(dtype).to(device) for device in ("cpu", "cuda"))
    written = np.maximum(TARGETS, 0)
    logits = [model(TOKENS, model.shifted(TARGETS), MASK) for model in (cpu, gpu)]
    same(logits[1].data, logits[0].data, dtype)
    for y in logits:
        ops.cross_entropy(y, written).backward()
    largest = max(float(abs(p.grad).max()) for p in cpu.parameters())
    for p, q in zip(gpu.parameters(), cpu.parameters(), strict=True):
        same(p.grad, q.grad, dtype, scale=largest)
    if dtype == "float32":
        drawn = [generate(model, TOKENS, 6, temperature=0, eos=()) for model in (cpu, gpu)]
        assert np.array_equal(*drawn)
