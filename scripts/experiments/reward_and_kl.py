"""What does a reward buy, and what does it cost? PPO on a rule, at three prices of KL.

    python scripts/experiments/reward_and_kl.py --model runs/pretrain-*/model
    python scripts/experiments/reward_and_kl.py --quick    # seconds; the numbers mean nothing

Lecture 004: in RLHF a reward model "is then used to further fine-tune the instructed LLM via RL
techniques such as proximal policy optimization (PPO)". Here the reward is no model but a rule, so
nothing is lost on the way to it: the share of vowels in an answer of at most 24 tokens. Prompts
are pieces of the text that the model knows, the policy is LoRA of rank 8, and it is paid

    R = r - beta (log pi - log pi_ref)               (Ziegler et al. 2019, arXiv:1909.08593, eq. 2)

At beta = 0 nothing keeps the policy near the model that it began with. The table has what the
answers to held-out prompts are worth, the KL, and what has become of the text that pretrain.py
taught. The picture has the way there: which reward is had for which KL. beta is in units of the
reward a nat: here a standard deviation of the reward is about .09.

A seed takes about four minutes of one core.
"""

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import by_seed, compared, verdict
from minilm.picture import COLORS
from minilm.stages import (
    ENTROPY,
    KL,
    LENGTH,
    STRANGE,
    Aligned,
    look,
    policy,
    questions,
    sample,
    text_reward,
)
from minilm.trial import KNOWN, base, old_text, program

QUESTION = "What does a reward buy, and what keeps a model from paying everything for it?"
SLIDE = {}  # the lectures give no numbers

BETAS = (0.0, 0.005, 0.02)
ARMS = {"base": {"steps": 0}, **{f"beta {beta:g}": {"beta": beta} for beta in BETAS}}
FREE, SMALL, LARGE = [*ARMS][1:]

REWARD = "reward: share of vowels, %"
MEASURES = {REWARD: 1, KL: 1, KNOWN: 2, STRANGE: 2, ENTROPY: 2, LENGTH: 1}
CURVE = "by step"  # for the picture: step, reward, KL


def more(measure: str, a: str, b: str):
    """Has a more of it than b?"""
    return lambda rows: compared(rows, measure, a, b, at_least=0)


def cost(rows):
    """What the old text lost at the highest price, of what it lost without one."""
    found = by_seed(rows, KNOWN, ("base", LARGE, FREE))
    shares = [100 * (paid - base) / (free - base) if free != base else 0.0
              for base, paid, free in found]
    return verdict(shares, f"{LARGE}, of what {FREE} lost, %: {KNOWN}", at_most=10)


CLAIMS = {
    **{f"PPO finds answers that are worth more, {arm}": more(REWARD, arm, "base")
       for arm in (FREE, SMALL, LARGE)},
    "the lower the price of KL, the more reward: none and a small one": more(REWARD, FREE, SMALL),
    "the lower the price of KL, the more reward: a small one and a large one":
        more(REWARD, SMALL, LARGE),
    "and the farther it goes: none and a small one": more(KL, FREE, SMALL),
    "and the farther it goes: a small one and a large one": more(KL, SMALL, LARGE),
    "at beta 0 the answers are text no longer: 3 nats a token more than the base's own":
        lambda rows: compared(rows, STRANGE, FREE, "base", at_least=3),
    "at beta 0.02 they still are: 0.5 nats more at most":
        lambda rows: compared(rows, STRANGE, LARGE, "base", at_most=0.5),
    "at beta 0.02 the old text loses a tenth at most of what it loses at beta 0": cost,
}


def measured(s: Aligned, run, title: str) -> dict:
    """The numbers of MEASURES, and how they came about."""
    model, tokenizer = base(s.model)
    asked, reward = questions(s, model, tokenizer), text_reward(s.gold, tokenizer)

    def see(policy):
        told = look(policy, s, asked.held_out, tokenizer, **{REWARD: reward})
        return told | {REWARD: 100 * told[REWARD]}

    curve = [(0, see(model))]
    if s.steps:
        model, curve = policy(s, model, asked, tokenizer, run, title, reward, see)
    print(f"{title}: {sample(model, s, asked.held_out, tokenizer)}")
    return {**curve[-1][1], KNOWN: old_text(model, tokenizer, s),
            CURVE: [[step, told[REWARD], told[KL]] for step, told in curve]}


def draw(figure, rows):
    """Reward against KL as the policies learn, a line a seed; the cross is where they began."""
    axes = figure.subplots()
    for arm, color in zip(ARMS, COLORS[5:6] + COLORS):
        for i, row in enumerate(row for row in rows if row["arm"] == arm):
            _, reward, kl = zip(*row[CURVE])
            axes.plot(kl, reward, "x" if arm == "base" else ".-", color=color,
                      label=None if i else arm, linewidth=1)
    axes.set(xlabel="KL to the base, nats an answer", ylabel="reward: share of vowels, %")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.05)
    axes.legend(frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Aligned)

if __name__ == "__main__":
    command(main)
