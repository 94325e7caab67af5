"""minilm.peft.adapted: the slot takes methods that it has never heard of. Two are written here: one
that can be merged, and one that cannot."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.distill import student_from_teacher
from minilm.generate import generate
from minilm.interop.peft import save_adapter
from minilm.measure.memory import held
from minilm.nn import Linear
from minilm.optim import AdamW
from minilm.peft import (
    add_lora,
    merge_lora,
    requantize_lora,
    unload_lora,
    unmerge_lora,
    use_adapter,
)
from minilm.peft.adapted import Adapter, adaptable_layers, adapted_layers, chosen, insert_adapters
from minilm.quantize import QuantizedLinear, quantize_model
from minilm.tensor import Tensor, no_grad
from minilm.transformer import Config, Transformer

V, WIDTH, LAYERS = 19, 8, 2
CONFIG = Config.llama(vocab_size=V, context=12, layers=LAYERS, heads=2, width=WIDTH, hidden=12)
bases = pytest.mark.parametrize("base", ["plain", "nf4"])


class Shift(Adapter):
    """W x + b + s."""

    def __init__(self, O):
        self.s = Tensor(np.zeros(O, np.float32), requires_grad=True)

    def forward(self, x, base):
        return base(x) + self.s

    def merged(self, base):
        plain = base.plain()
        b = 0 if plain.bias is None else plain.bias.data
        return Linear.of(plain.weight, Tensor(b + self.s.data))


class Gate(Adapter):
    """silu(W x + b + s), with a fixed share of W x + b: no linear layer says that."""

    def __init__(self, O):
        self.inner, self.share = Shift(O), Tensor(np.full(O, 0.5, np.float32))

    def forward(self, x, base):
        return ops.silu(self.inner(x, base)) + base(x) * self.share


def make(base="plain", seed=0):
    model, rng = Transformer(CONFIG, seed), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += 0.3 * rng.standard_normal(t.shape, dtype=np.float32)
    return (model if base == "plain" else quantize_model(model, base)).eval()


def add(model, method, targets=("q", "down"), name="default"):
    return insert_adapters(model, name, {
        path: method(len(layer.plain().weight.data)) for path, layer in
        chosen(model, targets).items()})


def stir(model, seed=0):
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += rng.standard_normal(p.shape, dtype=np.float32)
    return model


TOKENS, TARGETS = np.random.default_rng(2).integers(0, V, (2, 3, 7))


def logits(model):
    with no_grad():
        return model(TOKENS).data


def learn(model, steps=30):
    """The first loss and the last."""
    optimizer, losses = AdamW(model.parameters(), lr=0.05), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(TOKENS), TARGETS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.data))
    return losses[0], losses[-1]


@bases
def test_a_method_is_added_and_trained(base):
    model, plain = make(base), make(base)
    before, frozen = logits(plain), {k: a.copy() for k, a in plain.state_dict().items()}
    add(model, Shift)
    assert np.array_equal(logits(model), before)  # s is zero
    sizes = {"attention.q": WIDTH, "mlp.down": WIDTH}
    assert {path: p.shape for path, p in model.named_parameters()} == {
        f"blocks.{i}.{path}.adapters.default.s": (O,)
        for i in range(LAYERS) for path, O in sizes.items()}
    first, last = learn(model)
    assert last < first - 0.3
    assert all((p.data != 0).any() for p in model.parameters())
    unload_lora(model)  # nothing was merged: the base, which did not move by a bit
    assert all(np.array_equal(frozen[k], a) for k, a in model.state_dict().items())
    assert np.array_equal(logits(model), before) and not model.parameters()


@bases
@pytest.mark.parametrize("method", [Shift, Gate])
def test_the_answer_is_the_methods(base, method, monkeypatch):
    """Each adapted layer answers what forward says, given the layer without adapters."""
    model, x = stir(add(make(base), method)), np.ones((2, WIDTH), np.float32)
    layer = model.blocks[0].attention.q
    assert type(layer.base) is (Linear if base == "plain" else QuantizedLinear)
    given, forward = [], method.forward
    monkeypatch.setattr(method, "forward", lambda a, x, base: (given.append(base),
                                                               forward(a, x, base))[1])
    y = layer.base(Tensor(x)).data
    adapter = layer.adapters["default"]
    s = (adapter.inner if method is Gate else adapter).s.data
    expected = y + s if method is Shift else (y + s) / (1 + np.exp(-y - s)) + 0.5 * y
    assert np.abs(layer(Tensor(x)).data - expected).max() < 1e-6
    assert np.abs(s).min() > 0 and given == [layer.base]


@bases
def test_merged_and_taken_back(base):
    model = stir(add(make(base), Shift))
    apart, state = logits(model), {k: a.copy() for k, a in model.state_dict().items()}
    assert merge_lora(model) is model
    layer = model.blocks[0].attention.q
    assert type(layer.merged) is Linear and type(layer.plain()) is Linear
    assert np.abs(logits(model) - apart).max() < 1e-5 * np.abs(apart).max()
    unmerge_lora(model)
    assert np.array_equal(logits(model), apart)
    assert all(np.array_equal(state[k], a) for k, a in model.state_dict().items())
    together = logits(merge_lora(model))
    assert np.array_equal(logits(unload_lora(model)), together) and not adapted_layers(model)


@bases
def test_what_cannot_be_merged_says_so_and_stays(base):
    """Also beside an adapter of the same name that can: nothing is merged then."""
    model = make(base)
    made = {"blocks.0.attention.q": Shift(WIDTH), "blocks.1.attention.q": Gate(WIDTH)}
    stir(insert_adapters(model, "mixed", made))
    before = logits(model)
    with pytest.raises(ValueError, match="Gate cannot be merged"):
        merge_lora(model)
    assert not any(m.merged for m in adapted_layers(model).values())
    assert np.array_equal(logits(model), before)
    with pytest.raises(ValueError, match="Gate cannot be merged"):
        student_from_teacher(model, [1])
    use_adapter(model, None)
    assert student_from_teacher(model, [1]).blocks[0].attention.q.weight.shape == (WIDTH, WIDTH)


def test_methods_are_switched_by_name():
    """Each acts alone, trains alone, comes back bit for bit; what is fixed stays so."""
    alone = {"a": stir(add(make(), Shift, ("q", "v")), 1), "b": stir(add(make(), Gate, "up"), 2),
             "c": stir(add_lora(make(), 2, 4, ("v", "down")), 3)}
    model = stir(add(make(), Shift, ("q", "v"), "a"), 1)
    optimizer, trained = AdamW(model.parameters(), lr=0.1), model.parameters()
    model = stir(add(model, Gate, "up", "b"), 2)
    model = stir(add_lora(model, 2, 4, ("v", "down"), name="c"), 3)
    for name in "abcab":
        use_adapter(model, name)
        assert np.array_equal(logits(model), logits(alone[name]))
        ends = {p.rpartition(".")[2] for p, _ in model.named_parameters()}
        assert ends == {"a": {"s"}, "b": {"s"}, "c": {"A", "B"}}[name]
        assert all(f".adapters.{name}." in p for p, _ in model.named_parameters())
    assert np.array_equal(logits(use_adapter(model, None)), logits(make()))
    assert not model.parameters()
    use_adapter(model, "a")
    assert [id(p) for p in model.parameters()] == [id(p) for p in trained]  # its place is kept
    before = logits(model)
    optimizer.zero_grad()
    ops.cross_entropy(model(TOKENS), TARGETS).backward()
    optimizer.step()
    assert not np.array_equal(logits(model), before)


def test_astype_reaches_an_adapter_that_rests():
    model = add(add(make(), Gate, "q", "a"), Shift, "q", "b").astype("float64")
    assert {t.dtype.name for _, t in model.named_tensors()} == {"float64"}
    ours = model.blocks[0].attention.q.adapters
    assert not ours["a"].inner.s.requires_grad and ours["b"].s.requires_grad
    use_adapter(model, "a")
    assert ours["a"].inner.s.requires_grad and not ours["a"].share.requires_grad
    ops.cross_entropy(model(TOKENS), TARGETS).backward()
    assert ours["a"].inner.s.grad.dtype == np.float64


@given(seed=st.integers(0, 99))
def test_state_dict_round_trip(seed):
    model, other = stir(add(make(), Gate), seed), add(make(seed=3), Gate)
    assert "blocks.0.attention.q.adapters.default.inner.s" in model.state_dict()
    assert "blocks.0.attention.q.base.weight" in model.state_dict()
    other.load_state_dict(model.state_dict())
    assert np.array_equal(logits(other), logits(model))


def test_its_numbers_are_counted_and_it_writes():
    model = stir(add(make(), Gate))
    counted = held(model, AdamW(model.parameters()))
    assert counted["adapters"] == 4 * 2 * 2 * LAYERS * WIDTH  # s and the share, two layers a block
    prompt = TOKENS[:1, :3]
    ids = generate(model, prompt, 6, temperature=0)
    for n in range(3, 9):  # with a cache as without
        assert ids[0, n] == model(ids[:, :n]).data[0, -1].argmax()


def test_the_layers_that_can_have_adapters():
    """Those below adapters are still found, as what they are; nothing inside is found twice."""
    model = make()
    before = adaptable_layers(model)
    assert before.keys() == {f"blocks.{i}.{m}" for i in range(LAYERS) for m in (
        "attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up",
        "mlp.down")} | {"head"}
    after = adaptable_layers(merge_lora(add_lora(model, 2, 4, "all-linear")))
    assert {k: id(m) for k, m in after.items()} == {k: id(m) for k, m in before.items()}


@pytest.mark.parametrize("shape, fits", [
    ((None, None), True), ((12, None), True), ((None, 8), True), ((12, 8), True),
    ((8, None), False), ((None, 12), False), ((8, 12), False)])
def test_a_method_may_say_which_weights_it_is_for(shape, fits):
    model, adapter = make(), Shift(12)
    trained, adapter.shape = model.parameters(), shape
    if fits:
        insert_adapters(model, "a", {"blocks.0.mlp.up": adapter})
        assert model.parameters() == [adapter.s]
    else:
        with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up is for a weight .*\(12, 8\)"):
            insert_adapters(model, "a", {"blocks.0.mlp.up": adapter})
        assert not adapted_layers(model)
        assert [id(p) for p in model.parameters()] == [id(p) for p in trained]


def test_what_only_some_methods_can(tmp_path):
    with pytest.raises(NotImplementedError, match="Adapter has no forward"):
        logits(insert_adapters(make(), "a", {"blocks.0.mlp.up": Adapter()}))
    model = stir(add(make("nf4"), Shift))
    with pytest.raises(ValueError, match=r"'default' is of \['Shift'\]; PEFT's are \['LORA'"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.q has Shift merged, not LoRA"):
        requantize_lora(merge_lora(model))
    assert len(adapted_layers(model)) == 2 * LAYERS
