"""One budget of parameters, spent on other weights: where does LoRA learn most?

    python scripts/experiments/which_weights.py --model runs/pretrain-*/model
    python scripts/experiments/which_weights.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/which_weights.py --rates 1e-3 3e-3 1e-2 --seeds 100

Lecture 002 spends 18M parameters of GPT-3 on one attention matrix of each layer with r = 8, on two
with r = 4 or on all four with r = 2 (Hu et al. 2021, arXiv:2106.09685, table 5). It is better to
spread them, and worst to put all on q or on k. The paper leaves the MLP frozen. A matrix (O, I)
takes r (I + O) numbers, so r = 8 on one attention matrix of C columns and rows in L layers are

    16 C L

Beyond the slide, the arms "down", "up down" and "all" have about as many in the MLP or everywhere,
as near as whole ranks allow; the table shows how many. In the Llama of pretrain.py, "all" has 19 %
more, the other two have 9 % less. Since these small arms may answer nearly nothing rightly,
attention and all layers are also compared at a size of 77 thousand, r = 19 and r = 8.

alpha is 2 r. Two losses are taken for equal if they differ by less than NEAR, which is what lies
between r = 1 and r = 16 in lecture 004. A seed takes about 11 minutes of one core.
"""

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import by_arm, compared, compared_best
from minilm.picture import COLORS, bars
from minilm.trial import KNOWN, LOSS, RIGHT, TRAINED, low_rank, program

QUESTION = "Which weights should be adapted, if their number is given?"

SLIDE = {
    "lecture 002: GPT-3, WikiSQL, %": {
        "q": 70.4, "k": 70.0, "v": 73.0, "o": 73.2, "q k": 71.4, "q v": 73.7, "q k v o": 73.7},
    "lecture 002: GPT-3, MultiNLI, %": {
        "q": 91.0, "k": 90.8, "v": 91.0, "o": 91.3, "q k": 91.3, "q v": 91.3, "q k v o": 91.7},
}
NEAR = 0.07  # nats: 1.23 - 1.16 in lecture 004


def on(layers: str, r: int) -> dict:
    """Settings of rank r on layers with these names."""
    return {"targets": tuple(layers.split())} | low_rank(r)


ATTENTION, EVERYWHERE = "q k v o, 77k", "all, 77k"
ARMS = {
    **{layers: on(layers, 8) for layers in ("q", "k", "v", "o")},
    **{layers: on(layers, 4) for layers in ("q k", "q v")},
    "q k v o": on("q k v o", 2),
    "down": on("down", 4),
    "up down": on("up down", 2),
    "all": on("all-linear", 1),
    ATTENTION: on("q k v o", 19),
    EVERYWHERE: on("all-linear", 8),
}
CLAIMS = {
    "all on q is worse than on q and v":
        lambda rows: compared(rows, LOSS, "q", "q v", at_least=0),
    "all on k is worse than on q and v":
        lambda rows: compared(rows, LOSS, "k", "q v", at_least=0),
    "all on q or all on k is worse than all on v or all on o":
        lambda rows: compared_best(rows, LOSS, ["q", "k"], ["v", "o"],
                                   "best of q and k - best of v and o", at_least=0),
    "q and v are better than v alone":
        lambda rows: compared(rows, LOSS, "q v", "v", at_most=0),
    "q and v are better than q and k":
        lambda rows: compared(rows, LOSS, "q v", "q k", at_most=0),
    "four matrices at r = 2 are as good as any one at r = 8":
        lambda rows: compared_best(rows, LOSS, ["q k v o"], ["q", "k", "v", "o"],
                                   "q k v o - best of q, k, v, o", at_most=NEAR),
    "attention is enough: its loss is that of all layers":
        lambda rows: compared(rows, LOSS, "q k v o", "all", at_most=NEAR),
    "attention is enough: its loss is that of the MLP":
        lambda rows: compared_best(rows, LOSS, ["q v", "q k v o"], ["down", "up down"],
                                   "best of q v and q k v o - best of the MLP", at_most=NEAR),
    "attention is enough at 77k: its loss is that of all layers":
        lambda rows: compared(rows, LOSS, ATTENTION, EVERYWHERE, at_most=NEAR),
    "attention is enough at 77k: it answers within 4 points of all layers":
        lambda rows: compared(rows, RIGHT, ATTENTION, EVERYWHERE, at_least=-4),
}


def draw(figure, rows):
    """The loss of each arm: a bar for the mean, a dot for each seed."""
    axes = figure.subplots()
    bars(axes, by_arm(rows, LOSS),
         lambda arm: COLORS[0] if set(arm.split(",")[0].split()) <= set("qkvo") else COLORS[1])
    axes.set(xlabel=f"{LOSS} (orange: MLP or all)")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, {LOSS: 3, RIGHT: 1, KNOWN: 2, TRAINED: 0},
                        CLAIMS, draw)
main = program(EXPERIMENT)

if __name__ == "__main__":
    command(main)
