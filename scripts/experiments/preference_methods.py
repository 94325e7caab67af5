"""PPO, GRPO and DPO on the same comparisons: which makes better answers at the same distance?

    python scripts/experiments/preference_methods.py --model runs/pretrain-*/model
    python scripts/experiments/preference_methods.py --quick    # seconds; the numbers mean nothing

Lecture 004 names "RL techniques such as proximal policy optimization (PPO)" for the last stage.
Two later methods take less: GRPO (Shao et al. 2024, arXiv:2402.03300) has no value head, and DPO
(Rafailov et al. 2023, arXiv:2305.18290) has no reward model and no answers of its own.

All three learn from the same 1200 comparisons of the base's answers, which a gold score makes with
noise (the share of vowels up to 0.4, less beyond); PPO and GRPO by one reward model. Whoever goes
farther from the base gets more, up to a point (rlhf.py). So the methods are compared where their
answers to held-out prompts are at the same KL, on a line between two looks, and not where their
steps happen to end. Their own prices of KL only decide how fast they get there.

A pass is one answer through a model: forward counts 1, backward 2. A round of PPO and GRPO draws
its answers, looks at them by policy, reference and reward model, and learns from them twice; the
training of the reward model is counted with theirs. Making the comparisons is not counted, since
all three need them. Seconds are those of the clock, without the looks.

A seed takes about three minutes of one core.
"""

import math
import time

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import compared
from minilm.picture import COLORS
from minilm.stages import (
    KL,
    STRANGE,
    Aligned,
    Once,
    at_kl,
    judged,
    look,
    policy,
    sample,
    text_reward,
)
from minilm.trial import KNOWN, base, old_text, program

QUESTION = "Which method makes the best answers from the same comparisons, and at what price?"
SLIDE = {}  # the lecture gives no numbers

EQUAL = 4.0  # nats an answer, at which the methods are compared
HOW = {"gold": "peak", "steps": 120, "eval_every": 8, "test": 256}
ARMS = {
    "base": HOW | {"steps": 0},
    "PPO": HOW | {"by": "ppo", "beta": 0.02},
    "GRPO": HOW | {"by": "grpo", "beta": 0.04},
    "DPO": HOW | {"by": "dpo", "beta": 0.05},
}
METHODS = [*ARMS][1:]

AT = f"at a KL of {EQUAL:g}"
GOLD, MODEL = f"gold {AT}, points", f"reward model {AT}, sd"
STEP, PASSES, SECONDS = f"steps to {AT[3:]}", "passes to it, thousands", "seconds to it"
LAST, LAST_KL = "gold in the end, points", "KL in the end, nats an answer"
MEASURES = {GOLD: 1, MODEL: 2, f"{STRANGE} {AT}": 2, STEP: 0, PASSES: 0, SECONDS: 0, LAST: 1,
            LAST_KL: 1, KNOWN: 2}
CURVE = "by step"  # for the picture: gold, KL


def less(measure: str, a: str, b: str):
    """Does a take less than b?"""
    return lambda rows: compared(rows, measure, a, b, at_most=0)


CLAIMS = {
    **{f"{arm} makes answers better": lambda rows, arm=arm: compared(rows, GOLD, arm, "base",
                                                                     at_least=0)
       for arm in METHODS},
    **{f"at the same KL {arm} is at most 2 points of gold below PPO": lambda rows, arm=arm:
       compared(rows, GOLD, arm, "PPO", at_least=-2) for arm in ("GRPO", "DPO")},
    "DPO takes fewer passes than PPO": less(PASSES, "DPO", "PPO"),
    "DPO takes fewer seconds than PPO": less(SECONDS, "DPO", "PPO"),
    "GRPO takes fewer steps than PPO": less(STEP, "GRPO", "PPO"),
}
JUDGED = Once()


def measured(s: Aligned, run, title: str) -> dict:
    """The numbers of MEASURES, and how they came about."""
    model, tokenizer = base(s.model)
    began = [time.perf_counter()]

    def judge():
        found = judged(s, model, tokenizer, run, title,
                       begun=lambda job: began.append(time.perf_counter()))
        return found, time.perf_counter() - began[-1]

    found, judging = JUDGED((s.model, s.seed), judge)
    scores = {GOLD: text_reward(s.gold, tokenizer), MODEL: found.reward}
    at_first = judging if s.steps and s.by != "dpo" else 0.0
    began.append(time.perf_counter())

    def see(policy):
        """What its answers are worth, and the seconds until now without those of looks."""
        records = run.records()
        spent = records[-1][SECONDS] if records else at_first
        spent += time.perf_counter() - began[-1]
        told = look(policy, s, found.asked.held_out, tokenizer, **scores)
        began.append(time.perf_counter())
        return told | {GOLD: 100 * told[GOLD], SECONDS: spent}

    if s.steps:
        reward = None if s.by == "dpo" else found.reward
        model, curve = policy(s, model, found.asked, tokenizer, run, title, reward, see)
    else:
        curve = [(0, see(model))]
    print(f"{title}: {sample(model, s, found.asked.held_out, tokenizer)}")
    points = [{STEP: step, PASSES: passes(s, step) / 1e3} | told for step, told in curve]
    there = at_kl(points, EQUAL if s.model and s.steps else 0.0)
    return {**{m: there[m] for m in (GOLD, MODEL, STEP, PASSES, SECONDS)},
            f"{STRANGE} {AT}": there[STRANGE], LAST: points[-1][GOLD], LAST_KL: points[-1][KL],
            KNOWN: old_text(model, tokenizer, s), CURVE: [[p[GOLD], p[KL]] for p in points]}


def passes(s: Aligned, step: int, answers: int = 2, epochs: int = 2, parts: int = 2) -> int:
    """Passes of an answer through a model, up to this step."""
    if not s.steps:
        return 0
    learned = 3 * s.batch * step  # forward and backward
    if s.by == "dpo":
        return answers * (learned + s.train)  # the reference looks at each answer once
    rounds = math.ceil(step / (epochs * parts))
    return 4 * rounds * parts * s.batch + learned + 3 * 24 * answers * s.judging


def draw(figure, rows):
    """Gold against KL as the policies learn, a line a seed."""
    axes = figure.subplots()
    for arm, color in zip(METHODS, COLORS):
        for i, row in enumerate(row for row in rows if row["arm"] == arm):
            gold, kl = zip(*row[CURVE])
            axes.plot(kl, gold, ".-", color=color, label=None if i else arm, linewidth=1)
    axes.axvline(EQUAL, color=COLORS[5], linewidth=1, linestyle="--", label="compared here")
    axes.set(xlabel="KL to the base, nats an answer", ylabel="gold score, points")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.05)
    axes.legend(frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Aligned)

if __name__ == "__main__":
    command(main)
