"""Who is best, if a judge compares two answers at a time and likes the first one better?

    python scripts/experiments/tournament.py --model runs/pretrain-*/model
    python scripts/experiments/tournament.py --quick    # seconds; the numbers mean nothing

Lecture 002 shows table 6 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): GPT-4 gives points to
the answers of a system and of ChatGPT, in both orders; a score is the system's share of ChatGPT's
points. Of its 21 rows, 20 have the higher share in the column that names the system first. Its
models of 4 bits come near ChatGPT, and "a tournament-style evaluation" with Elo ratings compares
them. The slide's numbers below are those of 33B on OASST1: Open Assistant has 16 bits, Guanaco 4.
(Vicuna's row has the same four numbers as Open Assistant's, so one of them may be a slip.)

Here the players are a small model that pretrain.py made, and what five methods make of it in as
many steps of four tasks. All answer the same questions, which nobody has learned. Full fine-tuning
stands for ChatGPT: it is the reference. The judge is a program. It gives one to ten points for the
letters that are right, and one more to the answer that it reads first (minilm/measure/judge.py). So
what a judge without that liking says is known, too ("without the bonus").

    Elo             mean of 10,000 orders of all games, and what the middle 95 % of them lie
                    between: what the same games might have given (minilm/measure/elo.py)
    Bradley-Terry   the likeliest strengths on the same scale, and an interval by bootstrap: what
                    other questions might have given (minilm/measure/bradley_terry.py). A drawn game
                    is added between any two, for a player that never wins
    the shares      a t interval, for other questions as well
    verdicts        an interval over seeds: other adapters, records, questions, and other bases

"Elo, always first" is a player's rating if all its games are judged in one order only, it being the
first; the games of the others are judged in both.

Full fine-tuning against itself gets a little more than 100 % in the mean of both orders, since a
mean of shares does not cancel the bonus as a sum does: eq. (4) of judge.py.

The players of a seed are trained once and serve all arms. A run that goes on trains them again. A
seed takes about 4 minutes of one core.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from minilm.command import command
from minilm.data import score
from minilm.experiment import Experiment
from minilm.measure import bradley_terry, elo
from minilm.measure.answers import answers
from minilm.measure.judge import points, shares, tournament, without_bonus
from minilm.measure.verdict import by_seed, compared, each_seed, single, verdict
from minilm.picture import COLORS
from minilm.trial import RIGHT, Trial, base, learned, low_rank, program, records_of, trial_of

QUESTION = "Who is best, if a judge compares two answers and likes the first one better?"

SLIDE = {
    "lecture 002: 33B, ChatGPT first, %": {"full": 91.2, "QLoRA, NF4": 96.5},
    "lecture 002: 33B, system first, %": {"full": 98.7, "QLoRA, NF4": 99.2},
    "lecture 002: 33B, mean, %": {"full": 94.9, "QLoRA, NF4": 97.8},
    "lecture 002: 33B, 95 % interval, +-": {"full": 4.5, "QLoRA, NF4": 4.4},
}


@dataclass(frozen=True)
class Player(Trial):
    """A trial that ends before everybody is always right."""

    steps: int = 1200
    test: int = 50
    player: str = ""
    """its name"""


ARMS = {
    "base": {"steps": 0},
    "full": {"method": "full", "lr": 1e-3},
    "LoRA": low_rank(8),
    "QLoRA, NF4": low_rank(8) | {"method": "qlora", "kind": "nf4"},
    "QLoRA, NF2": low_rank(8) | {"method": "qlora", "kind": "nf2"},
    "BitFit": {"method": "bitfit", "lr": 3e-2},
}
ARMS = {name: own | {"player": name} for name, own in ARMS.items()}
REFERENCE, NF4, NF2 = "full", "QLoRA, NF4", "QLoRA, NF2"
BONUS = 1.0  # points, of ten
DRAWN = 1.0  # games between any two
ORDERS, FEWER = 10_000, 1000  # of the games; FEWER for a mean alone

FIRST, SECOND = "read first, % of full's points", "read second, %"
MEAN, HALF, UNBIASED = "mean, %", "95 %, +-", "without the bonus, %"
ELO, BT, ALWAYS = "Elo", "Bradley-Terry", "Elo, always first"
ENDS = {ELO: ("Elo: low", "high"), BT: ("Bradley-Terry: low", "high of it")}
MEASURES = {RIGHT: 1, SECOND: 1, FIRST: 1, MEAN: 1, HALF: 1, UNBIASED: 1,
            ELO: 0, **dict.fromkeys(ENDS[ELO], 0), BT: 0, **dict.fromkeys(ENDS[BT], 0), ALWAYS: 0}


class Field(NamedTuple):
    """All players of a seed, in the order of ARMS."""

    right: list[float]  # % of the questions
    points: np.ndarray  # (N, P), without a bonus
    elo: elo.Ratings
    bt: np.ndarray  # (N,)
    low: np.ndarray  # of its interval
    high: np.ndarray


FIELDS = {}  # settings of all players -> their Field, of the last ones
ANSWERED = {}  # settings of a player -> what `answered` gave, for one model and seed


def measured(s: Player, run, title: str) -> dict:
    """The numbers of MEASURES."""
    field, i = played(s, run), [*ARMS].index(s.player)
    x, y = field.points[i], field.points[[*ARMS].index(REFERENCE)]
    found = shares(x, y, BONUS)
    always = elo.over_orders(tournament(field.points, BONUS, first=i), len(ARMS),
                             2 if not s.model else FEWER, s.seed)
    return {
        RIGHT: field.right[i],
        SECOND: 100 * found.reference_first.value, FIRST: 100 * found.system_first.value,
        MEAN: 100 * found.mean.value, HALF: 50 * (found.mean.high - found.mean.low),
        UNBIASED: 100 * found.unbiased.value,
        **of_three(ELO, *field.elo, i), **of_three(BT, field.bt, field.low, field.high, i),
        ALWAYS: float(always.mean[i])}


def of_three(name: str, value, low, high, i: int) -> dict:
    """A rating of player i and the ends of its interval."""
    return dict(zip((name, *ENDS[name]), (float(value[i]), float(low[i]), float(high[i]))))


def played(s: Player, run) -> Field:
    """What all players of this model and seed do; they are trained once."""
    quick = not s.model
    others = {name: replace(trial_of(own, quick, Player), seed=s.seed, model=s.model,
                            workers=s.workers) for name, own in ARMS.items()}
    players = tuple((others | {s.player: s}).values())
    if players in FIELDS:
        return FIELDS[players]
    right, x = zip(*(answered(player, run) for player in players))
    x = np.array(x)
    games = tournament(x, BONUS)
    w = bradley_terry.wins_by_prompt(games, len(x))
    FIELDS.clear()
    FIELDS[players] = Field(
        [*right], x, elo.over_orders(games, len(x), 20 if quick else ORDERS, s.seed),
        bradley_terry.ratings(w.sum(axis=0), DRAWN),
        *bradley_terry.bootstrap(w, DRAWN, 20 if quick else 1000, s.seed))
    return FIELDS[players]


def answered(s: Player, run) -> tuple[float, list[float]]:
    """(% of the questions that are answered rightly, the points of each) of a player."""
    if s in ANSWERED:
        return ANSWERED[s]
    for other in [t for t in ANSWERED if (t.model, t.seed) != (s.model, s.seed)]:
        del ANSWERED[other]
    train, test = records_of(s)
    model, tokenizer = base(s.model)
    title = f"{s.player}, seed {s.seed}"
    model, *_ = learned(model, tokenizer, train, s, run.inside(s.player), title)
    said = answers(model, test, tokenizer)
    right = [score(record, text) for record, text in zip(test, said)]
    ANSWERED[s] = (100 * float(np.mean(right)),
                   [points(record, text) for record, text in zip(test, said)])
    return ANSWERED[s]


def ends(name: str, row: dict) -> tuple[float, float]:
    """The interval of a rating."""
    low, high = ENDS[name]
    return row[low], row[high]


def wide(name: str, row: dict) -> float:
    """Its width."""
    low, high = ends(name, row)
    return high - low


def overlap(name: str, a: str, b: str, **bounds):
    """By how much do the intervals of two players overlap? Less than 0: there is a gap."""
    def judge(rows):
        low, high = ENDS[name]
        d = [min(highs) - max(lows) for lows, highs in zip(
            by_seed(rows, low, (a, b)), by_seed(rows, high, (a, b)))]
        return verdict(d, f"{a} and {b}: overlap of {name}", **bounds)
    return judge


def of_arm(arm: str, value, about: str, **bounds):
    """The verdict on value(row) of an arm."""
    return lambda rows: verdict([value(row) for row in rows if row["arm"] == arm],
                                f"{arm}: {about}", **bounds)


def out_of_order(rows, apart: bool = False) -> list[float]:
    """For each seed, how many pairs of players does Elo place otherwise than accuracy?

    apart: of those whose intervals of Bradley-Terry, by questions, do not overlap.
    """
    found = []
    of = (by_seed(rows, measure, ARMS) for measure in (RIGHT, ELO, *ENDS[BT]))
    for right, rating, low, high in zip(*of):
        a, b = (np.sign(np.subtract.outer(x, x)) for x in (right, rating))
        counted = np.less.outer(high, low) if apart else np.tri(len(right), k=-1, dtype=bool)
        found.append(float((a * b < 0)[counted].sum()))
    return found


BIAS = f"{MEAN} - {UNBIASED}"
CLAIMS = {
    "QLoRA of 4 bits comes as near to full as the slide's to ChatGPT: 93.4 % of its points or more":
        lambda rows: single(rows, MEAN, NF4, at_least=97.8 - 4.4),
    "4 bits get what LoRA on 16 bits gets, within 3 points":
        lambda rows: compared(rows, MEAN, NF4, "LoRA", -3, 3),
    "2 bits get what 4 bits get, within 3 points":
        lambda rows: compared(rows, MEAN, NF2, NF4, -3, 3),
    "the order decides who is ahead: read first, QLoRA of 4 bits is ahead of full":
        lambda rows: single(rows, FIRST, NF4, at_least=100),
    "read second, it is behind": lambda rows: single(rows, SECOND, NF4, at_most=100),
    "one order alone is wrong by more than the interval says": of_arm(
        NF4, lambda row: row[FIRST] - row[UNBIASED] - row[HALF],
        f"{FIRST} - {UNBIASED} - half of the interval", at_least=0),
    "both orders tell the score without the bonus, within 0.01 points": lambda rows: verdict(
        each_seed(rows, lambda row: abs(row[UNBIASED] - 100 * without_bonus(
            row[SECOND] / 100, row[FIRST] / 100))), "eq. (3), largest difference", at_most=0.01),
    "their mean has no bias, within 1 point: QLoRA of 4 bits": of_arm(
        NF4, lambda row: row[MEAN] - row[UNBIASED], BIAS, at_least=-1, at_most=1),
    "their mean has no bias, within 1 point: the base model": of_arm(
        "base", lambda row: row[MEAN] - row[UNBIASED], BIAS, at_least=-1, at_most=1),
    "Elo's order is that of the right answers": lambda rows: verdict(
        out_of_order(rows), "pairs of players in another order", at_most=0.5),
    "so it is among players whose intervals by questions do not overlap": lambda rows: verdict(
        out_of_order(rows, apart=True), "such pairs in another order", at_most=0.5),
    "near players' intervals overlap: LoRA and 4 bits, orders":
        overlap(ELO, "LoRA", NF4, at_least=0),
    "near players' intervals overlap: LoRA and 4 bits, questions":
        overlap(BT, "LoRA", NF4, at_least=0),
    "far ones' do not: LoRA and BitFit, orders": overlap(ELO, "LoRA", "BitFit", at_most=0),
    "far ones' do not: LoRA and BitFit, questions": overlap(BT, "LoRA", "BitFit", at_most=0),
    "other orders of the same games move Elo more than other questions: QLoRA of 4 bits": of_arm(
        NF4, lambda row: wide(ELO, row) - wide(BT, row),
        "interval by orders - that of Bradley-Terry by questions", at_least=0),
    "always read first, QLoRA of 4 bits gains 20 Elo or more": of_arm(
        NF4, lambda row: row[ALWAYS] - row[ELO], f"{ALWAYS} - {ELO}", at_least=20),
    "the bonus moves Elo more among near players: QLoRA of 4 bits gains more than the base":
        lambda rows: verdict([a - b - (c - d) for (a, c), (b, d) in zip(
            by_seed(rows, ALWAYS, (NF4, "base")), by_seed(rows, ELO, (NF4, "base")))],
            f"{NF4} - base: {ALWAYS} - {ELO}", at_least=0),
}
LIKELY = {
    "their mean has no bias, within 1 point: the base model":
        "a weak system's share gains more from its own bonus than it loses by the reference's: "
        "eq. (4) of minilm/measure/judge.py",
}


def draw(figure, rows):
    """Shares on the left, ratings on the right; a line an interval, seeds close together."""
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)][::-1]
    seeds = sorted({row["seed"] for row in rows})
    places = {(arm, seed): y - 0.3 + 0.6 * (n + 0.5) / len(seeds)
              for y, arm in enumerate(arms) for n, seed in enumerate(seeds)}
    left, right = figure.subplots(1, 2, sharey=True)
    for row in rows:
        y = places[row["arm"], row["seed"]]
        label = row is rows[0]
        left.plot([row[MEAN] - row[HALF], row[MEAN] + row[HALF]], [y, y], color=COLORS[0])
        for measure, mark, color in ((SECOND, "<", 5), (MEAN, "o", 0), (FIRST, ">", 1)):
            left.plot(row[measure], y, mark, color=COLORS[color], markersize=3.5,
                      label=measure.split(",")[0] if label else None)
        for name, shift, color in ((ELO, 0.05, 2), (BT, -0.05, 3)):
            right.plot(ends(name, row), [y + shift] * 2, color=COLORS[color])
            right.plot(row[name], y + shift, "o", color=COLORS[color], markersize=3.5,
                       label={ELO: "Elo, orders", BT: "Bradley-Terry, questions"}[name]
                       if label else None)
    left.set_yticks(range(len(arms)), arms, fontsize=7)
    left.set_xlabel("share of full's points, %", fontsize=8)
    right.set_xlabel("rating", fontsize=8)
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="y", visible=False)
        axes.legend(frameon=False, fontsize=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured, Player)

if __name__ == "__main__":
    command(main)
