"""minilm.quantize.linear: a layer of codes computes what the dequantized weight would, holds no
float copy of it, and a quantized model is saved, converted, refused and run like any other.
"""

import copy
import os
import subprocess
import sys
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest
from conftest import close

from minilm import ops
from minilm.generate import generate
from minilm.nn import Linear
from minilm.optim import SGD, AdamW, PagedAdamW
from minilm.quantize import (
    FourBit,
    Int8,
    QuantizedLinear,
    int8_matmul_outliers,
    quantize_4bit,
    quantize_int8,
    quantize_model,
)
from minilm.quantize.linear import KINDS, quantize_weight, quantized_linear
from minilm.tensor import Tensor
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Transformer

V, CONTEXT, LAYERS = 23, 8, 2
CONFIGS = {
    "gpt2": Config.gpt2(V, CONTEXT, LAYERS, heads=2, width=32),
    "llama": Config.llama(V, CONTEXT, LAYERS, heads=4, width=32, hidden=24, kv_heads=2),
    "bert": Config.bert(V, CONTEXT, LAYERS, heads=2, width=32, hidden=40),
}
TOKENS = np.random.default_rng(7).integers(0, V, (2, CONTEXT))
FORMS = [("nf4", False), *((kind, True) for kind in KINDS), ("nf4", "int8")]
families = pytest.mark.parametrize("family", CONFIGS)
forms = pytest.mark.parametrize("kind, double_quant", FORMS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def make(family, seed=0):
    """A tiny model in which every parameter has been moved from where it starts."""
    model, rng = Transformer(CONFIGS[family], seed), np.random.default_rng(seed + 1)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.2, t.shape).astype(np.float32)
    return model.eval()


def plain(model):
    """The same model with float weights: those that its quantized layers stand for."""
    for path, m in list(model.named_modules()):
        if type(m) is QuantizedLinear:
            model.replace(path, Linear.of(Tensor(m.weight.dequantize()), m.bias))
    return model


def kinds_of_layers(model):
    return {path: type(m) for path, m in model.named_modules()
            if type(m) in (Linear, QuantizedLinear)}  # fmt: skip


def bits(model):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in model.state_dict().items()}


def equal(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("shape", [(5, 33), (33,), (2, 3, 33), (1, 1, 33)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "llm.int8"])
def test_it_is_linear_with_the_dequantized_weight(kind, bias, shape):
    """Value and gradients bit for bit, in float32."""
    W, x = quantize_weight(normal(7, 33), kind), normal(*shape, seed=1)
    dy, b = normal(*shape[:-1], 7, seed=2), normal(7, seed=3)
    ys, grads = [], []
    for fn, weight in ((quantized_linear, W), (ops.linear, Tensor(W.dequantize()))):
        inputs = [Tensor(x, requires_grad=True), Tensor(b, requires_grad=True)]
        y = fn(inputs[0], weight, inputs[1] if bias else None)
        y.backward(dy)
        ys.append(y.data)
        grads += [t.grad for t in inputs[: 1 + bias]]
    assert equal(*ys)
    half = len(grads) // 2
    assert all(equal(*pair) for pair in zip(grads[:half], grads[half:]))


@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float64", np.float32])
@pytest.mark.parametrize("W", [quantize_4bit(normal(7, 33)), quantize_int8(normal(7, 33), -1)],
                         ids=["nf4", "int8"])  # fmt: skip
def test_compute_dtype(W, compute):
    """x and W are rounded to it, the results back to x's dtype; bias and gradients are x's."""
    x, b, dy = Tensor(normal(5, 33), requires_grad=True), normal(7, seed=1), normal(5, 7, seed=2)
    inner = np.dtype(compute)

    def product(a, c):
        wide = np.promote_types(inner, np.float32) if inner.kind == "f" else np.float32
        y = a.astype(inner).astype(wide) @ c.astype(inner).astype(wide)
        return y.astype(inner).astype(np.float32)

    y = quantized_linear(x, W, Tensor(b), compute_dtype=compute)
    y.backward(dy)
    assert equal(y.data, product(x.data, W.dequantize().T) + b)
    assert equal(x.grad, product(dy, W.dequantize()))
    layer = QuantizedLinear(W, Tensor(b), compute)
    assert equal(layer(x).data, y.data)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_has_the_dtype_of_x(kind, dtype):
    layer = QuantizedLinear(quantize_weight(normal(7, 33), kind), Tensor(normal(7)),
                            threshold=6.0 if kind == "llm.int8" else None)  # fmt: skip
    wide = layer(Tensor(normal(5, 33).astype(dtype).astype(np.float32))).data
    x = Tensor(normal(5, 33).astype(dtype), requires_grad=True)
    y = layer.astype(dtype)(x)
    y.backward(np.ones(y.shape, dtype))
    assert y.dtype == x.grad.dtype == layer.bias.dtype == dtype
    close(y.data, wide, np.dtype(dtype) if dtype != np.float64 else "float16")


@pytest.mark.parametrize("outlier", [1, 60])
def test_llm_int8_multiplies_in_8_bits_and_goes_back_in_floats(outlier):
    W, x, b = quantize_int8(normal(7, 33), -1), normal(2, 3, 33, seed=1), normal(7, seed=2)
    x[..., 5] = outlier
    layer, x = QuantizedLinear(W, Tensor(b), threshold=6.0), Tensor(x, requires_grad=True)
    y, dy = layer(x), normal(2, 3, 7, seed=3)
    y.backward(dy)
    assert equal(y.data, int8_matmul_outliers(x.data, W) + b)
    assert equal(x.grad, (dy.reshape(6, 7) @ W.dequantize()).reshape(2, 3, 33))
    exact = x.data @ W.dequantize().T + b
    assert 0 < np.abs(y.data - exact).max() < 0.1
    assert equal(layer(Tensor(x.data * 0)).data, np.broadcast_to(b, (2, 3, 7)))


def test_a_width_that_does_not_fit():
    for W in (quantize_4bit(normal(7, 33)), quantize_int8(normal(7, 33), -1)):
        with pytest.raises(ValueError, match=r"32 features, .*\(7, 33\) takes 33"):
            quantized_linear(normal(5, 32), W)


@pytest.mark.parametrize("kind", ["nf4", "nf3", "int8", "llm.int8"])
def test_no_float_copy_of_the_weight_outlives_a_pass(kind, traced):
    """The graph keeps the codes it was given; a pass needs one float weight at a time.

    LLM.int8() needs its codes in float32 instead, as BLAS multiplies no integers.
    """
    O, I = 1024, 2048
    threshold = 6.0 if kind == "llm.int8" else None
    layer = QuantizedLinear(quantize_weight(normal(O, I), kind), threshold=threshold)
    floats, held = 4 * O * I, []
    for N in (2, 2, 32):  # the first pass fills caches of levels
        x = Tensor(normal(N, I), requires_grad=True)
        tracemalloc.reset_peak()
        before = traced()[0]
        y = layer(x)
        after, peak = traced()
        held.append(after - before - y.data.nbytes)
        assert held[-1] < 0.01 * floats and peak - before < 1.35 * floats
        tracemalloc.reset_peak()
        y.backward(np.ones(y.shape, np.float32))
        assert traced()[1] - before < 1.35 * floats
    assert abs(held[2] - held[1]) < 20_000  # where x has 245,760 bytes more


def test_the_graph_does_not_keep_x():
    layer, x = QuantizedLinear(quantize_4bit(normal(7, 33))), Tensor(normal(5, 33), True)
    kept = weakref.ref(x.data)
    y = layer(x)
    del x
    assert kept() is None and y.requires_grad


@pytest.fixture
def traced():
    """(bytes allocated now, the most of them) since the test began."""
    tracemalloc.start()
    yield tracemalloc.get_traced_memory
    tracemalloc.stop()


@forms
@families
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(family, kind, double_quant):
    model = quantize_model(make(family), kind, double_quant)
    skipped = {"head", "head.transform", "head.out"}
    layers = kinds_of_layers(model)
    assert {path for path, found in layers.items() if found is Linear} == skipped & layers.keys()
    assert len(layers) > 12
    logits = model(TOKENS).data
    if kind == "llm.int8":
        assert 0 < relative(logits, plain(model)(TOKENS).data) < 0.02
    else:
        assert equal(logits, plain(model)(TOKENS).data)


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@families
def test_fewer_bits_are_further_from_the_float_model(family):
    exact = make(family)(TOKENS).data
    error = {kind: relative(quantize_model(make(family), kind)(TOKENS).data, exact)
             for kind in KINDS}  # fmt: skip
    assert 0 < error["int8"] < 0.02 and 0 < error["llm.int8"] < 0.03
    assert 5 * error["llm.int8"] < error["nf4"] < 0.3
    assert 1.5 * error["nf4"] < error["nf3"] < error["nf2"] / 1.3


def test_each_kind_holds_what_it_says():
    for kind, double_quant in FORMS:
        layer = quantize_model(make("gpt2"), kind, double_quant, block_size=32).blocks[1].mlp.up
        W, exact = layer.weight, make("gpt2").blocks[1].mlp.up.weight.data
        assert W.shape == exact.shape
        if kind.endswith("int8"):
            assert type(W) is Int8 and W.absmax.shape == (len(exact), 1)
            assert (W.codes == quantize_int8(exact, -1).codes).all()
            assert layer.threshold == (6.0 if kind == "llm.int8" else None)
        else:
            expected = quantize_4bit(exact, kind, 32, double_quant)
            assert type(W) is FourBit and W.codebook == kind and W.nbytes == expected.nbytes
            assert (W.packed == expected.packed).all() and W.c2.dtype == expected.c2.dtype
            assert layer.threshold is None


@families
def test_gradients_reach_what_is_not_quantized(family):
    """Biases, norms and embeddings get those of the model with the dequantized weights."""
    model = quantize_model(make(family))
    grads = []
    for m in (model, plain(quantize_model(make(family)))):
        logits = m(TOKENS)
        logits.backward(normal(*logits.shape))
        grads.append({name: t.grad for name, t in m.named_parameters()})
    quantized, expected = grads
    assert quantized.keys() == expected.keys() and any("norm" in name for name in quantized)
    assert any(name.endswith("q.bias") for name in quantized) == CONFIGS[family].bias
    assert all(equal(grad, expected[name]) for name, grad in quantized.items())


@forms
def test_a_state_is_saved_and_loaded(tmp_path, kind, double_quant):
    """Through a file, into a model that started elsewhere."""
    model = quantize_model(make("gpt2"), kind, double_quant)
    write_tensors(tmp_path / "model.safetensors", model.state_dict())
    other = quantize_model(make("gpt2", seed=5), kind, double_quant)
    assert not equal(other(TOKENS).data, model(TOKENS).data)
    other.load_state_dict(read_tensors(tmp_path / "model.safetensors"))
    assert bits(other) == bits(model) and equal(other(TOKENS).data, model(TOKENS).data)


@forms
def test_a_weight_is_one_object_that_sees_what_is_loaded(kind, double_quant):
    """A layer uses the weight that it was given; loading writes into its very arrays."""
    weight = quantize_weight(normal(7, 64), kind, double_quant)
    other = quantize_weight(normal(7, 64, seed=1), kind, double_quant)
    layer = QuantizedLinear(weight)
    assert layer.weight is weight and layer.weight is layer.weight
    assert all(a is getattr(weight, name) for name, a in layer.state_dict().items())
    layer.load_state_dict(QuantizedLinear(other).state_dict())
    assert layer.weight is weight and equal(weight.dequantize(), other.dequantize())


def test_a_copy_has_a_weight_of_its_own():
    model = quantize_model(make("gpt2"))
    again, before = copy.deepcopy(model), bits(model)
    again.load_state_dict(quantize_model(make("gpt2", seed=5)).state_dict())
    assert bits(model) == before and not equal(again(TOKENS).data, model(TOKENS).data)
    assert equal(again(TOKENS).data, quantize_model(make("gpt2", seed=5))(TOKENS).data)


def test_a_state_of_another_form_is_refused():
    model, before = quantize_model(make("gpt2")), bits(quantize_model(make("gpt2")))
    for kind, double_quant in [("nf4", False), ("nf4", "int8"), ("nf3", True), ("int8", True)]:
        with pytest.raises(ValueError, match="does not fit"):
            model.load_state_dict(quantize_model(make("gpt2", 1), kind, double_quant).state_dict())
        assert bits(model) == before


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "llm.int8"])
def test_astype_leaves_the_codes(kind, dtype):
    model = quantize_model(make("gpt2"), kind)
    expected, before = model(TOKENS).data, bits(model)
    model.astype(dtype)
    for name, (found, _, data) in bits(model).items():
        if name.rpartition(".")[2] in ("packed", "c2", "c1", "offset", "codes", "absmax"):
            assert (found, data) == before[name][::2]
        else:
            assert found == np.dtype(dtype)
    logits = model(TOKENS).data
    assert logits.dtype == np.dtype(dtype)
    assert relative(logits.astype(np.float32), expected) < {"float64": 2e-3}.get(dtype, 3e-2)
    if (dtype, kind) == ("float64", "nf4"):
        close(logits, expected, "float32")


def test_parameters_and_replace():
    """The arrays are tensors without gradients; a layer's place can be taken by another."""
    model = quantize_model(make("gpt2"))
    own = dict(model.named_tensors())
    arrays = {name for name in own if name.endswith((".packed", ".c2", ".c1", ".offset"))}
    assert len(arrays) == 4 * 6 * LAYERS
    assert not arrays & dict(model.named_parameters()).keys()
    before = model(TOKENS).data
    path, layer = "blocks.1.attention.v", model.blocks[1].attention.v
    model.replace(path, Linear.of(Tensor(layer.weight.dequantize() + 1), layer.bias))
    assert not equal(model(TOKENS).data, before)
    model.replace(path, layer)
    assert equal(model(TOKENS).data, before)
    assert equal(model.to("cpu")(TOKENS).data, before)


SKIP = {
    "head": {"head"},
    ("head", "q"): {"head", "blocks.0.attention.q", "blocks.1.attention.q"},
    ("head", "blocks.1.mlp.up"): {"head", "blocks.1.mlp.up"},
    ("head", "mlp.up"): {"head", "blocks.0.mlp.up", "blocks.1.mlp.up"},
    ("head", "blocks.0"): {"head", *(f"blocks.0.{p}" for p in
        ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"))},
    (): set(),
}  # fmt: skip


@pytest.mark.parametrize("skip", SKIP, ids=str)
def test_skip_keeps_layers(skip):
    layers = kinds_of_layers(quantize_model(make("gpt2"), skip=skip))
    assert {path for path, found in layers.items() if found is Linear} == SKIP[skip]


def test_skip_names_layers_that_are_there():
    model = make("gpt2")
    with pytest.raises(ValueError, match=r"^skip \['hea', 'ttention.q'\] names no layer of this"):
        quantize_model(model, skip=("hea", "ttention.q", "q"))
    assert QuantizedLinear not in kinds_of_layers(model).values()


@pytest.mark.parametrize("setting", [dict(block_size=3), dict(double_quant="foo")])
def test_settings_of_4_bits_are_checked_for_int8_too(setting):
    with pytest.raises(ValueError, match=f"^{next(iter(setting))} must be "):
        quantize_model(make("gpt2"), "int8", **setting)


@pytest.mark.parametrize("optimizer", [AdamW, SGD, PagedAdamW])
def test_an_optimizer_of_weights_that_are_in_few_bits_now_says_so(optimizer):
    model = make("gpt2")
    trains = optimizer(model.parameters())
    quantize_model(model)
    ops.cross_entropy(model(TOKENS), TOKENS).backward()
    with pytest.raises(ValueError, match=r"of the optimizer, .* is frozen"):
        trains.step()
    assert model.embed.weight.requires_grad  # it is the head's too, which is in floats


def test_a_tied_head_can_be_quantized_and_leaves_the_embedding():
    model = make("gpt2")
    table = model.embed.weight.data.copy()
    quantize_model(model, skip=())
    assert equal(model.embed.weight.data, table) and type(model.head) is QuantizedLinear
    assert equal(model.head.weight.dequantize(), quantize_4bit(table).dequantize())
    assert equal(model(TOKENS).data, plain(model)(TOKENS).data)


def spoil(value, dtype="float32"):
    def change(model):
        model.blocks[-1].mlp.down.weight.data = model.blocks[-1].mlp.down.weight.data.astype(dtype)
        model.blocks[-1].mlp.down.weight.data[1, 2] = value

    return change


REFUSED = {
    "nan": (spoil(np.nan), {}, ValueError, "blocks.1.mlp.down needs"),
    "inf": (spoil(np.inf), dict(kind="llm.int8"), ValueError, "blocks.1.mlp.down needs"),
    "float64": (spoil(1e300, "float64"), {}, ValueError, "mlp.down needs .* float32"),
    "kind": (None, dict(kind="nf5"), ValueError, "llm.int8.*'nf5'"),
    "compute_dtype": (None, dict(compute_dtype="int8"), ValueError, "bfloat16.*'int8'"),
    "no dtype": (None, dict(compute_dtype="float33"), TypeError, "float33"),
    "double_quant": (None, dict(double_quant="int4"), ValueError, "'int4'"),
    "block_size": (None, dict(block_size=65), ValueError, "64.* 65"),
    "nothing left": (None, dict(skip=("head", "blocks")), ValueError, "no Linear.*blocks"),
    "twice": (quantize_model, {}, ValueError, "no Linear"),
    "twice, as int8": (quantize_model, dict(kind="int8"), ValueError, "no Linear"),
}


@pytest.mark.parametrize("change, settings, kind, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_changes_nothing(change, settings, kind, message):
    model = make("gpt2")
    if change:
        change(model)
    before, layers = bits(model), kinds_of_layers(model)
    with pytest.raises(kind, match=message):
        quantize_model(model, **settings)
    assert bits(model) == before and kinds_of_layers(model) == layers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["nf4", "nf3", "int8", "llm.int8"])
def test_generation_is_that_of_the_dequantized_weights(family, kind):
    """Past the context, from one prompt (token by token) and two, likeliest and drawn."""
    model = quantize_model(make(family), kind)
    drawn = [generate(model, TOKENS[:B, :3], 10, temperature=t) for B in (1, 2) for t in (0, 1.0)]
    if kind == "llm.int8":  # its products are not those of the dequantized weights
        assert all(d.shape[1] == 13 and d.max() < V for d in drawn)
        return
    plain(model)
    again = [generate(model, TOKENS[:B, :3], 10, temperature=t) for B in (1, 2) for t in (0, 1.0)]
    assert all(equal(*pair) for pair in zip(drawn, again))


def test_settings_reach_every_layer():
    model = quantize_model(make("llama"), "nf3", double_quant=False, compute_dtype="bfloat16",
                           block_size=128)  # fmt: skip
    layers = [m for _, m in model.named_modules() if type(m) is QuantizedLinear]
    assert {(m.weight.codebook, m.weight.block_size, m.weight.c1, m.compute_dtype)
            for m in layers} == {("nf3", 128, None, "bfloat16")}  # fmt: skip
    logits, exact = model(TOKENS).data, plain(model)(TOKENS).data
    assert logits.dtype == np.float32 and 0 < relative(logits, exact) < 2e-2


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16", "float64", np.float32])
def test_every_compute_dtype_is_taken(compute):
    """By its name or as a type."""
    model = quantize_model(make("gpt2"), "int8", compute_dtype=compute)
    logits, exact = model(TOKENS).data, plain(model)(TOKENS).data
    assert logits.dtype == np.float32 and relative(logits, exact) < 2e-2


def test_the_name_bfloat16_is_known():
    """NumPy knows it only once ml_dtypes is imported; the quantizers see to that."""
    program = (
        "from minilm.quantize import quantize_int8; import numpy as np\n"
        "print(quantize_int8(np.ones(1)).dequantize('bfloat16').dtype)"
    )
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "bfloat16\n", done.stderr
