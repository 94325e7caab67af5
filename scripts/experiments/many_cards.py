"""From one laptop to 100,000 cards: up to how many of them does each stage of ZeRO pay?

    python scripts/experiments/many_cards.py            # seconds; it trains nothing
    python scripts/experiments/many_cards.py --quick

Lecture 004: use DDP "if your model fits on one GPU", ZeRO and FSDP "when model doesn't fit in VRAM
on single GPU"; stages trade memory for time to communicate. Here this is computed: what a card
keeps, by the formula of minilm/parallel/bucket.py, and how long a step takes, by the simulator of
minilm/measure/step_time.py. Both are a model, not a measurement. parallel_training.py compares them
with steps that were measured on up to four ranks, and gpu_hours.py with published runs.

Assumed, beside what step_time.py, cluster.py and collectives.py assume:

    cards       H100 of 80 GB, 8 a node, an adapter of 400 Gb/s each; forward and backward reach
                40 % of the peak; 16-bit parameters and gradients, float32 masters, m and v
    a step      8192 tokens of each card, one micro-batch. With more cards the batch grows; "4M"
                is a batch of 4 million tokens, Llama-2's, however many cards share it
    pays        half of a step or more is forward and backward
    memory      states alone, without activations. ZeRO's own example is 7.5B parameters on 64
                cards (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1)
    a laptop    8 cores, 7e10 operations a second each, which this package reaches at width 128

The number of cards is a multiple of 8 and doubles: 8, 16, ... 131,072. Nothing is random, so all
seeds give the same.
"""

from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.cluster import CLUSTERS
from minilm.measure.lecture_cards import LLAMA2
from minilm.measure.scaling import operations
from minilm.measure.step_time import Job
from minilm.measure.verdict import by_seed, compared, each_seed, single, verdict
from minilm.parallel.bucket import bytes_held
from minilm.picture import COLORS
from minilm.transformer import Config

QUESTION = "Up to how many cards does each stage of ZeRO pay?"

SHARE, TOKENS, BATCH, LAPTOP = 0.4, 8192, 2**22, 8 * 7e10
FAST, SLOW = CLUSTERS["H100, 8 x 400 Gb/s"], CLUSTERS["H100, 1 x 100 Gb/s"]
HALF_B = Config.llama(32000, 4096, 24, 20, 1280, 3456, tied=True)
JOBS = {"0.5B": Job.of(HALF_B, TOKENS), "7B": Job.of(LLAMA2["7B"], TOKENS),
        "70B": Job.of(LLAMA2["70B"], TOKENS), "ZeRO's 7.5B": Job(7.5e9, 0, 0, 36, TOKENS)}
OWN = [*JOBS][:3]
CARDS = [8 * 2**k for k in range(15)]
ALL = 98_304  # 100,000, in whole nodes of 8


def arm_of(model, stage): return f"{model}, stage {stage}"


ARMS = {arm_of(model, stage): (model, stage) for model in JOBS for stage in range(4)}
SLIDE = {}  # it has words: "if your model fits on one GPU", "trade-off"
FIGURE = {arm_of("ZeRO's 7.5B", s): x for s, x in enumerate((120, 31.4, 16.6, 1.9))}  # GB
GB, LEAST = "GB a card of 64", "cards whose 80 GB hold it (0: none)"
AT = {n: f"%, {n:,} cards, rings" for n in (8, 64, 512, 4096, ALL)}
TREE, NARROW = f"%, {ALL:,} cards, trees", "%, 64 cards, 100 Gb/s a node"
MOST, MOST_TREE = "most cards that pay, rings", "the same, trees"
MOST_BATCH = "the same, trees, 4M tokens"
FEWEST = "fewest tokens a card, 64 cards"
YEARS, HOURS = "years on a laptop, 20 tokens a parameter", "hours on 1,024 cards"
MEASURES = {GB: 1, LEAST: 0, **dict.fromkeys(AT.values(), 1), TREE: 1, NARROW: 1, MOST: 0,
            MOST_TREE: 0, MOST_BATCH: 0, FEWEST: 0, YEARS: 1, HOURS: 2}


def off_zeros(rows) -> list[float]:
    """How far ZeRO's figure is from the formula, at most; its last number has two digits."""
    return each_seed([row for row in rows if row["arm"] in FIGURE],
                     lambda row: abs(row[GB] - FIGURE[row["arm"]]))


def extreme(rows, measure: str, pick) -> list[float]:
    """Of the lectures' models, the least or largest number."""
    return each_seed([row for row in rows if ARMS[row["arm"]][0] in OWN],
                     lambda row: row[measure], pick)


def of_the_rule(rows, model: str) -> list[float]:
    """The fewest tokens that pay over F / 2 B."""
    F, B = SHARE * FAST.card.peak, FAST.link(64).B
    return [x / (F / 2 / B) for x, in by_seed(rows, FEWEST, [arm_of(model, 3)])]


def fits(model: str, stage: int, **bounds):
    return lambda rows: single(rows, GB, arm_of(model, stage), **bounds)


CLAIMS = {
    "the formula gives ZeRO's figure, rounded": lambda rows: verdict(
        off_zeros(rows), "largest difference, GB", at_most=0.05),
    "DDP: 0.5B fit on one card": fits("0.5B", 0, at_most=80),
    "7B do not fit on one card": fits("7B", 0, at_least=80),
    "stage 1 is enough for 7B on 64 cards": fits("7B", 1, at_most=80),
    "70B need stage 3: on 64 cards stage 2 does not hold them": fits("70B", 2, at_least=80),
    "70B need stage 3: on 64 cards it does": fits("70B", 3, at_most=80),
    "the trade-off of stages: in a narrow network stage 3 of 7B is slower than DDP, 64 cards":
        lambda rows: compared(rows, NARROW, arm_of("7B", 3), arm_of("7B", 0), at_most=0),
    "in a wide one it is, too":
        lambda rows: compared(rows, AT[64], arm_of("7B", 3), arm_of("7B", 0), at_most=0),
    "a narrow network: no stage of any model pays on 64 cards":
        lambda rows: verdict(extreme(rows, NARROW, max), f"largest: {NARROW}", at_most=50),
    "rings: stage 3 of 7B stops paying between 1,000 and 10,000 cards":
        lambda rows: single(rows, MOST, arm_of("7B", 3), 1000, 10_000),
    "rings: the larger the model, the more cards pay in stage 3": lambda rows: verdict(
        [min(b / a, c / b) for a, b, c in by_seed(rows, MOST, [arm_of(m, 3) for m in OWN])],
        "least ratio to the next smaller", at_least=1.5),
    "rings: DDP pays on as many cards as stage 3, or more": lambda rows: verdict(
        [min(x) for x in zip(*([a - b for a, b in by_seed(rows, MOST, [arm_of(m, 0), arm_of(m, 3)])]
                               for m in OWN))], "least difference in cards", at_least=-0.5),
    "trees: every stage of every model pays on 98,304 cards":
        lambda rows: verdict(extreme(rows, TREE, min), f"least: {TREE}", at_least=50),
    "4M tokens a step: nothing pays on more than 10,000 cards":
        lambda rows: verdict(extreme(rows, MOST_BATCH, max), "most cards", at_most=10_000),
    **{f"stage 3 of {model} pays from F / 2 B tokens a card on, to 25 %": lambda rows, model=model:
        verdict(of_the_rule(rows, model), "fewest tokens / (F / 2 B)", 0.75, 1.25)
       for model in ("7B", "70B")},
}


def percent(job: Job, stage: int, n: int, cluster=FAST, algorithm: str = "ring") -> float:
    return 100 * job.efficiency(stage, n, cluster, SHARE, algorithm)


def most(efficiency) -> float:
    """The most cards up to which it pays; 0 if it never does."""
    found = 0
    for n in CARDS:
        if efficiency(n) < 50:
            break
        found = n
    return float(found)


def fewest(job: Job, stage: int) -> float:
    """The fewest tokens a card that pay on 64 cards, by halving intervals."""
    low, high = 1.0, 2.0**20
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        pays = percent(job._replace(T=middle), stage, 64) >= 50
        low, high = (low, middle) if pays else (middle, high)
    return high


def held(job: Job, stage: int, n: int) -> float:
    return bytes_held(stage, n, 2, 2) * (job.P + job.root)


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The numbers of a model in a stage."""
    model, stage = ARMS[arm]
    job = JOBS[model]
    N = job.P + job.root
    C = operations(N, 20 * N)
    enough = [n for n in (1, *CARDS) if held(job, stage, n) <= FAST.card.memory]
    def shared(n): return percent(job._replace(T=BATCH / n), stage, n, algorithm="tree")
    def tree(n): return percent(job, stage, n, algorithm="tree")
    def ring(n): return percent(job, stage, n)
    return {GB: held(job, stage, 64) / 1e9, LEAST: float(enough[0]) if enough else 0.0,
            **{name: ring(n) for n, name in AT.items()}, TREE: tree(ALL),
            NARROW: percent(job, stage, 64, SLOW), MOST: most(ring), MOST_TREE: most(tree),
            MOST_BATCH: most(shared), FEWEST: fewest(job, stage),
            YEARS: C / LAPTOP / (365.25 * 86400),
            HOURS: C / (SHARE * FAST.card.peak * 1024 * ring(1024) / 100) / 3600}


def draw(figure, rows):
    """Efficiency by cards, computed again for more numbers of them than the rows have."""
    panels, x = figure.subplots(1, 3, sharey=True), [1, *CARDS]
    for axes, model in zip(panels, OWN):
        for stage in (0, 1, 3):
            for algorithm, style in (("ring", "-"), ("tree", "--")):
                y = [percent(JOBS[model], stage, n, algorithm=algorithm) for n in x]
                name = {0: "DDP", 1: "stages 1, 2", 3: "stage 3"}[stage]
                axes.plot(x, y, style, color=COLORS[stage], linewidth=1.2,
                          label=name if style == "-" else None)
        axes.set(xscale="log", title=model, ylim=(0, 103))
        axes.set_xticks([1, 100, 10_000], ["1", "100", "10k"])
        axes.minorticks_off()
    panels[0].set(ylabel="efficiency, % of a step")
    panels[1].set(xlabel="cards (full: rings, dashed: trees)")
    panels[0].legend(fontsize=6, loc="lower left")


LIKELY = {
    "in a wide one it is, too":
        "of what stage 3 sends all but 8 ms of a step of 830 are hidden, and a card updates a 64th "
        "of the parameters, in 1 ms; with DDP it updates all, in 56 ms",
}
EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
