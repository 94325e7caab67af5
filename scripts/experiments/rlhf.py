"""Comparisons, a reward model, PPO: does more reward mean better answers?

    python scripts/experiments/rlhf.py --model runs/pretrain-*/model
    python scripts/experiments/rlhf.py --quick    # seconds; the numbers mean nothing

Lecture 004: RLHF "requires collecting human preferences (e.g., pairwise comparisons) which are then
used to train a reward model. The reward model is then used to further fine-tune the instructed LLM
via RL techniques such as proximal policy optimization (PPO)".

A rule stands for the people, the gold score: the share of vowels v in an answer up to 0.4, and
0.8 - v beyond. It compares 1200 pairs of the base's own answers, with noise. Few of those have
more than 0.4, so the reward model cannot learn that there is too much of it. The policy then goes
by the reward model alone, in units of its standard deviation over the base's answers, at three
prices of KL, and nobody but the table sees the gold score. If nothing keeps the policy near the
base, it goes where the reward model errs: its score rises on, and gold falls. This is
over-optimisation (Gao et al. 2022, arXiv:2210.10760; Stiennon et al. 2020, arXiv:2009.01325, figure
5). The picture has both against KL.

"gold at its peak" is the best of ten looks at the same held-out prompts. The best of several is a
lucky one, so a fall counts from 1.5 points on: a standard error of a look is about .7.

A seed takes about five minutes of one core, half a minute of it for comparisons and reward model.
"""

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import compared, each_seed, single, verdict
from minilm.picture import COLORS
from minilm.stages import KL, STRANGE, Aligned, Once, judged, look, policy, sample, text_reward
from minilm.trial import KNOWN, base, old_text, program

QUESTION = "Does an answer become better if a model of what people prefer says so?"
SLIDE = {}  # the lecture gives no numbers

SCALE = {"gold": "peak", "steps": 320, "eval_every": 32}
FREE, SMALL, LARGE = "beta 0", "beta 0.05", "beta 0.1"
ARMS = {"base": {"steps": 0, "gold": "peak"}, FREE: SCALE, SMALL: SCALE | {"beta": 0.05},
        LARGE: SCALE | {"beta": 0.1}}

MODEL, GOLD = "reward model, sd", "gold, points"
PEAK, AT_PEAK = "gold at its peak, points", "reward model at that peak, sd"
RIGHT, AGREE = "pairs the reward model orders rightly, %", "labels that agree with gold, %"
MEASURES = {MODEL: 2, GOLD: 1, PEAK: 1, AT_PEAK: 2, KL: 1, KNOWN: 2, STRANGE: 2, RIGHT: 1, AGREE: 1}
CURVE = "by step"  # for the picture: step, reward model, gold, KL
FALL = 1.5  # points of gold


def within(arm: str, high: str, low: str, **bounds):
    """The verdict on the difference of two numbers of one arm."""
    def judge(rows):
        d = each_seed([row for row in rows if row["arm"] == arm], lambda row: row[high] - row[low])
        return verdict(d, f"{arm}: {high} - {low}", **bounds)
    return judge


CLAIMS = {
    "the reward model learns the comparisons: 60 % of new pairs":
        lambda rows: single(rows, RIGHT, FREE, at_least=60),
    **{f"the answers become better, {arm}": lambda rows, arm=arm: compared(
        rows, GOLD, arm, "base", at_least=0) for arm in (SMALL, LARGE)},
    "without a price of KL the reward model's score goes on rising after the peak of gold":
        within(FREE, MODEL, AT_PEAK, at_least=0),
    f"and gold falls after its peak, by {FALL} points or more":
        within(FREE, PEAK, GOLD, at_least=FALL),
    **{f"with a price of KL it does not fall so much, {arm}":
       within(arm, PEAK, GOLD, at_most=FALL) for arm in (SMALL, LARGE)},
    "in the end answers are better with a price of KL than without": lambda rows: compared(
        rows, GOLD, LARGE, FREE, at_least=0),
    "though the reward model likes them less": lambda rows: compared(
        rows, MODEL, LARGE, FREE, at_most=0),
    "a price of KL saves old text": lambda rows: compared(rows, KNOWN, LARGE, FREE, at_most=0),
}
JUDGED = Once()


def measured(s: Aligned, run, title: str) -> dict:
    """The numbers of MEASURES, and how they came about."""
    model, tokenizer = base(s.model)
    found = JUDGED((s.model, s.seed), lambda: judged(s, model, tokenizer, run, title))
    gold = text_reward(s.gold, tokenizer)

    def see(policy):
        told = look(policy, s, found.asked.held_out, tokenizer,
                    **{MODEL: found.reward, GOLD: gold})
        return told | {GOLD: 100 * told[GOLD]}

    curve = [(0, see(model))]
    if s.steps:
        model, curve = policy(s, model, found.asked, tokenizer, run, title, found.reward, see)
    print(f"{title}: {sample(model, s, found.asked.held_out, tokenizer)}")
    best = max((told for _, told in curve), key=lambda told: told[GOLD])
    return {**curve[-1][1], PEAK: best[GOLD], AT_PEAK: best[MODEL], RIGHT: 100 * found.right,
            AGREE: 100 * found.agree, KNOWN: old_text(model, tokenizer, s),
            CURVE: [[step, told[MODEL], told[GOLD], told[KL]] for step, told in curve]}


def draw(figure, rows):
    """The reward model's score and gold against KL, a line a seed."""
    axes = figure.subplots(1, 2)
    for side, name in enumerate(["reward model's score, sd", "gold score, points"]):
        for arm, color in zip([*ARMS][1:], COLORS):
            for i, row in enumerate(row for row in rows if row["arm"] == arm):
                _, *scores, kl = zip(*row[CURVE])
                axes[side].plot(kl, scores[side], ".-", color=color, label=None if i else arm,
                                linewidth=1)
        axes[side].set(xlabel="KL to the base, nats an answer", ylabel=name)
        axes[side].set_xscale("symlog", linthresh=1)
        axes[side].set_xlim(left=-0.05)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Aligned)

if __name__ == "__main__":
    command(main)
