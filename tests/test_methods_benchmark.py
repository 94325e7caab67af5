"""bench/methods.py: both sides train as many numbers, and a step of each moves them (peers)."""

import methods
import pytest
from contenders import Shape

TINY = Shape(layers=2, heads=2, width=16, context=12, batch=2, vocab=23)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", methods.METHODS)
def test_both_sides_do_the_same_work(monkeypatch, method):
    pytest.importorskip("peft")
    ours, theirs = methods.our_model(method, TINY), methods.their_model(method, TINY)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.size for p in ours.parameters()) == sum(p.numel() for p in trained) > 0
    monkeypatch.setattr(methods, "timed", lambda step: iter([step()]))
    monkeypatch.setattr(methods, "CORES", 1)
    before = {id(p): p.data.copy() for p in ours.parameters()}
    monkeypatch.setattr(methods, "our_model", lambda method, shape: ours)
    monkeypatch.setattr(methods, "their_model", lambda method, shape: theirs)
    began = [p.detach().clone() for p in trained]
    next(methods.our_step(method, TINY, True))
    loss = next(methods.their_step(method, TINY))
    assert 2.9 < loss < 4.5  # ln 23 and AdaLoRA's orthogonal loss
    assert any((p.data != before[id(p)]).any() for p in ours.parameters())
    assert any((p != old).any() for p, old in zip(trained, began))
