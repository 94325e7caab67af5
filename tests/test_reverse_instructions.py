"""scripts/experiments/reverse_instructions.py: its records, and both of its scores."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reverse_instructions as experiment
from hypothesis import given
from hypothesis import strategies as st
from reverse_instructions import ARMS, EXACT, FORWARD, TASKS, TRIP, Reverse, drawn, measured

from minilm import data

SMALL = Reverse(train=30, test=8, workers=1)
RULES = {"Reverse": lambda word: word[::-1], "Upper": str.upper,
         "Sort": lambda word: "".join(sorted(word))}


@given(seed=st.integers(0, 99))
def test_no_answer_that_is_asked_about_is_learned_from(seed):
    s = replace(SMALL, seed=seed)
    learn, ask = drawn(s)
    assert [r.task for r in learn] == [task for task in TASKS for _ in range(30)]
    assert [r.task for r in ask] == [task for task in TASKS for _ in range(8)]
    for task in TASKS:
        learned, asked = ([r.output for r in part if r.task == task] for part in (learn, ask))
        assert len({*asked}) == 8 and not {*learned} & {*asked}
    tables = [{r.context for r in part if r.task == "table"} for part in (learn, ask)]
    assert not tables[0] & tables[1]
    assert drawn(s) == (learn, ask) != drawn(replace(s, seed=seed + 1))


def test_answers_have_one_question_or_several():
    learn, ask = drawn(replace(SMALL, train=1000, test=60))
    sides = {}
    for record in learn + ask:
        if record.instruction in RULES:
            assert RULES[record.instruction](record.context) == record.output
        sides.setdefault(record.task, []).append(record)
    tables, backwards, capitals, _ = sides.values()
    assert not any([*r.output] == sorted(r.output) for r in backwards)  # it would be Sort's, too
    assert len({r.context for r in tables}) == 384 and len(tables) == 3 * 384 - 2 * 60
    assert len({r.output for r in tables}) == len(tables)
    for record in tables:
        name, price, food = record.context.split(" | ")
        assert len({record.output, *record.references}) == 3
        for sentence in (record.output, *record.references):
            assert all(word in sentence for word in (name, price, food))
    letters = "".join(r.context for r in capitals)
    assert 0.45 < np.mean([c.isupper() for c in letters]) < 0.55


def test_records_fit_the_rows_of_the_default_model():
    learn, ask = drawn(replace(SMALL, train=1000, test=60))
    both = learn + ask + [*map(data.swap, learn + ask)]
    data.encode(both, data.ByteTokenizer(), context=128)  # raises if one does not


def test_all_arms_of_a_seed_share_a_forward_model():
    def settings(arm, **more):
        return experiment.forwards(Reverse(**ARMS[arm], **more))
    assert len({settings(arm, model="a", seed=3) for arm in ARMS}) == 1
    one = settings("base", model="a", seed=3)
    assert one.method == "full" and one.steps == Reverse.steps and one.seed == 3
    assert settings("base").steps == 4  # of a quick run
    assert settings("full", model="b") != settings("full", model="a")


def wise(model, records, tokenizer):
    """What a model says that knows the rules; backwards it is sure of a right question, but it is
    another one if there are several."""
    said = []
    for record in records:
        if record.instruction == "Describe":
            said.append(experiment.SENTENCES[0].format(*record.context.split(" | ")))
        elif record.instruction in RULES:
            said.append(RULES[record.instruction](record.context))
        elif record.instruction != data.ASKED:
            said.append("?")
        elif record.output.startswith(("Sort", "Upper")):
            instruction, word = record.output.split("\n")
            word = word[::-1] if instruction == "Sort" else word.swapcase()
            said.append(f"{instruction}\n{word}")
        else:
            said.append(record.output)
    return said


@pytest.fixture
def wise_model(monkeypatch):
    monkeypatch.setattr(experiment, "base", lambda folder: (None, None))
    monkeypatch.setattr(experiment, "learned", lambda model, *rest: (model, 7, 0.0))
    monkeypatch.setattr(experiment, "answers", wise)
    experiment.forward.cache_clear()
    yield
    experiment.forward.cache_clear()


def test_the_letters_miss_what_the_round_trip_finds(wise_model, capsys):
    found = measured(SMALL, SimpleNamespace(), "wise, seed 0")
    assert found[TRIP] == found[FORWARD] == 100 and found["trained parameters"] == 7
    assert [found[f"{task}: {EXACT}"] for task in TASKS[:3]] == [100, 100, 0]
    palindromes = [r.context == r.context[::-1] for r in drawn(SMALL)[1] if r.task == "sort"]
    assert found[f"sort: {EXACT}"] == 100 * np.mean(palindromes)
    assert found[EXACT] == pytest.approx(np.mean([found[f"{task}: {EXACT}"] for task in TASKS]))
    shown = capsys.readouterr().out.splitlines()
    record = next(r for r in drawn(SMALL)[1] if r.task == "sort")
    assert len(shown) == 1 + 2 * len(TASKS)
    assert f"    {record.output} <- Sort {record.context[::-1]} -> {record.output}" in shown


def test_another_question_or_none_is_wrong(wise_model, monkeypatch):
    def lost(model, records, tokenizer):
        return [("" if i % 2 else "Add\n1+1") if record.instruction == data.ASKED else said
                for i, (record, said) in enumerate(zip(records, wise(model, records, tokenizer)))]

    monkeypatch.setattr(experiment, "answers", lost)
    found = measured(SMALL, SimpleNamespace(), "lost")
    assert found[TRIP] == found[EXACT] == 0 and found[FORWARD] == 100


def test_the_gap_is_judged_by_the_slides_arm():
    def row(seed, arm, trip):
        return {"seed": seed, "arm": arm, f"sort: {TRIP}": trip, f"sort: {EXACT}": 10}
    rows = [row(seed, arm, trip) for seed in range(3)
            for arm, trip in [(experiment.CARD, 80 + seed), ("full", 10)]]
    judge = experiment.gap("sort", at_least=30)
    assert judge(rows).verdict == "holds" and judge(rows).mean == pytest.approx(71)
    assert experiment.gap("sort", at_most=30)(rows).verdict == "does not hold"
