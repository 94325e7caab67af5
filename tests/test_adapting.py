"""What any method may learn with: attention dropout and weight decay."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from minilm.adapting import METHODS, Adapting, optimizer_and_loss, prepared
from minilm.peft import trainable_parameters
from minilm.transformer import Config, Transformer
from minilm.trial import Trial

CONFIG = Config.gpt2(13, 24, layers=2, heads=2, width=8)


def settings(method, **changes):
    """A program's settings, of which these are a part."""
    s = vars(Adapting(method, r=2, length=3, m=2, **changes))
    return SimpleNamespace(**s, lr=0.01, steps=10, seed=0, model="here")


def learner(method, **changes):
    s = settings(method, **changes)
    model = prepared(Transformer(CONFIG, seed=1), s)
    return model, optimizer_and_loss(model, s)[0]


@pytest.mark.parametrize("method", METHODS)
def test_without_a_decay_nothing_moves_or_is_reordered(method):
    model, optimizer = learner(method)
    assert all(a is b for a, b in zip(optimizer.flat.params, trainable_parameters(model),
                                      strict=True))
    assert optimizer.weight_decay == 0


@pytest.mark.parametrize("method", sorted({*METHODS} - {"bitfit", "ia3", "subspace"}))
def test_the_decay_is_of_matrices_alone(method):
    """With gradients of 0 a step multiplies each matrix by 1 - lr decay, and leaves the rest."""
    model, optimizer = learner(method, weight_decay=0.5)
    optimizer.flat.present[...] = True
    optimizer.flat.data += 1  # LoRA's B begins at 0
    before = [p.data.copy() for p in model.parameters()]
    optimizer.update_all(1, 0.01)
    trained = {id(p) for p in trainable_parameters(model)}
    for p, old in zip(model.parameters(), before, strict=True):
        factor = 1 - 0.01 * 0.5 if p.ndim >= 2 and id(p) in trained else 1
        np.testing.assert_allclose(p.data, old * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["bitfit", "ia3"])
def test_a_decay_of_no_matrix_is_refused(method):
    said = f"weight_decay is 0.1, but it is for matrices, and {method} trains none"
    with pytest.raises(ValueError, match=said):
        learner(method, weight_decay=0.1)
    assert "weight_decay" in METHODS[method].without


def test_a_subspace_has_no_decay():
    with pytest.raises(ValueError, match=r"weight_decay is 0\.1, but a subspace has none"):
        learner("subspace", weight_decay=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_attention_dropout_reaches_every_block(method):
    model, _ = learner(method, attention_dropout=0.25)
    assert [block.attention.dropout for block in model.blocks] == [0.25, 0.25]
    assert "attention_dropout" not in METHODS[method].without


@pytest.mark.parametrize("change, said", [
    ({"attention_dropout": 1.0}, "attention_dropout must be"),
    ({"attention_dropout": -0.1}, "attention_dropout must be"),
    ({"weight_decay": -1.0}, "weight_decay must be"),
    ({"weight_decay": float("nan")}, "weight_decay must be")])
def test_what_is_out_of_range_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(Trial(), **change)
