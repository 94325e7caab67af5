"""Classes and similarities as text, the task of similarity, and the experiment of one model."""

import re
from collections import Counter

import numpy as np
import one_model
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.tasks import Words, similarity
from minilm.data.text_to_text import classified, off, written
from minilm.data.understanding import KINDS
from minilm.measure.verdict import FAILS, HOLDS
from minilm.run import RunDirectory
from minilm.trial import QUICK

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

seeds = st.integers(0, 2**32)
CORPORA = {"low": ("abcd efgh " * 9,), "high": ("STUV WXYZ " * 20,)}


@given(st.floats(0, 5))
def test_similarities_are_those_of_t5(x):
    """One of 26 texts, at most 0.1 away; T5's preprocessor has np.round(x * 5) / 5 as "%.1f"."""
    assert written(x) == f"{np.round(x * 5) / 5:.1f}"
    assert abs(float(written(x)) - x) <= 0.1 + 1e-9
    assert written(x) in {f"{n / 5:.1f}" for n in range(26)}


@pytest.mark.parametrize("x", [-0.1, 5.1, float("nan")])
def test_what_is_no_similarity_is_refused(x):
    with pytest.raises(ValueError, match="a similarity lies between 0 and 5, got"):
        written(x)


@given(seeds, st.integers(0, 24), st.integers(2, 9))
def test_a_similarity_counts_equal_places(seed, first, size):
    words = Words(chr(97 + first), "z", size, size)
    record = similarity(np.random.default_rng(seed), words)
    a, b = record.context.split()
    assert len(a) == len(b) == size and {*a, *b} <= {*map(chr, range(97 + first, 123))}
    assert record.output == written(5 * sum(x == y for x, y in zip(a, b)) / size)


def test_similar_and_different_words_come_equally_often():
    rng, words = np.random.default_rng(0), Words("a", "h", 4, 4)
    counts = Counter(similarity(rng, words).output for _ in range(2000))
    assert {*counts} == {"0.0", "1.2", "2.4", "3.8", "5.0"} and min(counts.values()) > 330
    assert similarity(rng, Words("a", "a")).output == "5.0"  # there is no other letter


@given(st.integers(0, 25).map(lambda n: n / 5), st.text("0123456789.-+e n", max_size=5))
def test_how_far_off_an_answer_is(right, said):
    record, distance = data.Record("Similarity", "ab ab", written(right)), max(right, 5 - right)
    if re.fullmatch(r"[0-4](\.\d+)?|5(\.0+)?", said):
        distance = abs(float(said) - right)
    assert abs(off(record, said) - distance) < 1e-6
    assert off(record, record.output) == 0


@pytest.mark.parametrize("said", ["", "nan", "inf", "5.2", "-1.0", "3.8 ", "3.", "1e0", "٣.٨"])
def test_what_is_no_number_of_the_scale_is_as_far_off_as_can_be(said):
    assert off(data.Record("Similarity", "ab ab", "1.2"), said) == 3.8


@given(st.sampled_from([task for task, kind in KINDS.items() if not kind.grades]), seeds)
def test_classes_are_written_as_words(task, seed):
    examples = data.make_examples(task, CORPORA, 10, 20, seed)
    classes = data.classes_of(task, CORPORA)
    for example, record in zip(examples, classified(examples, classes, "Kind"), strict=True):
        assert record.output == classes[example.label] and record.task == "kind"
        assert record.context.split("\n") == [*example.texts]
        assert data.score(record, record.output) and not data.score(record, "other")


# The experiment


def trial(**changes):
    return one_model.Together(**QUICK | {"method": "full", "train": 40, "test": 4, "batch": 5,
                                         "steps": 80} | changes)


def test_one_model_and_a_model_a_task_see_the_same_tokens(tmp_path, monkeypatch):
    """Each record as often, in all: 400 rows of 200 records."""
    seen, known = {}, []

    def looks(model, batches, s, run, title):
        counts = seen.setdefault(title.partition(",")[0], Counter())
        for step in range(s.steps):
            counts.update(row[row > 0].tobytes() for row in batches[step][0])
        known.append(s.steps)

    monkeypatch.setattr(one_model, "taught", looks)
    for apart in (False, True):
        (folder := tmp_path / str(apart)).mkdir()
        found = one_model.measured(trial(apart=apart), RunDirectory(folder), str(apart))
        assert {*one_model.MEASURES} <= {*found}
    assert known == [80] + [16] * 5
    assert seen["False"] == seen["True"] and {*seen["True"].values()} == {2}


def test_the_full_run_learns_each_record_four_times():
    s = one_model.Together(**one_model.ARMS[one_model.ONE])
    assert s.steps * s.batch == 4 * len(s.tasks) * s.train and s.steps % len(s.tasks) == 0


def test_a_task_is_named_by_its_instruction_and_held_out_texts_are_asked():
    records = one_model.records_of(trial())
    for task, (learn, ask) in records.items():
        assert len(learn) == 40 and len(ask) == 4
        assert {r.task for r in learn + ask} == {task} and len({r.instruction for r in learn}) == 1
        assert not {data.prompt(r) for r in learn} & {data.prompt(r) for r in ask}
    assert Counter(r.output for r in records["kind"][1]) == {"text": 2, "code": 2}


def test_the_best_constant_is_the_median():
    made = [data.Record("S", "a b", said) for said in ("0.0", "1.0", "5.0")]
    assert one_model.best_constant(made) == 5 / 3
    assert all(np.mean([off(r, f"{n / 5:.1f}") for r in made]) >= 5 / 3 for n in range(26))


def test_the_claims_can_fail():
    def rows(one, each, off_by=(0.5, 1.0)):
        return [{"arm": arm, "seed": seed, one_model.RIGHT: x + seed, one_model.OFF: off_by[0],
                 one_model.BAR: off_by[1] + seed} for seed in (0, 1)
                for arm, x in ((one_model.ONE, one), (one_model.EACH, each))]

    (claim, *_), nearer = one_model.CLAIMS.values(), one_model.nearer
    assert claim(rows(80, 82)).verdict == HOLDS and claim(rows(70, 82)).verdict == FAILS
    assert nearer(rows(1, 1, (0.1, 9))).verdict == HOLDS
    assert nearer(rows(1, 1, (9, 0.1))).verdict == FAILS


def test_what_is_said_is_judged_by_the_task():
    def pair(grade): return data.Record("Similarity", f"ab {grade}", grade, task="similarity")
    def kind(name, number): return data.Record("Kind", f"{number}", name, task="kind")
    asked = {"kind": [kind("text", 0), kind("text", 1), kind("code", 2), kind("code", 3)],
             "similarity": [pair("1.0"), pair("3.0"), pair("5.0")]}
    said = dict(zip([*asked["kind"], *asked["similarity"]],
                    ["text", "text", "code", "text", "1.0", "high", "3.0"]))
    found = one_model.judged(asked, said)
    assert (found["kind, %"], found["similarity, %"]) == (75, pytest.approx(100 / 3))
    assert found[one_model.MATTHEWS] == pytest.approx(100 / 3**0.5)
    assert found[one_model.PEARSON] == pytest.approx(
        100 * np.corrcoef([1, 0, 3], [1, 3, 5])[0, 1])  # "high" is taken for 0, the farther end
    assert found[one_model.OFF] == pytest.approx((0 + 3 + 2) / 3)
