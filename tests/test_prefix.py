"""minilm.peft.prefix: keys and values of a real text act as that text; equation (3) and what He et
al. make of it; the MLP, and what settling keeps of it; how many numbers there are, of GPT-3 too.
What prefixes share with prompts is in test_front.py."""

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.attention import plain_attention
from minilm.cache import Cache
from minilm.optim import AdamW
from minilm.peft import add_lora, add_prefix, settle_prefix, use_adapter
from minilm.peft.prefix import Prefix, Rows
from minilm.quantize import quantize_model
from minilm.tensor import Tensor, no_grad
from minilm.transformer import Config, Transformer

V, C, CONTEXT = 19, 16, 12
SIZES = dict(vocab_size=V, context=CONTEXT, layers=2, heads=4, width=C)
CONFIGS = {"gpt2": Config.gpt2(**SIZES), "llama": Config.llama(**SIZES, hidden=24, kv_heads=2),
           "qwen3": Config.llama(**SIZES, hidden=24, kv_heads=2, qk_norm="head", head_width=6),
           "bert": Config.bert(**SIZES, hidden=24)}
families = pytest.mark.parametrize("family", CONFIGS)
causal = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])


def make(family, dtype="float64"):
    model, rng = Transformer(CONFIGS[family]), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += 0.3 * rng.standard_normal(t.shape, dtype=np.float32)
    return model.astype(dtype).eval()


def stir(model, seed=0):
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += (0.5 * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


@causal
@given(seed=st.integers(0, 999), p=st.integers(1, 5), T=st.integers(1, 6), B=st.integers(1, 3))
def test_keys_and_values_of_a_text_are_that_text(family, seed, p, T, B):
    """From ids, or taken from a cache by hand; and so are positions and masks."""
    rng, model, plain = np.random.default_rng(seed), make(family), make(family)
    ids, text = rng.integers(0, V, p), rng.integers(0, V, (B, T))
    whole, mask = np.concatenate([np.tile(ids, (B, 1)), text], axis=1), np.ones((B, p + T), int)
    mask[0, p + 1 :] = 0
    cache = Cache.empty(plain)
    with no_grad():
        expected = plain(whole, mask).data[:, p:]
        plain(ids[None], cache=cache)
    close(add_prefix(model, ids=ids)(text, mask[:, p:]).data, expected, "float64")
    for layer, rows in zip(cache.layers, model.front.adapters["default"].layers):
        assert np.array_equal(layer.k[:, :, :p], rows.k.data) and rows.k.data.base is None
        assert np.array_equal(layer.v[:, :, :p], rows.v.data)


def test_ids_are_read_by_the_model_as_it_is():
    """With the adapters of layers that act, without what is in front, on codes and in eval mode."""
    model = quantize_model(make("llama", "float32"))
    stir(add_lora(stir(add_prefix(model, 4, name="other")), 2, 4, ("k", "v"), name="lora"))
    cache = Cache.empty(model)
    with no_grad():
        model(np.array([[3, 1, 2]]), cache=cache)
    add_prefix(model, 5, [3, 1, 2], name="new")
    again = [m.k.data for m in model.front.adapters["new"].layers]
    for layer, k in zip(cache.layers, again):
        assert k.shape[2] == 5 and np.array_equal(layer.k[:, :, :3], k[:, :, :3])
    use_adapter(model, "other")
    add_prefix(model, 3, [3, 1, 2], name="newer")  # now without LoRA
    assert (model.front.adapters["newer"].layers[0].k.data != again[0][:, :, :3]).any()


def test_the_first_numbers():
    """Of each matrix N(0, 0.02^2), as of GPT-2's; of the MLP's table N(0, 1)."""
    plain = add_prefix(make("llama"), 11).front.adapters["default"].layers
    mlp = add_prefix(make("llama"), 11, hidden=99).front.adapters["default"].mlp
    small = [t for m in plain for t in (m.k, m.v)] + [
        mlp.W, *(t for end in mlp.ends for t in (end.W_k, end.W_v))]
    assert [t.data.std() for t in small] == pytest.approx([0.02] * len(small), rel=0.25)
    assert mlp.E.data.std() == pytest.approx(1, rel=0.25)


@given(seed=st.integers(0, 999), p=st.integers(1, 4), T=st.integers(1, 5))
def test_attention_with_a_prefix(seed, p, T):
    """(3) in the first block, and He et al., section 3.1: a head mixes the text with the prefix."""
    model = stir(add_prefix(make("gpt2"), p), seed)
    m, rows = model.blocks[0].attention, model.front.adapters["default"].layers[0]
    x = np.random.default_rng(seed).standard_normal((1, T, C))
    Q, K, V = (ops.split_heads(layer(Tensor(x)), 4).data for layer in (m.q, m.k, m.v))
    P_k, P_v = rows.k.data, rows.v.data
    layer = Cache.of([(rows.k, rows.v)]).layers[0]
    found = m(Tensor(x), cache=layer).data
    joined = [np.concatenate(pair, axis=2) for pair in ((P_k, K), (P_v, V))]
    heads = plain_attention(Q, *joined, causal=True)  # eq. (3)
    close(found, m.o(ops.merge_heads(Tensor(heads))).data, "float64")

    ours, all_ = (np.exp(Q @ k.swapaxes(-1, -2) / 2) for k in (P_k, joined[0]))  # sqrt(D) = 2
    all_ *= np.tri(T, p + T, p, dtype=bool)
    g = ours.sum(-1, keepdims=True) / all_.sum(-1, keepdims=True)
    text, prefix = plain_attention(Q, K, V, causal=True), plain_attention(Q, P_k, P_v)
    close(heads, (1 - g) * text + g * prefix, "float64")


@given(seed=st.integers(0, 999), p=st.integers(1, 4), h=st.integers(1, 7))
def test_the_mlp(seed, p, h):
    """tanh(E W^T + b) W_i^T + b_i, in heads; keys first."""
    model = stir(add_prefix(make("llama"), p, hidden=h, seed=seed), seed)
    prefix = model.front.adapters["default"]
    mlp, pairs = prefix.mlp, prefix.pairs()
    inner = np.tanh(mlp.E.data @ mlp.W.data.T + mlp.b.data)
    for end, pair in zip(mlp.ends, pairs, strict=True):
        for W, b, found in ((end.W_k, end.b_k, pair[0]), (end.W_v, end.b_v, pair[1])):
            expected = (inner @ W.data.T + b.data).reshape(p, 2, 4).transpose(1, 0, 2)[None]
            close(found.data, expected, "float64")
    assert mlp.E.shape == (p, C) and mlp.W.shape == (h, C)


@families
@pytest.mark.parametrize("acts", [True, False])
def test_settling_keeps_the_function(family, acts):
    """Bit for bit; what is kept trains on, if it acts."""
    model, tokens = stir(add_prefix(make(family), 3, hidden=5)), np.arange(8).reshape(2, 4)
    before = model(tokens).data
    if not acts:
        use_adapter(model, None)
    assert settle_prefix(model) is model
    assert model.room == CONTEXT - 3 * acts
    assert len(model.parameters()) == 4 * acts
    assert np.array_equal(use_adapter(model, "default")(tokens).data, before)
    shapes = {path: p.shape for path, p in model.named_parameters()}
    c = CONFIGS[family]
    assert shapes == {f"front.adapters.default.layers.{i}.{kind}": (1, c.kv_heads, 3, c.D)
                      for i in range(2) for kind in "kv"}
    optimizer = AdamW(model.parameters(), lr=0.1)
    ops.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    assert not np.array_equal(model(tokens).data, before)
    with pytest.raises(ValueError, match="there is no prefix 'default' with an MLP"):
        settle_prefix(model)


def test_settling_what_is_not_there():
    for model in (make("gpt2"), add_prefix(make("gpt2"), 3), add_lora(make("gpt2"), 2, 4)):
        with pytest.raises(ValueError, match="there is no prefix 'a' with an MLP"):
            settle_prefix(model, "a")


@pytest.mark.parametrize("settings, text", [
    (dict(ids=[1, 2], hidden=4), "hidden=4: an MLP cannot start from ids"),
    (dict(length=3, hidden=0), "hidden must be at least 1, got 0"),
    (dict(ids=[V]), "but the table has 19 rows"), (dict(length=CONTEXT), "must be 1 to 11")])
def test_what_is_refused(settings, text):
    model = make("gpt2")
    with pytest.raises(ValueError, match=text):
        add_prefix(model, **settings)
    assert len(model.parameters()) == len([*model.named_tensors()])


@families
def test_how_many_numbers(family):
    """2 p K D a layer; with the MLP p C + C h + h and 2 K D (h + 1) a layer."""
    c, p, h = CONFIGS[family], 5, 7
    def count(model): return sum(t.size for t in model.parameters())
    assert count(add_prefix(make(family), p)) == 2 * p * c.kv_heads * c.D * c.layers
    assert count(add_prefix(make(family), p, hidden=h)) == (
        p * C + h * (C + 1) + c.layers * 2 * c.kv_heads * c.D * (h + 1))


def test_gpt3():
    """The LoRA paper counts L d (l_p + l_i): 18.9M for 8 + 8, as keys and values of p = 8 have.

    Its table 4, and the lecture's, have 20.2M for these.
    """
    kv = np.zeros((1, 96, 8, 128), np.float32)
    prefix = Prefix([Rows(kv, kv) for _ in range(96)])
    assert sum(t.size for _, t in prefix.named_tensors()) == 18_874_368 == 96 * 12288 * (8 + 8)
