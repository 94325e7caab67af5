"""The stages of alignment that experiments share."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import data, stages
from minilm.data.preferences import vowels
from minilm.experiment import RunDirectory
from minilm.stages import (
    KL,
    STRANGE,
    Aligned,
    Once,
    at_kl,
    judged,
    least_kl,
    look,
    old_batches,
    policy,
    questions,
    sample,
    stage_of,
    supervised,
    text_reward,
)
from minilm.trial import QUICK, base

S = Aligned(**QUICK | {"beta": 0.5, "seed": 3, "eval_every": 2})


def test_a_stage_takes_what_the_trial_says_and_its_own():
    s = stage_of(S, "reward", steps=7)
    assert (s.method, s.steps, s.beta, s.seed, s.comparisons) == ("reward", 7, 0.5, 3, S.train)


def test_what_is_shared_is_made_once_a_key():
    once, made = Once(), []
    for key in (1, 1, 2, 1):
        assert once(key, lambda key=key: made.append(key) or 10 * key) == 10 * key
    assert made == [1, 2, 1]


def test_a_base_is_at_no_distance_from_itself():
    model, tokenizer = base("")
    prompts = questions(S, model, tokenizer).held_out
    told = look(model, S, prompts, tokenizer, a=text_reward("vowels", tokenizer),
                b=text_reward(lambda text: -2 * vowels(text), tokenizer))
    assert told[KL] == 0 and told[STRANGE] == pytest.approx(np.log(258), abs=0.1)
    assert told["b"] == pytest.approx(-2 * told["a"], abs=1e-6) and told["a"] >= 0
    assert sample(model, S, prompts, tokenizer, 2).count(" -> ") == 2


@pytest.mark.parametrize("count, shown", [(3, [0, 3, 6]), (10, [*range(10)]), (50, [*range(10)])])
def test_as_many_prompts_are_shown_as_are_asked_for(monkeypatch, count, shown):
    found = []

    def demonstrations(s, model, asked, tokenizer):
        raise found.append(asked) or InterruptedError
    monkeypatch.setattr(stages, "demonstrations", demonstrations)
    with pytest.raises(InterruptedError):
        supervised(replace(S, shown=count, train=10), None, [*range(10)], None, None, "")
    assert found == [shown]


def test_old_text_comes_in_batches_of_a_minibatch():
    tokenizer = data.ByteTokenizer()
    assert old_batches(S, tokenizer) is None
    s = Aligned(**QUICK | {"ptx": 1.0})
    assert [a.shape for a in old_batches(s, tokenizer)[0]] == 2 * [(4, s.prompt + s.tokens)]


def test_a_policy_that_was_killed_goes_on_with_the_same_numbers(tmp_path):
    def learned(folder, stop=None):
        model, tokenizer = base("")
        s = Aligned(**QUICK | {"save_every": 2, "eval_every": 1})
        (tmp_path / folder).mkdir(exist_ok=True)
        run, reward = RunDirectory(tmp_path / folder), text_reward("vowels", tokenizer)
        found, looks = judged(s, model, tokenizer, run, "test"), []

        def see(policy):
            looks.append(1)
            if len(looks) == stop:
                raise SystemExit("killed")
            return look(policy, s, found.asked.held_out, tokenizer, a=found.reward, b=reward)
        return policy(s, model, found.asked, tokenizer, run, "test", found.reward, see)[1]

    with pytest.raises(SystemExit):
        learned("killed", stop=4)
    whole = learned("whole")
    assert learned("killed") == whole
    assert [step for step, _ in whole] == [0, 1, 2, 3, 4] and whole[-1][1][KL] != 0


SHARES = st.floats(0.01, 0.99)


@given(SHARES, SHARES, st.lists(SHARES, min_size=4, max_size=4))
def test_no_policy_pays_less_than_two_coins(q, p, weights):
    """Answers of four kinds, two of which have it; the best policy keeps the ratios inside."""
    a, b, c, d = weights
    inside, outside = np.array([a, b]) / (a + b), np.array([c, d]) / (c + d)
    def kl(x, y): return float((x * np.log(x / y)).sum())
    reference = np.concatenate([q * inside, (1 - q) * outside])
    best = np.concatenate([p * inside, (1 - p) * outside])
    other = np.concatenate([p * inside[::-1], (1 - p) * outside])
    least = least_kl(p, q)
    assert kl(best, reference) == pytest.approx(least, abs=1e-9)
    assert kl(other, reference) >= least - 1e-9 and least >= -1e-12


def test_the_least_kl_of_what_is_never_or_always_so():
    assert least_kl(0.0, 0.25) == pytest.approx(-math.log(0.75))
    assert least_kl(0.25, 0.0) == least_kl(0.5, 1.0) == math.inf
    assert least_kl(0.0, 0.0) == least_kl(1.0, 1.0) == 0
    with pytest.raises(ValueError, match="p must be from 0 to 1"):
        least_kl(1.5, 0.5)


def test_numbers_at_a_kl_lie_between_two_looks():
    points = [{KL: kl, "x": x} for kl, x in ((0.0, 1.0), (2.0, 5.0), (1.0, 7.0), (6.0, 9.0))]
    assert [at_kl(points, kl)["x"] for kl in (0.0, 1.0, 2.0, 4.0)] == [1.0, 3.0, 5.0, 8.2]
    assert math.isnan(at_kl(points, 6.5)["x"])
