"""Attention dropout: which weights it leaves out, when, and that a training step is PyTorch's."""

import math

import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.attention import plain_attention
from minilm.graph import no_dropout
from minilm.seq2seq import T5, EncoderDecoder
from minilm.tensor import Tensor, randomness
from minilm.train import LabelLoss
from minilm.transformer import Config, Transformer, drop_attention

SHAPE = dict(vocab_size=13, context=12, layers=4, heads=4, width=16)
CONFIGS = {"gpt2": Config.gpt2(**SHAPE), "llama": Config.llama(**SHAPE, hidden=24, kv_heads=2),
           "bert": Config.bert(**SHAPE, hidden=24)}
seeds = st.integers(0, 2**32 - 1)


def make(family, p, dtype="float64"):
    return drop_attention(Transformer(CONFIGS[family], seed=1).astype(dtype), p).train()


def draw(seed=0, B=3, T=9):
    tokens = np.random.default_rng(seed).integers(0, 13, (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:]


def logits(model, tokens, seed):
    with randomness(np.random.default_rng(seed)):
        return model(tokens)


def learned(model, seed=5):
    """The loss of a training step, and every gradient."""
    tokens, targets = np.where(draw(0)[0] == 0, 1, draw(0)[0]), draw(0)[1]
    for p in model.parameters():
        p.grad = None
    with randomness(np.random.default_rng(seed)):
        loss = ops.cross_entropy(model(tokens), targets)
    loss.backward()
    return float(loss.data), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", CONFIGS)
def test_off_it_is_nothing(family):
    """At p = 0, in eval() and under no_dropout: the bits of the model without, and no draw."""
    tokens, _ = draw()
    plain = Transformer(CONFIGS[family], seed=1).train()(tokens).data
    model = make(family, 0.4, "float32")
    assert (model.eval()(tokens).data == plain).all()
    with no_dropout():
        assert (model.train()(tokens).data == plain).all()
    assert (logits(model, tokens, 0).data != plain).any()
    with pytest.raises(ValueError, match="dropout needs a generator"):
        model(tokens)
    assert (drop_attention(model, 0.0)(tokens).data == plain).all()


@given(seed=seeds, family=st.sampled_from(sorted(CONFIGS)))
def test_a_seed_gives_the_same_bits(seed, family):
    model, (tokens, _) = make(family, 0.5, "float32"), draw()
    one, again = (logits(model, tokens, seed).data for _ in range(2))
    assert (one == again).all() and (one != logits(model, tokens, seed + 1).data).any()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_checkpointing_repeats_the_same_weights(family, every):
    model = make(family, 0.3, "float32")
    loss, grads = learned(model)
    model.checkpoint_every = every
    again, same = learned(model)
    assert loss == again and all((grads[name] == same[name]).all() for name in grads)


@given(seed=seeds, family=st.sampled_from(sorted(CONFIGS)))
def test_the_gradient_is_the_slope(seed, family):
    """In float64, along a random direction of all parameters, with the same weights left out."""
    model, rng, t = make(family, 0.3), np.random.default_rng(seed), 1e-4
    _, grads = learned(model, seed)
    params = [p for p in model.named_parameters() if grads[p[0]] is not None]
    ways = {name: 0.02 * rng.standard_normal(p.shape) for name, p in params}  # as the weights
    slope = sum((grads[name] * way).sum() for name, way in ways.items())
    losses = []
    for step in (t, -2 * t):
        for name, p in params:
            p.data += step * ways[name]
        losses.append(learned(model, seed)[0])
    assert abs((losses[0] - losses[1]) / (2 * t) - slope) < 1e-6 * max(1, abs(slope))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_layer_is_pytorchs_with_the_same_weights_left_out(dtype):
    """Values and gradients; 16 bits are widened, and 1 / (1 - p) is not rounded to them."""
    p, (x,) = 0.3, np.random.default_rng(2).standard_normal((1, 2, 70, 16))
    layer = make("llama", p, dtype).blocks[0].attention
    seen = []
    with pytest.MonkeyPatch.context() as patch, randomness(np.random.default_rng(3)):
        def spied(q, k, v, **given):
            seen.extend([q.data, k.data, v.data, given["drop"], given["causal"]])
            return ops.attention(q, k, v, **given)
        patch.setattr("minilm.block.ops", type("", (), vars(ops) | {"attention": spied}))
        layer(ops.add(x.astype(layer.q.weight.dtype), 0.0))
    q, k, v, drop, causal = seen
    assert drop.shape == (2, 4, 70, 70) and causal
    assert drop.dtype == ("float64" if dtype == "float64" else "float32")
    kept = np.random.default_rng(3).random(drop.shape, dtype=np.float32) >= p
    close(drop, kept / (1 - p), drop.dtype)
    given = [Tensor(a, requires_grad=True) for a in (q, k, v)]
    y = ops.attention(*given, causal=True, drop=drop)
    dy = np.random.default_rng(4).standard_normal(y.shape).astype(y.dtype)
    y.backward(dy)
    theirs = [torch.tensor(a.astype("float64"), requires_grad=True) for a in (q, k, v)]
    scores = theirs[0] @ theirs[1].repeat_interleave(2, 1).mT / 2
    hidden = torch.ones(70, 70, dtype=bool).triu(1)
    P = scores.masked_fill(hidden, -math.inf).softmax(-1) * torch.tensor(drop.astype("float64"))
    expected = P @ theirs[2].repeat_interleave(2, 1)
    expected.backward(torch.tensor(dy.astype("float64")))
    close(y.data, expected.detach().numpy(), dtype)
    for ours, other in zip(given, theirs):
        close(ours.grad, other.grad.numpy(), dtype)


@given(p=st.floats(0.05, 0.6), seed=seeds)
def test_on_average_it_is_attention(p, seed):
    """Over many draws the mean comes within six standard errors of attention without dropout."""
    rng, n = np.random.default_rng(seed), 4000
    q, k, v = rng.standard_normal((3, 1, 1, 6, 4))
    ones = np.ones((n, 1, 6, 6))
    drop = ops.dropout(ones, p, rng).data
    y = ops.attention(*(x.repeat(n, 0) for x in (q, k, v)), drop=drop).data
    error = y.mean(0) - plain_attention(q, k, v)[0]
    assert (np.abs(error) <= 6 * y.std(0) / math.sqrt(n) + 1e-12).all()
    assert abs((drop == 0).mean() - p) <= 6 * math.sqrt(p * (1 - p) / drop.size)


@pytest.mark.parametrize("p", [1.0, -0.1, math.nan, "x"])
def test_what_is_no_share_is_refused(p):
    with pytest.raises((ValueError, TypeError), match="p must be"):
        make("gpt2", p)


def test_another_kind_of_model_is_refused():
    model = EncoderDecoder(T5(13, layers=1, decoder_layers=1, heads=2, width=8, head_width=4,
                              hidden=8))
    with pytest.raises(TypeError, match="is for a Transformer, not EncoderDecoder"):
        drop_attention(model, 0.1)


def test_a_masks_padding_stays_hidden():
    """What is padded decides nothing, with the same weights left out."""
    model, tokens, targets = make("bert", 0.3), draw()[0], draw(1)[1]
    mask = np.ones_like(tokens)
    mask[:, 6:] = 0
    with randomness(np.random.default_rng(1)):
        one = LabelLoss()(model, tokens, np.where(mask, targets, -100), mask).data
    tokens[:, 6:] = 3
    with randomness(np.random.default_rng(1)):
        other = LabelLoss()(model, tokens, np.where(mask, targets, -100), mask).data
    assert one == other
