"""What outlier features do to 8-bit products, and to a model that loses them.

    python scripts/experiments/outliers.py --model runs/pretrain-*/model
    python scripts/experiments/outliers.py --quick    # seconds; the numbers mean nothing

Lecture 000 says: a uniform mapping does not work with outliers, it would be mostly wasted; they are
really important for low perplexity; so LLM.int8() handles them apart, C = the sum over the features
h in O of X_f16 W_f16 + S times the sum of the others of X_i8 W_i8. Its source is Dettmers et al.
2022, arXiv:2208.07339: from 6.7 billion parameters on, models have such features. If they are set
to 0, perplexity rises by 600 to 1000 %; if as many others are, by .1 %.

Small models have hardly any, so two are planted at each place that can carry them. An arm is their
size. The function stays: minilm/quantize/outliers.py has the equation. A GPT-2 carries them in the
inputs of q, k, v, o and the MLP; a Llama of pretrain.py --bias in those of o. Columns:

    float32                the model itself
    int8 weights           a constant a row; products in float32
    int8 x int8            a constant a row of X, too: LLM.int8() without O
    LLM.int8()             the lecture's equation: features with any |x| >= 6 in 16 bits
    LLM.int8(), W in int8  the same, but all of W is kept in 8 bits, the columns of O as well
    the two zeroed         the planted features are 0 in the input of each layer that reads them
    two others zeroed      the same with as many others

O is sought in 32 rows of text at once. A trained model has features of 6 and more of its own, in
the inputs of `down`; the share of columns in O counts them all. The text is what pretrain.py has
held out. A seed takes about two minutes of one core.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import by_arm, single, verdict
from minilm.nn import Linear, Module
from minilm.peft.adapted import chosen
from minilm.picture import COLORS, curve
from minilm.quantize import int8_matmul_outliers, quantize_model
from minilm.quantize.linear import QuantizedLinear
from minilm.quantize.outliers import other_features, places, plant_outliers, watched, zero_features
from minilm.ranges import AT_LEAST_0
from minilm.tensor import Tensor
from minilm.transformer import Transformer
from minilm.trial import Trial, base, old_text, program, writer

QUESTION = "What do outlier features do to 8-bit products, and what is a model without them?"
SLIDE = {}  # the slides give no numbers


@dataclass(frozen=True)
class Planted(Trial):
    """A model as it is, and what is planted in it."""

    steps: int = 0
    size: float = 0.0
    """of each outlier"""

    RANGES: ClassVar = Trial.RANGES | {"size": AT_LEAST_0}


ARMS = {f"size {size}" if size else "none": {"size": float(size)}
        for size in (0, 10, 30, 100, 300)}
SOME, FAR = "size 100", "size 300"  # a few times, and many times the largest of its own
FLOAT, WEIGHTS, PLAIN = "float32", "int8 weights", "int8 x int8"
MIXED, CODES = "LLM.int8()", "LLM.int8(), W in int8"
ZEROED, OTHERS = "the two zeroed", "two others zeroed"
TABLE = (FLOAT, WEIGHTS, PLAIN, MIXED, CODES, ZEROED, OTHERS)
SHARE, LARGEST = "columns in O, %", "largest |x|"
MEASURES = {f"perplexity, {name}": 3 for name in TABLE} | {SHARE: 1, LARGEST: 0}


def rise(rows, name: str, arm: str, **bounds):
    """By how much the perplexity of an arm is above that of float32 without outliers, in per cent?
    """
    of = {(row["arm"], row["seed"]): row for row in rows}
    d = [100 * (of[arm, seed][f"perplexity, {name}"] / row[f"perplexity, {FLOAT}"] - 1)
         for (other, seed), row in sorted(of.items()) if other == "none" and (arm, seed) in of]
    return verdict(d, f"{arm}, {name} against float32, %", **bounds)


COLUMN = f"with all of W in 8 bits it is within .1 %, too, at {FAR}"
LIKELY = {COLUMN: "the outlier's own column of W is rounded, too, and the outlier multiplies that "
                  "error: with W in 8 bits and products in float32 as much is lost"}
CLAIMS = {
    f"float32 does not change: at {FAR} its perplexity moves by less than .01 %":
        lambda rows: rise(rows, FLOAT, FAR, at_least=-0.01, at_most=0.01),
    "without them 8 bits are enough: int8 x int8 is within .5 %":
        lambda rows: rise(rows, PLAIN, "none", at_most=0.5),
    f"int8 x int8 loses 1 % or more at {SOME}":
        lambda rows: rise(rows, PLAIN, SOME, at_least=1),
    f"int8 x int8 collapses at {FAR}: perplexity rises by half or more":
        lambda rows: rise(rows, PLAIN, FAR, at_least=50),
    **{f"LLM.int8() is within .1 % of float32 at {arm}":
        lambda rows, arm=arm: rise(rows, MIXED, arm, at_least=-0.1, at_most=0.1)
        for arm in (SOME, FAR)},
    COLUMN:
        lambda rows: rise(rows, CODES, FAR, at_least=-0.1, at_most=0.1),
    "O has less than a fifth of the columns":
        lambda rows: single(rows, SHARE, SOME, at_most=20),
    f"outliers are important: without the two, perplexity rises by 600 % or more, at {SOME}":
        lambda rows: rise(rows, ZEROED, SOME, at_least=600),
    f"others are not: without two of them it rises by less than 5 %, at {SOME}":
        lambda rows: rise(rows, OTHERS, SOME, at_most=5),
    "it is their size: without outliers, the same two features are worth less than 5 %":
        lambda rows: rise(rows, ZEROED, "none", at_most=5),
}


class Mixed(Module):
    """A linear layer whose product is the lecture's: W in floats is put in 8 bits, but for O."""

    tokenwise = True

    def __init__(self, layer: Linear):
        self.layer = layer

    def forward(self, x):  # (..., I) -> (..., O)
        y = int8_matmul_outliers(x.data, self.layer.weight.data)
        return Tensor(y if self.layer.bias is None else y + self.layer.bias.data)


def measured(s: Planted, run, title: str) -> dict:
    """The perplexity of a byte for each model of TABLE, and what is in O."""
    found = {}
    for name in TABLE:
        model, tokenizer = model_of(s, name)
        with watched(model) as seen:
            found[f"perplexity, {name}"] = float(2 ** old_text(model, tokenizer, s))
        if name == CODES:
            found |= {SHARE: 100 * seen.share, LARGEST: seen.largest}
    return found


def model_of(s: Planted, name: str):
    """(one of the models of TABLE, its tokenizer)."""
    model, tokenizer = base(s.model)
    planted = plant_outliers(model, s.size, seed=s.seed)
    if name == ZEROED:
        zero_features(model, planted)
    elif name == OTHERS:
        zero_features(model, other_features(model, planted, s.seed))
    elif name == MIXED:
        for path, layer in chosen(model, "all-linear").items():
            model.replace(path, Mixed(layer))
    elif name != FLOAT:
        quantize_model(model, "int8" if name == WEIGHTS else "llm.int8")
    if name == PLAIN:
        for _, layer in model.named_modules():
            if type(layer) is QuantizedLinear:
                layer.threshold = np.inf
    return model, tokenizer


def draw(figure, rows):
    """By size of the outliers: left the 8-bit products, right what the features are worth."""
    left, right = figure.subplots(1, 2)
    for name, color in zip(TABLE[:5], COLORS):
        curve(left, by_size(rows, name), color, name)
    for name, color in zip((FLOAT, ZEROED, OTHERS), (COLORS[0], *COLORS[5:])):
        curve(right, by_size(rows, name), color, name)
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=10)
        axes.set_yscale("log")
        axes.set_xlabel("size of the outliers")
        axes.set_ylim(top=axes.get_ylim()[1] * 2)
        axes.legend(frameon=False, fontsize=7, loc="upper left")
    left.set_ylabel("perplexity of a byte")


def by_size(rows, name: str) -> dict[float, list[float]]:
    """size -> perplexities."""
    return {ARMS[arm]["size"]: numbers
            for arm, numbers in by_arm(rows, f"perplexity, {name}").items()}


def carries(config, folder):
    """ValueError for a model that writes no text, or has no biases that carry outliers."""
    writer(config, folder)
    if not places(Transformer(config, seed=None)):
        raise ValueError(f"{folder} has no biases that can carry outliers: train one with "
                         "pretrain.py --bias, or --family gpt2")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured, Planted, carries)

if __name__ == "__main__":
    command(main)
