"""minilm.quantize.dequantized: weights that are kept as floats change no bit, take no more memory
than was allowed, and are gone afterwards, whatever happened.
"""

import gc
import math
import tracemalloc
import weakref

import dequantizing
import numpy as np
import pytest
from contenders import Shape
from hypothesis import given
from hypothesis import strategies as st

from minilm.generate import generate
from minilm.peft import add_lora, merge_lora, requantize_lora, unmerge_lora
from minilm.quantize import QuantizedLinear, dequantized, fourbit, kept, quantize_model
from minilm.seq2seq import T5, EncoderDecoder
from minilm.transformer import Config, Transformer

V, CONTEXT = 23, 8
CONFIGS = {
    "gpt2": Config.gpt2(V, CONTEXT, layers=2, heads=2, width=32),
    "llama": Config.llama(V, CONTEXT, layers=2, heads=4, width=32, hidden=24, kv_heads=2),
}
FORMS = [("nf4", False), ("nf4", True), ("nf4", "int8"), ("fp4", True), ("nf3", True),
         ("int2", True), ("int8", True)]
TOKENS = np.random.default_rng(7).integers(0, V, (2, CONTEXT))
OBJECTS = 50_000  # bytes of Python's own


def make(family="gpt2", kind="nf4", double_quant=True, compute=None, dtype="float32", lora=False):
    """A tiny quantized model in which every parameter has been moved from where it starts."""
    model, rng = Transformer(CONFIGS[family]), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.2, t.shape).astype(np.float32)
    quantize_model(model, kind, double_quant, compute)
    if lora:
        add_lora(model, 2, 4, "all-linear")
        for p in model.parameters():
            p.data += rng.normal(0, 0.2, p.shape).astype(np.float32)
    return model.eval().astype(dtype)


def layers_of(model):
    return {path: m for path, m in model.named_modules() if type(m) is QuantizedLinear}


def size_of(layer, itemsize=4):
    return itemsize * math.prod(layer.weight.shape)


def everything(model, itemsize=4):
    return sum(size_of(m, itemsize) for m in layers_of(model).values())


def results(model):
    """Bits of logits and of tokens, one by one from one prompt and two, past the context."""
    rows = [generate(model, TOKENS[:B, :3], 7, temperature=B - 1).tobytes() for B in (1, 2)]
    return [model(TOKENS).data.tobytes(), *rows]


def at_rest(model):
    """Nothing is kept, and nothing of a layer has changed but what it always holds."""
    return all(set(vars(m.weight)) <= {*m.weight.__dataclass_fields__, "_codes"}
               and m.weight.floats is None for m in layers_of(model).values())


@given(family=st.sampled_from([*CONFIGS]), form=st.sampled_from(FORMS),
       share=st.floats(0, 1.1), lora=st.booleans(),
       dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
       compute=st.sampled_from([None, "bfloat16", "float16"]))
def test_no_bit_changes_and_the_limit_holds(family, form, share, lora, dtype, compute):
    """As many weights are kept as fit, in the dtype of the products, at any limit."""
    model = make(family, *form, compute, dtype, lora)
    before, itemsize = results(model), np.dtype(compute or dtype).itemsize
    limit = int(share * everything(model, itemsize))
    with dequantized(model, limit) as found:
        taken = sum(floats.nbytes for floats in found.values())
        assert taken <= limit
        assert all(floats.dtype == (compute or dtype) for floats in found.values())
        left = [m for path, m in layers_of(model).items() if path not in found]
        assert all(taken + size_of(m, itemsize) > limit for m in left)
        assert results(model) == before
    assert at_rest(model) and results(model) == before


def test_what_is_kept_is_not_made_again(monkeypatch):
    model = make()
    before = results(model)
    with dequantized(model, everything(model)) as found:
        assert found.keys() == layers_of(model).keys()
        monkeypatch.delattr(fourbit, "_look_up")
        assert results(model) == before
    with pytest.raises(NameError, match="_look_up"):
        model(TOKENS)


def test_gradients_have_the_same_bits():
    def gradients(model):
        logits = model(TOKENS)
        logits.backward(np.ones_like(logits.data))
        found = {name: p.grad.tobytes() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = None
        return found

    model = make(lora=True)
    before = gradients(model)
    with dequantized(model, everything(model)):
        assert gradients(model) == before and len(before) == 2 * 12


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_after_an_error_the_model_is_as_it_was(error):
    model = make()
    before = {name: a.tobytes() for name, a in model.state_dict().items()}
    with pytest.raises(error), dequantized(model, everything(model)) as found:
        floats = [weakref.ref(a) for a in found.values()]
        raise error
    gc.collect()
    assert at_rest(model) and found == {} and len(floats) == 12
    assert all(ref() is None for ref in floats)  # nobody holds the memory any more
    assert {name: a.tobytes() for name, a in model.state_dict().items()} == before


def test_an_error_while_weights_are_made_leaves_none(monkeypatch):
    """As if memory ended in the middle."""
    model, look_up, count = make(), fourbit._look_up, []

    def fails(*args):
        count.append(1)
        if len(count) > 5:
            raise MemoryError
        look_up(*args)

    monkeypatch.setattr(fourbit, "_look_up", fails)
    with pytest.raises(MemoryError), dequantized(model, everything(model)):
        raise AssertionError("the body must not begin")
    assert at_rest(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
def test_memory_stays_below_the_limit(kind, share):
    """Measured: at its highest moment it grows by what is kept, and by nothing else."""
    model = Transformer(Config.gpt2(V, 16, layers=2, heads=4, width=128)).eval().freeze()
    quantize_model(model, kind)
    limit = int(share * everything(model))

    def peak(limit):
        tracemalloc.start()
        try:
            with dequantized(model, limit) as found:
                taken = sum(floats.nbytes for floats in found.values())
                generate(model, TOKENS[:1, :3], 5, temperature=0)
            del found
            gc.collect()
            return tracemalloc.get_traced_memory(), taken
        finally:
            tracemalloc.stop()

    peak(0)  # what is cached once
    (_, without), _ = peak(0)
    (after, highest), taken = peak(limit)
    assert taken >= 0.9 * limit and highest - without <= limit + OBJECTS
    assert highest > taken and after < OBJECTS


def test_the_slowest_to_make_are_kept_first(monkeypatch):
    """Only kinds are measured, one layer of each; layers of one kind keep the model's order."""
    model = Transformer(CONFIGS["gpt2"]).eval()
    quantize_model(model, "int8", skip=("head", "mlp"))
    quantize_model(model, "nf3")
    measured, seconds = [], {"nf3": 3.0, None: 1.0}

    def cost(weight, dtype):
        measured.append(getattr(weight, "codebook", None))
        return seconds[measured[-1]]

    monkeypatch.setattr(kept, "seconds_a_byte", cost)
    slow = [path for path in layers_of(model) if "mlp" in path]
    fast = [path for path in layers_of(model) if "mlp" not in path]
    with dequantized(model, everything(model)) as found:
        assert [*found] == slow + fast
    seconds["nf3"] = 0.5
    limit = sum(size_of(layers_of(model)[path]) for path in fast)
    with dequantized(model, limit) as found:
        assert [*found] == fast
    assert measured == ["nf3", None] * 2 or measured == [None, "nf3"] * 2
    with dequantized(make(), 10**9):
        assert len(measured) == 4  # one kind: there is nothing to compare


def test_the_time_of_a_byte_is_measured():
    """Eight values of three bits take more steps than two of four."""
    model = Transformer(Config.gpt2(V, 16, layers=1, heads=2, width=256))
    slow, fast = (kept.seconds_a_byte(layers_of(quantize_model(
        Transformer(model.config), kind))["blocks.0.mlp.up"].weight, np.dtype("float32"))
        for kind in ("nf3", "nf4"))
    assert 1e-12 < fast < slow < 1e-5


def test_kept_weights_cannot_be_written_to():
    model = make()
    with dequantized(model, everything(model)) as found:
        weight = model.blocks[0].mlp.up.weight
        assert weight.dequantize() is found["blocks.0.mlp.up"]
        with pytest.raises(ValueError, match="read-only"):
            weight.dequantize()[0, 0] = 1
        other = weight.dequantize("float64")  # not what is kept
        other[0, 0] = 1
        assert other.dtype == np.float64


def test_one_inside_of_another_keeps_what_is_left():
    model = make()
    first, *_, last = layers_of(model)
    with dequantized(model, size_of(layers_of(model)[first])) as outer:
        assert [*outer] == [first]
        with dequantized(model, everything(model)) as inner:
            assert last in inner and first not in inner
        assert [*outer] == [first] and layers_of(model)[first].weight.floats is outer[first]
        assert layers_of(model)[last].weight.floats is None
    assert at_rest(model)


def test_adapters_are_merged_and_requantized_inside():
    """As outside; the merged weights are nobody else's."""
    def merged(model):
        logits = merge_lora(model)(TOKENS).data.tobytes()
        survivals = requantize_lora(model)
        return logits, model(TOKENS).data.tobytes(), survivals

    expected = merged(make(lora=True))
    model = make(lora=True)
    with dequantized(model, everything(model)):
        assert merged(model) == expected
    assert model(TOKENS).data.tobytes() == expected[1]
    model = make(lora=True)
    with dequantized(model, everything(model)):
        merge_lora(model)
    assert at_rest(unmerge_lora(model))


def test_an_encoder_decoder():
    model = EncoderDecoder(T5(V, 1, 1, heads=2, width=32, hidden=40, head_width=16))
    quantize_model(model)
    before = generate(model, TOKENS, 5, temperature=0).tobytes()
    with dequantized(model, everything(model)) as found:
        assert len(found) == len(layers_of(model))
        assert generate(model, TOKENS, 5, temperature=0).tobytes() == before


@pytest.mark.parametrize("limit, kind", [(-1, ValueError), (0.5, TypeError), ("1", TypeError),
                                         (None, TypeError), (True, TypeError)])
def test_bad_limits(limit, kind):
    with pytest.raises(kind, match=r"^limit must be "), dequantized(make(), limit):
        raise AssertionError("the body must not begin")


@pytest.mark.parametrize("kind", [None, "llm.int8"])
def test_there_must_be_something_to_keep(kind):
    """LLM.int8() multiplies the codes: its products are not those of the floats."""
    model = Transformer(CONFIGS["gpt2"])
    if kind:
        quantize_model(model, kind)
    with pytest.raises(ValueError, match="nothing to keep"), dequantized(model, 100):
        raise AssertionError("the body must not begin")


def test_what_the_benchmark_tried_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(dequantizing, "bitsandbytes", lambda x: {})
    jobs = dequantizing.pieces(512)
    expected = {"int8": jobs["dequantize, int8"](), "NF4": jobs["dequantize"]()}
    tried = [what for what in jobs if what.startswith("tried: ")]
    for what in tried:
        of = "int8" if "int8" in what else "NF4"
        assert jobs[what]().tobytes() == expected[of].tobytes(), what
    assert len(tried) == 5


def test_the_benchmark_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(dequantizing, "GPT2", dict(
        vocab_size=V, context=16, layers=2, heads=2, width=64))
    monkeypatch.setattr(dequantizing, "LAYERS", [(64, 128)])
    monkeypatch.setitem(dequantizing.SHAPES, "M", Shape(1, 2, 64, 8, 2, V))
    dequantizing.main(("vector", "step", "writing"), rounds=2, tokens=3)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    heads = [i for i, line in enumerate(lines) if line[0].startswith("|---")]
    assert [len(lines[i - 1]) for i in heads] == [3, 2, 4]
    limits = [line[:2] for line in lines[heads[-1] + 1 :]]
    assert [limit for limit, _ in limits] == [
        "| up to 0.0 MB", "| up to 0.2 MB", "| up to 0.4 MB"]  # of 12 x 64^2 weights in 2 layers
    assert limits[0][1] == "0.0 MB" and limits[1][1] == "0.2 MB"


def test_on_a_card_nothing_is_kept(cupy):
    model = make().to("cuda")
    with pytest.raises(ValueError, match=r"on the CPU alone"), dequantized(model, 10**6):
        raise AssertionError("the body must not begin")
    assert at_rest(model)
