"""Does a model that was fine-tuned still give many different answers?

    python scripts/experiments/diversity.py --model runs/pretrain-*/model
    python scripts/experiments/diversity.py --quick          # seconds; the numbers mean nothing

Lecture 002 says "LoRA helps maintain diversity of token generations", and shows figure 5 of
Biderman et al. 2024: "LoRA maintains output token diversity relative to full finetuning". There a
problem is solved 50 times at temperature .8, and different solutions are counted. The base model
has the most, full fine-tuning the fewest, LoRA lies between.

Here the question is open, too: a word of five letters from a to h that begins and ends as the
prompt says, which leaves 512 right answers. The models learn from ten answers to each of 48
prompts, in 17 epochs, and give 32 answers at temperature 1 to each of the 16 other prompts. Of 32
random ones out of 512, 97 % would be different. Different answers, and different 2-grams of letters
beside all of them (distinct-2), are counted for each prompt. Wrong answers count, as in the figure;
beside that stands the number of different right ones.

Whoever has learned less writes more at random. So the arms are compared twice: after equal steps,
and at equal learning, where 60 % of an arm's answers are right for the first time (on a line
between the two looks around it). A seed takes about two minutes of one core.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment
from minilm.files import read_json, write_json
from minilm.measure.answers import answers
from minilm.measure.diversity import distinct, distinct_ngrams
from minilm.measure.verdict import compared, single
from minilm.picture import COLORS
from minilm.trial import Trial, base, learned, loss_of_answers, low_rank, program

QUESTION = "Does a model that was fine-tuned still give many different answers?"
SLIDE = {}  # the slide gives no numbers
LETTERS, SIZE, DRAWN = "abcdefgh", 5, 32
EQUAL = 60  # per cent of the answers that are right, where learning counts as equal


@dataclass(frozen=True)
class Open(Trial):
    """A trial on open questions."""

    steps: int = 1000
    """updates in the whole run"""
    each: int = 10
    """answers to a prompt that are learned from"""
    asked: int = 16
    """prompts that are asked, and not learned from"""


ARMS = {
    "base": {"steps": 0},
    "full": {"method": "full", "lr": 1e-3},
    **{f"LoRA, r = {r}": low_rank(r) for r in (2, 8, 32)},
}
RANKS = [*ARMS][2:]

RIGHT, SEVERAL = "right, %", "different answers, %"
GRAMS, USEFUL = "different 2-grams, %", f"different right ones of {DRAWN}"
AT, LOSS = f"at {EQUAL} % right", "loss of answers, nats a token"
MEASURES = {RIGHT: 1, SEVERAL: 1, GRAMS: 1, USEFUL: 1, LOSS: 3, f"{AT}: {SEVERAL}": 1,
            f"{AT}: {GRAMS}": 1, f"{AT}: step": 0}
CURVE = "by step"  # for the picture


def more(measure: str, arm: str, other: str = "full"):
    """Has the arm more of it than the other?"""
    return lambda rows: compared(rows, measure, arm, other, at_least=0)


CLAIMS = {
    **{f"{arm} gives more different answers than full": more(SEVERAL, arm) for arm in RANKS},
    **{f"{arm} has more different 2-grams than full": more(GRAMS, arm) for arm in RANKS},
    **{f"{arm} gives more different answers than full when both are right in {EQUAL} %":
       more(f"{AT}: {SEVERAL}", arm) for arm in RANKS},
    **{f"{arm} has more different 2-grams than full when both are right in {EQUAL} %":
       more(f"{AT}: {GRAMS}", arm) for arm in RANKS},
    **{f"{arm} gives more different right answers than full": more(USEFUL, arm) for arm in RANKS},
    **{f"the base has more different answers than {arm}": more(SEVERAL, "base", arm)
       for arm in [*ARMS][1:]},
    **{f"{arm} is right in {EQUAL} % or more": lambda rows, arm=arm: single(rows, RIGHT, arm, EQUAL)
       for arm in [*ARMS][1:]},
}


def questions(s: Open) -> tuple[list[data.Record], list[data.Record]]:
    """(records to learn from, one record of each prompt that is asked)."""
    rng = np.random.default_rng([s.seed, 3])
    pairs = [(a, z) for a in LETTERS for z in LETTERS]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]

    def record(a, z):
        middle = "".join(rng.choice([*LETTERS], SIZE - 2))
        return data.Record("Word", f"{a} {z}", a + middle + z, task="word")

    train = [record(*pair) for pair in pairs[s.asked :] for _ in range(s.each)]
    return train, [record(*pair) for pair in pairs[: s.asked]]


def is_right(record: data.Record, said: str) -> bool:
    """Has the answer the length, the letters and the ends that were asked for?"""
    a, z = record.context.split()
    return len(said) == SIZE and {*said} <= {*LETTERS} and said[0] == a and said[-1] == z


def drawn(model, tokenizer, asked, seed: int) -> dict:
    """The numbers of DRAWN answers to each question, means over the questions."""
    said = answers(model, [r for r in asked for _ in range(DRAWN)], tokenizer, 1.0, seed)
    rows = []
    for i, record in enumerate(asked):
        own = said[DRAWN * i : DRAWN * (i + 1)]
        good = [text for text in own if is_right(record, text)]
        long = [text for text in own if len(text) > 1]
        rows.append({RIGHT: 100 * len(good) / DRAWN, SEVERAL: 100 * distinct(own),
                     GRAMS: 100 * distinct_ngrams(long) if long else 0.0, USEFUL: len({*good})})
    return {measure: float(np.mean([row[measure] for row in rows])) for measure in rows[0]}


def measured(s: Open, run, title: str) -> dict:
    """The numbers of one arm: at the end, and where it is first right often enough."""
    train, asked = questions(s)
    model, tokenizer = base(s.model)
    file = run.path / "by_step.json"
    by_step = read_json(file) if file.exists() else {}  # a run that goes on has some of them

    def watch(trainer, done):
        if done.targets and done.step % (s.steps // 20 or 1) == 0:
            by_step[str(done.step)] = drawn(trainer.model, tokenizer, asked, s.seed)
            write_json(file, by_step)

    model = learned(model, tokenizer, train, s, run, title, watch)[0]
    last = drawn(model, tokenizer, asked, s.seed)
    curve = sorted((int(step), numbers) for step, numbers in by_step.items()) or [(0, last)]
    points = [[n, x[RIGHT], x[SEVERAL], x[GRAMS]] for n, x in curve]
    step, _, several, grams = at_equal(points)
    return {**last, LOSS: loss_of_answers(model, tokenizer, asked), f"{AT}: {SEVERAL}": several,
            f"{AT}: {GRAMS}": grams, f"{AT}: step": step, CURVE: points}


def at_equal(points: list[list[float]]) -> list[float]:
    """The point (step, right, ...) where right is EQUAL for the first time, on a line between the
    two points around it; the last one if it never is."""
    for before, after in pairwise([points[0], *points]):
        if after[1] >= EQUAL:
            rise = after[1] - before[1]
            part = (EQUAL - before[1]) / rise if rise else 1.0
            return [a + part * (b - a) for a, b in zip(before, after)]
    return points[-1]


def draw(figure, rows):
    """Different answers and 2-grams against what is right, a curve an arm, from step to step."""
    for axes, place, title in zip(figure.subplots(1, 2), (2, 3), (SEVERAL, GRAMS)):
        for number, arm in enumerate(ARMS):
            curves = [row[CURVE] for row in rows if row["arm"] == arm]
            if curves:
                found = np.mean(curves, axis=0)
                axes.plot(found[:, 1], found[:, place], "o-", color=COLORS[number], markersize=3,
                          linewidth=1, label=arm)
                axes.plot(found[-1, 1], found[-1, place], "s", color=COLORS[number])
        axes.set(xlabel=f"{RIGHT} (square: the end)", ylabel=title)
        axes.legend(frameon=False, fontsize=7)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Open)

if __name__ == "__main__":
    command(main)
