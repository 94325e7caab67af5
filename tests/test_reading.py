"""scripts/experiments/retrieval.py: what stands beside a question, what a model is tuned on, and
the numbers of answers that are known."""

from dataclasses import replace

import numpy as np
import pytest
import retrieval
from hypothesis import given
from hypothesis import strategies as st
from retrieval import (
    ACTS,
    BOTH,
    FOUND,
    KNOWS,
    MEASURES,
    OF,
    SHOWN,
    Reading,
    asked_of,
    measured,
    people,
    rows_to_tune_on,
)

from minilm import data, loop, trial
from minilm.data.facts import WORDINGS, as_json, plain
from minilm.run import RunDirectory

TINY = Reading(batch=4, steps=3, warmup=1, workers=1, train=12, test=3, method="full", save_every=2,
               lr=0.1)
BYTES = data.ByteTokenizer()


def written(rows) -> list[str]:
    """The texts of rows, each with its last token."""
    return [BYTES.decode([*tokens, targets[-1]]) for tokens, targets in rows]


@given(seed=st.integers(0, 99), shown=st.sampled_from(
    ["nothing", "example", "retrieved", "right", "wrong"]))
def test_what_stands_beside_a_question(seed, shown):
    s = replace(TINY, seed=seed, shown=shown)
    others, _, new = people(s)
    found = asked_of(s)
    assert [q.fact for q in found] == [fact for fact in new for _ in range(3)]
    for q in found:
        assert q.fact.name in q.record.instruction
        assert len(data.prompt(q.record) + q.record.output) <= 128  # the smallest model's context
        if shown in ("nothing", "example"):
            assert q.shown is None and not q.record.context
        else:
            assert q.record.context in [q.shown.text(i) for i in range(4)]
        if shown in ("right", "wrong"):
            assert (q.shown == q.fact) == (shown == "right")
        if shown == "example":
            assert others[0].name in q.record.instruction and '"}\n' in q.record.instruction
        assert as_json(q.record.task, getattr(q.fact, q.record.task)) == q.record.output


@given(seed=st.integers(0, 99))
def test_all_arms_are_asked_the_same(seed):
    kinds = [asked_of(replace(TINY, seed=seed, shown=shown, tuned=tuned))
             for shown in ("nothing", "retrieved", "wrong") for tuned in ("nothing", "questions")]
    assert all([q.record.instruction for q in kind] == [q.record.instruction for q in kinds[0]]
               for kind in kinds)


@given(seed=st.integers(0, 99), tuned=st.sampled_from(["form", "texts", "questions"]))
def test_what_a_model_is_tuned_on(seed, tuned):
    s = replace(TINY, seed=seed, tuned=tuned)
    others, told, new = people(s)
    texts = written(rows_to_tune_on(s, BYTES))
    of = {who: [text for text in texts if any(fact.name in text for fact in facts)]
          for who, facts in (("others", others), ("told", told), ("new", new))}
    if tuned == "form":
        assert len(of["others"]) == len(texts) and not of["new"]
        assert all('-> {"' in text and text.count("\n") == 2 for text in texts)
        return
    assert not of["others"]
    answered = {who: sum("->" in text for text in found) for who, found in of.items()}
    assert answered["told"] == 3 * 3 * (WORDINGS - 1)  # people, kinds
    assert answered["new"] == (answered["told"] if tuned == "questions" else 0)
    assert all(fact.text(i) in of["new"] for fact in new for i in range(4))
    heard = {q.record.instruction for q in asked_of(s)}
    assert not any(question in text for text in texts for question in heard)


def run_in(path):
    path.mkdir(parents=True)
    return RunDirectory(path)


@pytest.mark.parametrize("shown, form, expected", [
    ("right", plain, {KNOWS: 100, ACTS: 0, BOTH: 0, FOUND: 100, SHOWN: 100}),
    ("right", as_json, {KNOWS: 100, ACTS: 100, BOTH: 100, FOUND: 100, SHOWN: 100}),
    ("wrong", plain, {KNOWS: 0, ACTS: 0, BOTH: 0, FOUND: 0, SHOWN: 100}),
    ("nothing", as_json, {KNOWS: 100, ACTS: 100, BOTH: 100, FOUND: 0, SHOWN: 0})])
def test_numbers_of_one_who_says_what_is_shown(tmp_path, monkeypatch, capsys, shown, form,
                                               expected):
    """If nothing is shown, it says the right value."""
    s = replace(TINY, shown=shown, seed=5)
    said = [form(q.record.task, getattr(q.shown or q.fact, q.record.task)) for q in asked_of(s)]
    monkeypatch.setattr(retrieval, "tuned", lambda s, folder: (None, None))
    monkeypatch.setattr(retrieval, "answers", lambda *rest: said)
    found = measured(s, run_in(tmp_path / "a"), "the arm")
    if shown == "wrong":  # two people may have the same trade
        expected = expected | {KNOWS: found[KNOWS]}
        assert found[KNOWS] < 30
    kinds = [found.pop(name) for name in OF.values()]
    assert np.mean(kinds) == pytest.approx(found[KNOWS])
    assert kinds[1:] == [100 * (shown != "wrong")] * 2  # city and dog
    assert found == expected and {*found, *OF.values()} == {*MEASURES}
    shown_text = capsys.readouterr().out
    assert "the arm:" in shown_text and asked_of(s)[0].record.instruction in shown_text
    assert f"-> {said[0]}" in shown_text


def test_arms_share_their_models_and_do_not_change_them(tmp_path):
    arms = [replace(TINY, seed=6, tuned=tuned, shown=shown, steps=0 if tuned == "nothing" else 3)
            for tuned in ("nothing", "texts") for shown in ("nothing", "right")]
    first, _ = retrieval.tuned(replace(arms[0], shown="nothing"), tmp_path)
    before = {name: array.copy() for name, array in first.state_dict().items()}
    for i, s in enumerate(arms):
        measured(s, run_in(tmp_path / str(i)), "")
    assert all((first.state_dict()[name] == array).all() for name, array in before.items())
    again, _ = retrieval.tuned(replace(arms[1], shown="nothing"), tmp_path)
    assert again is first
    other, _ = retrieval.tuned(replace(arms[2], shown="nothing"), tmp_path)
    assert any((other.state_dict()[name] != array).any() for name, array in before.items())


@pytest.mark.parametrize("killed_at, begun_again", [
    (("reader-5", 3), [("reader-5", 2), ("form-5", 0)]),
    (("form-5", 3), [("reader-5", 0), ("form-5", 2)])])
def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch, killed_at, begun_again):
    s = replace(TINY, seed=5, tuned="form", shown="right", steps=5)
    expected, _ = retrieval.tuned(s, run_in(tmp_path / "whole").path)
    begun, killed = [], []

    def fit(*args, title, **settings):
        for trainer, done in loop.fit(*args, title=title, **settings):
            if not done.targets:
                begun.append((title, done.step))
            yield trainer, done
            if (title, done.step) == killed_at and not killed:
                killed.append(True)
                raise SystemExit("killed")

    run = run_in(tmp_path / "killed")
    monkeypatch.setattr(trial, "fit", fit)
    with pytest.raises(SystemExit):
        retrieval.tuned(s, run.path)
    retrieval.reader.cache_clear()  # as in a new process
    found, _ = retrieval.tuned(s, run.path)
    assert begun[-2:] == begun_again
    for name, array in expected.state_dict().items():
        np.testing.assert_array_equal(found.state_dict()[name], array)
    assert [*run.path.iterdir()] == []
