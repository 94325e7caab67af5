"""Faults of instruction data, and scripts/experiments/instruction_data.py."""

from dataclasses import replace
from types import SimpleNamespace

import instruction_data as experiment
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.faults import FORMATS, in_any_format, in_formats, unclear, with_wrong_answers
from minilm.data.wordings import done, meaning

seeds = st.integers(0, 999)
shares = st.floats(0, 1)


def records(count: int, kinds=("a", "b")) -> list[data.Record]:
    """So many records, with an output of their own each."""
    return [data.Record("Say", f"{i}", f"{i}{kinds[i % len(kinds)]}", task=kinds[i % len(kinds)])
            for i in range(count)]


@given(st.integers(4, 40), shares, seeds)
def test_a_share_of_the_answers_is_wrong_and_looks_right(count, share, seed):
    clean = records(count)
    found = with_wrong_answers(clean, share, seed)
    changed = [(a, b) for a, b in zip(clean, found, strict=True) if a != b]
    assert len(changed) == round(share * count)
    for record, wrong in changed:
        assert replace(wrong, output=record.output) == record
        assert wrong.output in [r.output for r in clean if r.task == record.task and r != record]


@given(seeds)
def test_a_reference_is_not_wrong(seed):
    one, other = data.Record("Say", "x", "1", ("2",), "t"), data.Record("Say", "y", "2", task="t")
    third = data.Record("Say", "z", "3", task="t")
    assert with_wrong_answers([one, other, third], 1, seed)[0].output == "3"
    with pytest.raises(ValueError, match="task 't' has no output that is wrong for"):
        with_wrong_answers([one, one, one], 0.4, seed)


@given(st.integers(0, 30), seeds)
def test_an_answer_in_any_format_is_right_and_no_other(count, seed):
    clean = records(count)
    mixed = in_formats(clean, seed)
    for record, written in zip(clean, mixed, strict=True):
        assert replace(written, output=record.output) == record
        assert data.score(in_any_format(record), written.output)
        assert not data.score(in_any_format(record), written.output + "!")
        assert data.score(record, written.output) == (written.output == record.output)


def test_every_format_comes_about_equally_often():
    clean = [data.Record("Say", "x", "y")] * 4000
    mixed = [record.output for record in in_formats(clean, 1)]
    for text in FORMATS:
        assert 900 < mixed.count(text.format("y")) < 1100


@given(st.integers(0, 40), shares, seeds)
def test_a_share_of_the_instructions_says_nothing(count, share, seed):
    clean = records(count)
    found = unclear(clean, share, seed)
    changed = [(a, b) for a, b in zip(clean, found, strict=True) if a != b]
    assert len(changed) == round(share * count)
    assert all(b == replace(a, instruction="do it") for a, b in changed)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("planted", [with_wrong_answers, unclear])
def test_no_share_is_refused(planted, share):
    with pytest.raises(ValueError, match="a share must lie between 0 and 1, got"):
        planted(records(4), share, 0)


# The experiment


def set_of(arm: str, **own):
    return experiment.records(experiment.Dataset(**experiment.ARMS[arm] | {"seed": 3} | own))


def test_the_sets_differ_in_their_fault_alone():
    clean, test = set_of(experiment.CLEAN)
    sets = {arm: set_of(arm)[0] for arm in experiment.ARMS}
    assert all(set_of(arm)[1] == test for arm in experiment.ARMS)
    assert {arm: len(own) for arm, own in sets.items()} == dict.fromkeys(
        experiment.ARMS, 2000) | {experiment.SMALL: 250, experiment.REST: 1400}
    assert sets[experiment.SMALL] == clean[:250]
    wrong = [a != b for a, b in zip(clean, sets[experiment.SPOILED])]
    assert sum(wrong) == 600
    assert sets[experiment.REST] == [r for r, spoiled in zip(clean, wrong) if not spoiled]
    assert [r.context for r in sets[experiment.NARROW]] == [r.context for r in clean]
    assert {r.task for r in sets[experiment.NARROW]} == {"reverse"}
    assert sum(r.instruction == "do it" for r in sets[experiment.VAGUE]) == 1000
    for record in clean + test:
        assert done(meaning(record.instruction), record.context) == record.output
    assert not {r.context for r in clean} & {r.context for r in test}


def test_answers_count_in_any_format_and_the_wanted_one_apart(monkeypatch):
    limits = []

    def answers(model, own, tokenizer):
        limits.append(max(len(record.output) for record in own))
        return [FORMATS[i % 2].format(record.output) if record.task != "sort" else "wrong"
                for i, record in enumerate(own)]

    monkeypatch.setattr(experiment, "learned", lambda model, *rest: (model, 0, 0.0))
    monkeypatch.setattr(experiment, "base", lambda folder: (None, None))
    monkeypatch.setattr(experiment, "loss_of_answers", lambda *_: 1.0)
    monkeypatch.setattr(experiment, "answers", answers)
    found = experiment.measured(experiment.Dataset(n=12, test=10), SimpleNamespace(), "")
    assert limits == [len("Answer: abcdabcd")]  # there is room for every format
    assert found[experiment.RIGHT] == 75 and found[experiment.ALONE] == 37.5
    assert found[experiment.OWN] == 100 and found[experiment.LEARNED] == 12
