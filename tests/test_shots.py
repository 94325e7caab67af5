"""Demonstrations: rows and questions, what they tell at best, and the experiment about them."""

from collections import Counter
from dataclasses import replace
from itertools import product

import in_context as experiment
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_context import CHANGED, CLAIMS, LOSS, ONE, OTHER, RIGHT, SHOWN, TWO, InContext

from minilm.data import IGNORED, ByteTokenizer, shots
from minilm.data.shots import (
    ALPHABET,
    ASKED,
    KINDS,
    NAMED,
    SHOTS,
    ShotBatches,
    draw_pairs,
    draw_task,
    make_questions,
    prompt_of,
    row,
    rows_of_questions,
    translated,
)
from minilm.measure.ideal import fitting_maps, ideal
from minilm.measure.verdict import FAILS, HOLDS
from minilm.run import RunDirectory

TOKENIZER = ByteTokenizer()
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(KINDS)


def pairs_in(tokens, targets):
    """The pairs of a row, and the text that counts in it."""
    text = TOKENIZER.decode(np.append(tokens[:1], [*tokens[1:], *targets[-1:]]))
    assert text.endswith("\n")
    counted = TOKENIZER.decode(targets[targets != IGNORED])
    return [tuple(line.split(">")) for line in text.splitlines()], counted


@given(seed=seeds, step=st.integers(0, 10**6), count=st.integers(0, 9), kind=kinds)
def test_a_row_is_of_one_task_and_its_answers_count(seed, step, count, kind):
    batches = ShotBatches(lambda rng: draw_task(rng, [kind]), TOKENIZER, 3, seed, count)
    tokens, targets = batches[step]
    assert tokens.shape == targets.shape == (3, 8 * (count + 1) - 1)
    for tokens_of, targets_of in zip(tokens, targets):
        pairs, counted = pairs_in(tokens_of, targets_of)
        assert counted == "".join(f"{answer}\n" for _, answer in pairs)
        asked = [word for word, _ in pairs]
        assert len({*asked}) == count + 1 and not {*asked} & {*ASKED}
        if kind == "map":
            assert fitting_maps(pairs) == 26.0 ** -len({*"".join(asked)})
        else:
            assert any(all(task(x) == y for x, y in pairs) for task in NAMED[kind])
    again = ShotBatches(lambda rng: draw_task(rng, [kind]), TOKENIZER, 3, seed, count)[step]
    assert all(np.array_equal(a, b) for a, b in zip((tokens, targets), again))


def test_each_row_and_each_step_has_a_task_of_its_own():
    drawn = []
    batches = ShotBatches(lambda rng: drawn.append(draw_task(rng)) or drawn[-1], TOKENIZER, 200, 0)
    first, second = batches[0][0], batches[1][0]
    assert len(drawn) == 400 and (first != second).any()
    count = Counter("map" if task not in sum(NAMED.values(), ()) else next(
        kind for kind in NAMED if task in NAMED[kind]) for task in drawn)
    assert all(70 < count[kind] < 130 for kind in KINDS)
    assert len({task("abc") + task("def") for task in drawn}) > 110


@given(seed=seeds, count=st.integers(1, len(ASKED)), k=st.integers(0, SHOTS), fixed=st.booleans())
def test_questions_are_held_out_and_their_own_answers_count(seed, count, k, fixed):
    found = make_questions(["map", "upper"], count, seed, *[fixed] * fixed)  # by default not
    assert [q.kind for q in found] == ["map"] * count + ["upper"] * count
    maps = found[:count]
    assert len({q.asked for q in maps}) == count and {q.asked for q in maps} <= {*ASKED}
    assert len({q.task for q in maps}) == (1 if fixed else count)
    tokens, targets = rows_of_questions(found, k, TOKENIZER)
    for q, inside, wanted in zip(found, tokens, targets):
        assert len(q.shown) == SHOTS and all(q.task(x) == y for x, y in q.shown)
        assert not {word for word, _ in q.shown} & {*ASKED}
        prompt = prompt_of(q, k, TOKENIZER)
        assert TOKENIZER.decode(prompt) == q.text(k)
        assert np.array_equal(inside[: len(prompt)], prompt)
        assert TOKENIZER.decode(wanted[wanted != IGNORED]) == f"{q.answer}\n"
    others = make_questions(["letter", "map"], count, seed, fixed)[count:]
    assert [(q.asked, q.shown) for q in others] == [(q.asked, q.shown) for q in maps]


def test_the_first_demonstrations_of_more_are_the_same():
    q = make_questions(["map"], 1, 0)[0]
    assert q.text(3).startswith(q.text(2).removesuffix(f"{q.asked}>"))
    whole = row([*q.shown, (q.asked, q.answer)], TOKENIZER)
    assert np.array_equal(whole[0][: len(prompt_of(q, SHOTS, TOKENIZER))],
                          prompt_of(q, SHOTS, TOKENIZER))


def test_the_last_answer_counts_alone_whatever_its_length():
    tokens, targets = row([("ab", "x"), ("c", "yz")], TOKENIZER, last=True)
    assert TOKENIZER.decode(tokens) == "ab>x\nc>yz"
    assert TOKENIZER.decode(targets[targets != IGNORED]) == "yz\n"


class Begins(ByteTokenizer):
    """A tokenizer with a token of its own in front of a prompt."""

    def prompt(self, text):
        return np.append(self.mask, self.encode(text))


def test_the_first_question_alone_begins_the_text():
    tokens, _ = row([("ab", "x"), ("c", "y")], Begins())
    assert np.array_equal(tokens, [Begins().mask, *Begins().encode("ab>x\nc>y")])


@pytest.mark.parametrize("call, said", [
    (lambda: draw_task(np.random.default_rng(0), ["maps"]), "'maps' is none of the kinds upper"),
    (lambda: draw_task(np.random.default_rng(0), []), "no kind of task is named"),
    (lambda: make_questions(KINDS, 113, 0), "between 1 and 112, the words, got 113"),
    (lambda: make_questions(KINDS, 0, 0), "got 0"),
    (lambda: ShotBatches(draw_task, TOKENIZER, 0, 0), "at least 1, .* got 0 and 5"),
    (lambda: ShotBatches(draw_task, TOKENIZER, 1, 0, 400), "from 0 to 399, got 1 and 400"),
    (lambda: ideal([("abc", "x1y")], "abc"), "no task of the kinds upper, letter, shift, map fits"),
])
def test_what_cannot_be_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# What can be told


ALL_MAPS = [translated("ab", "".join(images)) for images in product(ALPHABET, repeat=2)]


@given(kind=kinds, seed=seeds, some=st.lists(st.sampled_from(["aab", "bab", "aaa", "bbb"]),
                                             max_size=2), asked=st.sampled_from(["aba", "bbb"]))
def test_no_answer_is_likelier_than_the_ideal_one(kind, seed, some, asked):
    """Eq. (1) by counting: on words of two letters 26^2 maps stand for all."""
    task = draw_task(np.random.default_rng(seed), [kind])
    shown, chances = [(word, task(word)) for word in some], Counter()
    for tasks in (*NAMED.values(), ALL_MAPS):
        for t in tasks:
            if all(t(x) == y for x, y in shown):
                chances[t(asked)] += 1 / len(tasks)
    assert chances[ideal(shown, asked)] == pytest.approx(max(chances.values()), rel=1e-9)


@given(kind=kinds, seed=seeds, count=st.integers(1, 6))
def test_what_was_shown_is_known(kind, seed, count):
    rng = np.random.default_rng(seed)
    shown = draw_pairs(rng, draw_task(rng, [kind]), count)
    assert all(ideal(shown, word) == answer for word, answer in shown)
    assert ideal(shown[::-1], "abc") == ideal(shown, "abc")


def test_more_demonstrations_tell_more_of_a_map_and_no_more_of_upper():
    found = make_questions(KINDS, 100, 0)
    by_k = [experiment.told(found, k) for k in range(SHOTS + 1)]
    assert [x["upper"] for x in by_k[1:]] == [100] * SHOTS
    maps = [x["map"] for x in by_k]
    assert maps == sorted(maps) and maps[1] < 15 and maps[SHOTS] > 50
    assert [x["shift"] for x in by_k[1:]] == [100] * SHOTS
    assert 80 < by_k[1]["letter"] < by_k[SHOTS]["letter"]


# The experiment


@pytest.fixture
def knows(monkeypatch):
    """Models that are functions of a question and k."""
    monkeypatch.setattr(experiment, "said", lambda model, tokenizer, questions, k: [
        model(q, k) for q in questions])


def test_who_follows_the_context_is_right_in_both(knows):
    found = make_questions(KINDS, 20, 1)

    def asked(reader): return experiment.in_two_contexts(dict.fromkeys(KINDS, reader), None, found)
    assert asked(lambda q, k: q.task(q.asked)) == (100, 100)
    assert asked(lambda q, k: q.asked) == (0, 0)
    own = {kind: (lambda q, k, task=task: task(q.asked)) for kind, (task, *_) in NAMED.items()}
    own["map"] = lambda q, k: "no"  # each knows one task: right in one context, if at all
    assert experiment.in_two_contexts(own, None, found) == (0, 0)


def test_right_answers_are_counted_by_kind(knows):
    found = make_questions(KINDS, 4, 1)
    reader = dict.fromkeys(KINDS, lambda q, k: q.asked.upper() if k else "")
    assert experiment.right(reader, None, found, 1) == {"upper": 100, "letter": 0, "shift": 0,
                                                        "map": 0}
    assert experiment.right(reader, None, found, 0) == dict.fromkeys(KINDS, 0)


TINY = InContext(batch=4, steps=2, warmup=1, workers=1, test=2, documents=1, lr=0.01)


def run_in(path):
    path.mkdir()
    return RunDirectory(path)


def test_a_parameter_that_changes_is_seen(tmp_path, monkeypatch):
    s = replace(TINY, replay=0.5)
    found = experiment.measured(s, run_in(tmp_path / "a"), "a")
    assert found[CHANGED] == 0 and found["SHA-256 before"] == found["SHA-256 after"]

    def spoilt(models, *rest):
        models["map"].norm.weight.data[0] += 1
        return right(models, *rest)
    right = experiment.right
    monkeypatch.setattr(experiment, "right", spoilt)
    found = experiment.measured(s, run_in(tmp_path / "b"), "b")
    assert found[CHANGED] > 0 and found["SHA-256 before"] != found["SHA-256 after"]


def test_a_model_for_each_kind_learns_its_one_task(tmp_path, monkeypatch):
    """Without demonstrations; the others share one model, and learn from rows with them."""
    seen = []

    def taught(model, batches, s, run, title):
        seen.append([pairs_in(*of)[0] for of in zip(*batches[0])])
        return model, 0, 0.0
    monkeypatch.setattr(experiment, "taught", taught)
    one = make_questions(KINDS, 2, 0, fixed=True)
    models, _ = experiment.learned(replace(TINY, alone=True), run_in(tmp_path / "a"), "", one)
    assert len({id(model) for model in models.values()}) == len(KINDS) == len(seen)
    for kind, rows in zip(KINDS, seen):
        task = experiment.of(kind, one)[0].task
        assert [len(pairs) for pairs in rows] == [1] * 4
        assert all(task(x) == y for (x, y), in rows)
    seen.clear()
    models, _ = experiment.learned(TINY, run_in(tmp_path / "b"), "", one)
    assert len({id(model) for model in models.values()}) == 1
    assert [len(pairs) for pairs in seen[0]] == [SHOTS + 1] * 4


def test_old_text_comes_beside_the_rows(tmp_path, monkeypatch):
    sizes, arrow = [], TOKENIZER.encode(">")[0]

    def taught(model, batches, s, run, title):
        sizes.append((len(batches[0][0]), (batches[0][0] == arrow).sum(axis=1).tolist()))
        return model, 0, 0.0
    monkeypatch.setattr(experiment, "taught", taught)
    for share in (0.0, 0.5):
        experiment.learned(replace(TINY, replay=share), run_in(tmp_path / str(share)), "", [])
    (few, shown), (many, both) = sizes
    assert (few, many) == (4, 8) and both[:4] == shown == [SHOTS + 1] * 4
    assert all(count < SHOTS + 1 for count in both[4:])


@pytest.mark.parametrize("claim, arm, numbers, against", [
    ("one demonstration is better than none", SHOWN, {RIGHT[0]: 5, RIGHT[1]: 50}, {RIGHT[0]: 60}),
    ("no parameter changes while the model learns from a prompt", SHOWN, {CHANGED: 0},
     {CHANGED: 1}),
    ("the same question gets another answer in another context, in more than half", SHOWN,
     {OTHER: 90}, {OTHER: 10}),
    (f"{SHOTS} demonstrations make the right answers likelier to the base", "base",
     {LOSS[0]: 8, LOSS[SHOTS]: 3}, {LOSS[0]: 2}),
])
def test_claims_can_hold_and_fail(claim, arm, numbers, against):
    def judged(of): return CLAIMS[claim]([{"arm": arm, "seed": s, **of} for s in (0, 1)]).verdict
    assert judged(numbers) == HOLDS and judged(numbers | against) == FAILS


def test_fine_tuning_is_compared_with_the_base():
    def judged(gain):
        rows = [{"arm": arm, "seed": s, ONE[0]: x + s, TWO: x} for s in (0, 1)
                for arm, x in (("base", 0), (SHOWN, 5), ("fine-tuned", gain))]
        return CLAIMS["fine-tuning is a huge gain over the base, zero-shot: 50 points or more"](
            rows).verdict
    assert judged(90) == HOLDS and judged(30) == FAILS


def test_words_are_split_once_for_all():
    assert len(shots.SHOWN) == 400 and len(ASKED) == 112 and not {*shots.SHOWN} & {*ASKED}
