"""minilm.interop.peft with DoRA and AdaLoRA: what is saved comes back, GPT-2's q, k and v share a
c_attn without a change of the function, files that are no such adapters raise FormatError, and
(marked peers) PEFT gives the same logits from the same files, whoever wrote them. Their options and
gradients are in test_peft_whole.py, on quantized bases and not."""

import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_interop_peft import (
    CONFIG,
    TENSORS,
    TOKENS,
    TOLERANCE,
    agree,
    base,
    expect,
    peer,
    peer_logits,
    theirs,
    with_peers,
)

from minilm.files import read_json, write_json
from minilm.interop.peft import load_adapter, save_adapter
from minilm.optim import AdamW
from minilm.peft import (
    Budget,
    add_adalora,
    add_bitfit,
    add_bottleneck,
    add_dora,
    add_lora,
    merge_lora,
    use_adapter,
)
from minilm.peft.adapted import adapted_layers, insert_adapters
from minilm.peft.dora import row_norms
from minilm.quantize import quantize_model
from minilm.tensorfiles import read_tensors, write_tensors

__all__ = ["peer", "theirs"]  # fixtures
ADD = {"dora": add_dora, "adalora": add_adalora}
methods = pytest.mark.parametrize("method", ADD)
PLACES = ("q", "k", "v", "o", "mlp.up", "mlp.down", "blocks.1.attention.k")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def adapted(family, method, targets=("q", "v"), r=2, alpha=3.0, seed=0, model=None, **settings):
    """The base with an adapter of which no number is what it starts as."""
    model = ADD[method](model or base(family), r, alpha, targets, **settings)
    rng = np.random.default_rng(seed)
    for t in model.parameters():
        t.data += rng.normal(0, 0.1, t.shape).astype(t.dtype)
    return model.eval()


def found(model, name="default"):
    """{path: the tensors and settings of the adapter}, bit for bit."""
    parts = {}
    for path, m in adapted_layers(model).items():
        a = m.adapters[name]
        low = getattr(a, "lora", a)
        parts[path] = (type(a), low.r, low.alpha, low.scale, low.drop.p, getattr(low, "rslora", 0),
                       {end: t.data.tobytes() for end, t in a.named_tensors()})
    return parts


@given(name=st.sampled_from(["llama", "bert", "distilbert"]), method=st.sampled_from([*ADD]),
       targets=st.sets(st.sampled_from(PLACES), min_size=1) | st.just("all-linear"),
       r=st.integers(1, 4), alpha=st.sampled_from([1, 3, 16.0, 0.7]), rslora=st.booleans(),
       dropout=st.sampled_from([0.0, 0.1]))
def test_round_trip(tmp_path_factory, name, method, targets, r, alpha, rslora, dropout):
    folder = tmp_path_factory.mktemp("adapter")
    settings = {"rslora": rslora} if method == "dora" else {}
    model = adapted(name, method, targets, r, alpha, dropout=dropout, **settings)
    save_adapter(model, folder)
    loaded = load_adapter(base(name), folder).eval()
    assert found(loaded) == found(model)
    assert np.array_equal(loaded(TOKENS).data, model(TOKENS).data)


@given(method=st.sampled_from([*ADD]), r=st.integers(1, 4), alpha=st.sampled_from([1, 3, 0.7]),
       targets=st.sets(st.sampled_from(PLACES), min_size=1))
def test_gpt2_round_trip(tmp_path_factory, method, targets, r, alpha):
    """q, k, v to one c_attn and back: the same function, and from then on the same bits."""
    first, second = (tmp_path_factory.mktemp("adapter") for _ in range(2))
    def wide(): return base("gpt2").astype("float64")
    model = adapted("gpt2", method, targets, r, alpha, model=wide())
    save_adapter(model, first)
    loaded = load_adapter(wide(), first).eval()
    agree(loaded(TOKENS).data, model(TOKENS).data, 1e-12)
    save_adapter(loaded, second)
    for file in (CONFIG, TENSORS):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    again = load_adapter(wide(), second).eval()
    assert np.array_equal(again(TOKENS).data, loaded(TOKENS).data)
    assert found(again) == found(loaded)


def test_what_is_written_of_dora(tmp_path):
    model = adapted("gpt2", "dora")
    save_adapter(model, tmp_path)
    raw, tensors = read_json(tmp_path / CONFIG), read_tensors(tmp_path / TENSORS)
    assert raw["peft_type"] == "LORA" and raw["use_dora"] is True
    module, layers = "base_model.model.transformer.h.1.attn.c_attn", model.blocks[1].attention
    q, v = (m.adapters["default"].m.data for m in (layers.q, layers.v))
    expected = np.concatenate([q, row_norms(layers.k), v])
    assert np.array_equal(tensors[f"{module}.lora_magnitude_vector"], expected)
    assert tensors.keys() == {f"base_model.model.transformer.h.{i}.attn.c_attn.{end}" for i in (
        0, 1) for end in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")}
    save_adapter(add_lora(base("gpt2"), 2, 3), tmp_path)
    assert "use_dora" not in read_json(tmp_path / CONFIG)


def test_what_is_written_of_adalora(tmp_path):
    """c_attn has twice the rank of c_proj, which rank_pattern says; one scale for both."""
    model = adapted("gpt2", "adalora", ("q", "v", "o"), r=2, alpha=3)
    save_adapter(model, tmp_path)
    raw, tensors = read_json(tmp_path / CONFIG), read_tensors(tmp_path / TENSORS)
    assert (raw["peft_type"], raw["init_r"]) == ("ADALORA", 4)
    assert raw["lora_alpha"] == pytest.approx(3 / 2.00001 * 4.00001, rel=1e-12)
    assert raw["rank_pattern"] == {f"transformer.h.{i}.attn.c_proj.lora_E": [True, True, False,
                                                                             False] for i in (0, 1)}
    key = "base_model.model.transformer.h.0.attn.c_attn.{}"
    q, v = (m.adapters["default"] for m in (model.blocks[0].attention.q,
                                            model.blocks[0].attention.v))
    assert np.array_equal(tensors[key.format("lora_A")], np.concatenate([q.Q.data, v.Q.data]))
    assert np.array_equal(tensors[key.format("lora_E")], np.concatenate([q.lam.data, v.lam.data]))
    expected = np.zeros((48, 4), np.float32)
    expected[:16, :2], expected[32:, 2:] = q.P.data, v.P.data
    assert np.array_equal(tensors[key.format("lora_B")], expected)


def test_masked_singular_values_are_kept_in_the_file(tmp_path):
    """As zeros, so that what was dropped may come back after loading."""
    model = adapted("llama", "adalora", "all-linear", r=3)
    optimizer = AdamW(model.parameters(), 0.0)
    model(TOKENS).sum().backward()
    optimizer.step()
    Budget(model, optimizer, last=1, steps=3, final=1).step(2)
    assert sum(int((t.data == 0).sum()) for p, t in model.named_parameters() if "lam" in p) == 28
    save_adapter(model, tmp_path)
    assert read_json(tmp_path / CONFIG)["rank_pattern"] is None
    assert found(load_adapter(base("llama"), tmp_path)) == found(model)


@methods
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_on_a_quantized_base(tmp_path, method, name):
    """Saved and loaded there: bit for bit, and within rounding where q and v become one module."""
    model = adapted(name, method, model=quantize_model(base(name)).eval())
    save_adapter(model, tmp_path)
    loaded = load_adapter(quantize_model(base(name)), tmp_path).eval()
    agree(loaded(TOKENS).data, model(TOKENS).data, 0.0 if name == "llama" else 1e-6)
    agree(merge_lora(loaded)(TOKENS).data, model(TOKENS).data, 1e-5)


@methods
def test_taking_turns_with_lora(tmp_path, method):
    model = add_lora(adapted("llama", method, name="a"), 2, 3, name="b")
    save_adapter(model, tmp_path / "a", "a")
    save_adapter(model, tmp_path / "b", "b")
    both = load_adapter(load_adapter(base("llama"), tmp_path / "a", "a"), tmp_path / "b", "b")
    assert found(both, "a") == found(model, "a")
    assert np.array_equal(use_adapter(both, "a").eval()(TOKENS).data,
                          adapted("llama", method)(TOKENS).data)


@pytest.fixture
def edit(tmp_path):
    """edit(method, tensors, field=value, ...) -> a folder with other fields or tensors."""

    def make(method, tensors=None, **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_adapter(adapted("llama", method), folder)
        write_json(folder / CONFIG, read_json(folder / CONFIG) | changes)
        if tensors:
            write_tensors(folder / TENSORS, tensors(read_tensors(folder / TENSORS)))
        return folder

    return make


Q = "base_model.model.model.layers.0.self_attn.q_proj"
E = "model.layers.0.self_attn.q_proj.lora_E"


@pytest.mark.parametrize("changes", [
    {"r": 8, "target_r": 5, "total_step": 100, "tinit": 3, "tfinal": 4, "deltaT": 2, "beta1": 0.9},
    {"beta2": 0.5, "orth_reg_weight": 0.1, "use_rslora": True, "alpha_pattern": {"q_proj": 9}},
    {"rank_pattern": {E: [True, True]}}, {"rank_pattern": {}}, {"init_lora_weights": False},
    {"rank_pattern": {E: [True, False, True]}, "init_r": 2}, {"use_dora": False},
    {"rank_pattern": {"other.lora_E": [True]}}])
def test_fields_that_change_no_number(edit, changes):
    loaded = load_adapter(base("llama"), edit("adalora", **changes))
    assert found(loaded) == found(adapted("llama", "adalora"))


@pytest.mark.parametrize("changes, file, text", [
    ({"init_r": 3}, TENSORS, "lora_A is float32 (2, 16), expected float (3, 16)"),
    ({"init_r": None}, CONFIG, "init_r is None"), ({"init_r": 0}, CONFIG, "init_r is 0"),
    ({"lora_alpha": 0}, CONFIG, "lora_alpha is 0, expected a positive number"),
    ({"use_dora": True}, CONFIG, "use_dora is True, expected false"),
    ({"rank_pattern": {E: [True, False]}}, TENSORS, "expected float (1, 16)"),
    ({"rank_pattern": {E: 2}}, CONFIG, "rank_pattern is"),
    ({"rank_pattern": {E: [1, 1]}}, CONFIG, "rank_pattern is"),
    ({"rank_pattern": [True]}, CONFIG, "rank_pattern is"),
    ({"init_lora_weights": "pissa"}, CONFIG, "init_lora_weights is 'pissa'"),
    ({"something_new": 1}, CONFIG, "something_new is 1, which is not supported"),
    ({"tensors": lambda t: {k: a for k, a in t.items() if k != f"{Q}.lora_E"}}, TENSORS,
     f"missing keys: {Q}.lora_E"),
    ({"tensors": lambda t: t | {f"{Q}.ranknum": np.ones(1, np.float32)}}, TENSORS,
     f"unexpected keys: {Q}.ranknum"),
    ({"tensors": lambda t: t | {f"{Q}.lora_E": t[f"{Q}.lora_E"][:, 0]}}, TENSORS,
     "lora_E is float32 (2,), expected float (2, 1)"),
    ({"tensors": lambda t: t | {f"{Q}.lora_E": t[f"{Q}.lora_E"] * np.nan}}, TENSORS,
     "lora_E has numbers that are not finite")])
def test_adalora_refused(edit, changes, file, text):
    expect("llama", edit("adalora", **changes), file, text)


@pytest.mark.parametrize("changes, file, text", [
    ({"use_dora": False}, TENSORS, f"unexpected keys: {Q}.lora_magnitude_vector"),
    ({"use_dora": 1}, CONFIG, "use_dora is 1, expected true or false"),
    ({"tensors": lambda t: t | {f"{Q}.lora_magnitude_vector": np.ones(8, np.float32)}}, TENSORS,
     "lora_magnitude_vector is float32 (8,), expected float (16,)")])
def test_dora_refused(edit, changes, file, text):
    expect("llama", edit("dora", **changes), file, text)


def test_adapters_that_cannot_be_saved(tmp_path):
    path = tmp_path / "x"
    for add, text in ((add_bitfit, "whole tensors, without a method beside them"),
                      (lambda m: add_bottleneck(m, 2), r"\['Bottleneck'\]; PEFT's are \['LORA', ")):
        with pytest.raises(ValueError, match=text):
            save_adapter(add(base("gpt2")), path)
    for method, text in (("dora", r"\['DoRA', 'LoRA'\]"), ("adalora", r"\['AdaLoRA', 'LoRA'\]")):
        parts = {p: m.adapters["default"] for model in (adapted("llama", method, "q"),
                 add_lora(base("llama"), 2, 3, "v")) for p, m in adapted_layers(model).items()}
        with pytest.raises(ValueError, match=text):
            save_adapter(insert_adapters(base("llama"), "default", parts), path)
    parts = {p: m.adapters["default"] for model in (
        adapted("llama", "adalora", "q"), adapted("llama", "adalora", "v", alpha=4))
        for p, m in adapted_layers(model).items()}
    with pytest.raises(ValueError, match="PEFT has one lora_alpha, init_r and lora_dropout"):
        save_adapter(insert_adapters(base("llama"), "default", parts), path)
    assert not path.exists()


@with_peers
@pytest.mark.parametrize("name, method, targets", [
    ("gpt2", "dora", ("q", "v")), ("gpt2", "dora", ("k", "o", "mlp.up")),
    ("llama", "dora", "all-linear"), ("bert", "dora", ("q",)), ("gpt2", "adalora", ("q", "v")),
    ("gpt2", "adalora", ("q", "o", "blocks.1.mlp.up")), ("llama", "adalora", "all-linear"),
    ("distilbert", "adalora", ("k", "mlp.down"))])
def test_peer_reads(peer, theirs, tmp_path, name, method, targets):
    """No key missing or left over; the same logits in float64 and float32, merged or not."""
    _, _, peft = peer
    ours = adapted(name, method, targets)
    save_adapter(ours, tmp_path)
    model = peft.PeftModel.from_pretrained(theirs(name), tmp_path)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = read_tensors(tmp_path / TENSORS)
    assert state.keys() == tensors.keys()
    assert all(np.array_equal(state[key].numpy(), array) for key, array in tensors.items())
    wide = load_adapter(base(name).astype("float64"), tmp_path).eval()
    tolerance = 1e-6 if method == "adalora" else TOLERANCE.get(name, 1e-12)  # ranknum is a float32
    agree(wide(TOKENS).data, peer_logits(peer, model), tolerance)
    agree(ours(TOKENS).data, peer_logits(peer, model.float()), 1e-6)
    agree(merge_lora(ours)(TOKENS).data, peer_logits(peer, model.merge_and_unload()), 1e-6)


@with_peers
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT wonders at ranks of 0
@pytest.mark.parametrize("name, targets", [("gpt2", ["c_attn", "c_fc"]),
                                           ("llama", ["q_proj", "down_proj"])])
def test_peer_trains_adalora_and_drops_ranks(peer, theirs, tmp_path, name, targets):
    """What PEFT's allocator left, a rank of 0 among it, is read and written again."""
    torch, _, peft = peer
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(init_r=3, target_r=1, total_step=6, tfinal=1, lora_alpha=5,
                                target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs(name).float(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(1, 7):
        optimizer.zero_grad()
        model(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path / "a")
    ranks = [sum(kept) for kept in read_json(tmp_path / "a" / CONFIG)["rank_pattern"].values()]
    assert sum(ranks) == 4 and 0 in ranks
    expected = peer_logits(peer, model)
    assert np.abs(expected - base(name)(TOKENS).data).max() > 0.01
    ours = load_adapter(base(name), tmp_path / "a").eval()
    agree(ours(TOKENS).data, expected, 1e-6)
    agree(merge_lora(ours)(TOKENS).data, expected, 1e-6)
    save_adapter(ours, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(theirs(name).float(), tmp_path / "b")
    agree(peer_logits(peer, again), expected, 1e-6)
    shutil.rmtree(tmp_path / "a")
