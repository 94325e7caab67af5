"""How many numbers each method of adaptation trains, from a Config alone, and the lectures' tables.

For width C, L blocks, r the rank or m the width of a bottleneck:

    LoRA          sum of r (I + O) over its layers; DoRA O more, AdaLoRA r more for each layer
    bottleneck    2 C m + m + C for each, 2 C more in form L; and the norms that are trained
    BitFit        all biases: in GPT-2 11 C L + C
    top k         the last k blocks and the last norm: in GPT-2 k (12 C^2 + 13 C) + 2 C
    IA3           O of each layer, or I of those whose input is scaled
    prompt        p C for p rows
    prefix        2 p K D L; with an MLP of h numbers p C + C h + h + 2 K D L (h + 1)

The tables are those of Hu et al. 2021, arXiv:2106.09685. `python scripts/plan_memory.py --lectures`
prints ROWS.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from minilm.config import Config
from minilm.shapes import linear_layers, tensor_shapes


def chosen(c: Config, targets=("q", "v")) -> set[str]:
    """The layers of a block that targets name, as in add_lora: their paths within it.

    ValueError for a target that matches nothing.
    """
    paths = set(linear_layers(c))
    if targets == "all-linear":
        return paths
    def fits(path, target): return f".{path}".endswith(f".{target}")
    wrong = [t for t in targets if not any(fits(p, t) for p in paths)]
    if wrong or not targets:
        raise ValueError(f"targets {wrong} match no layer of a block; there are "
                         f"{sorted(paths)} and 'all-linear'")
    return {p for p in paths if any(fits(p, t) for t in targets)}


def sizes(c: Config, targets) -> list[tuple[int, int]]:
    """(O, I) of each layer of a block that targets name."""
    return [linear_layers(c)[path] for path in chosen(c, targets)]


def lora(c: Config, r: int, targets=("q", "v")) -> int:
    """LoRA's A and B. For GPT-3 with adapters on q and v it gives the paper's 4.7M at r = 1 and
    37.7M at r = 8 (Hu et al. 2021, table 4)."""
    return c.layers * r * sum(map(sum, sizes(c, targets)))


def dora(c: Config, r: int, targets=("q", "v")) -> int:
    """LoRA's, and m (O,)."""
    return lora(c, r, targets) + c.layers * sum(O for O, _ in sizes(c, targets))


def adalora(c: Config, r: int, targets="all-linear") -> int:
    """P, Q and lam of the first rank r."""
    return lora(c, r, targets) + c.layers * r * len(sizes(c, targets))


def ia3(c: Config, targets=("k", "v", "down")) -> int:
    """l, of `down` on its input and of all others on their output."""
    return c.layers * sum(linear_layers(c)[path][path.endswith("down")]
                          for path in chosen(c, targets))


def bottleneck(c: Config, m: int, form: str = "H", skip: int = 0, norms: bool = False) -> int:
    """W_down, b_down, W_up, b_up; form L's own norm; with `norms` the blocks' norms."""
    C, kinds = c.width, 2 if c.norm == "layer" else 1
    each = 2 * C * m + m + C + (2 * C if form == "L" else 0)
    return (c.layers - skip) * ((2 if form == "H" else 1) * each + norms * 2 * kinds * C)


def bitfit(c: Config) -> int:
    """Every bias."""
    return sum(prod(s) for path, s in tensor_shapes(c).items() if path.endswith(".bias"))


def top(c: Config, k: int) -> int:
    """The last k blocks and the last norm."""
    trained = ("norm.", *(f"blocks.{i}." for i in range(c.layers - k, c.layers)))
    return sum(prod(s) for path, s in tensor_shapes(c).items() if path.startswith(trained))


def prompt(c: Config, length: int) -> int:
    """P (p, C)."""
    return length * c.width


def prefix(c: Config, length: int, hidden: int | None = None) -> int:
    """P_k and P_v of each layer; with `hidden` E, W, b and each layer's end of the MLP."""
    each = 2 * c.kv_heads * c.D
    if hidden is None:
        return c.layers * each * length
    return (length + hidden) * c.width + hidden + c.layers * each * (hidden + 1)


ROBERTA = Config.bert(50265, 514, layers=12, heads=12, width=768, hidden=3072)
ROBERTA_LARGE = Config.bert(50265, 514, layers=24, heads=16, width=1024, hidden=4096)
DEBERTA = Config.bert(128100, 512, layers=48, heads=24, width=1536, hidden=6144)  # V2 XXL
GPT2_M = Config.gpt2(50257, 1024, layers=24, heads=16, width=1024)
GPT3 = Config.gpt2(50257, 2048, layers=96, heads=96, width=12288)  # Brown et al. 2020, table 2.1


class Row(NamedTuple):
    """A line of a slide."""

    model: str
    method: str
    count: Callable[[], float]  # by our formula
    slide: str  # in millions
    why: str = ""  # if they differ


ROWS = [
    Row("RoBERTa base", "LoRA, r = 8", lambda: lora(ROBERTA, 8), "0.3"),
    Row("RoBERTa base", "Adapter D, m = 16", lambda: bottleneck(ROBERTA, 16, "P"), "0.3"),
    Row("RoBERTa base", "Adapter D, m = 48", lambda: bottleneck(ROBERTA, 48, "P"), "0.9"),
    Row("RoBERTa large", "LoRA, r = 8", lambda: lora(ROBERTA_LARGE, 8), "0.8"),
    Row("RoBERTa large", "Adapter P, m = 16", lambda: bottleneck(ROBERTA_LARGE, 16, "P"), "0.8"),
    Row("RoBERTa large", "Adapter H, m = 8", lambda: bottleneck(ROBERTA_LARGE, 8), "0.8"),
    Row("DeBERTa XXL", "LoRA, r = 16", lambda: lora(DEBERTA, 16), "4.7"),
    Row("GPT-2 medium", "Adapter L, m = 6", lambda: bottleneck(GPT2_M, 6, "L"), "0.37"),
    Row("GPT-2 medium", "Adapter L, m = 224", lambda: bottleneck(GPT2_M, 224, "L"), "11.09"),
    Row("GPT-2 medium", "Adapter H, m = 112", lambda: bottleneck(GPT2_M, 112), "11.09",
        "no m gives it, with norms or without"),
    Row("GPT-2 medium", "FT, top 2", lambda: top(GPT2_M, 2), "25.19"),
    Row("GPT-2 medium", "LoRA, r = 4", lambda: lora(GPT2_M, 4), "0.35",
        "0.1 % of the model is 0.35"),
    Row("GPT-3", "LoRA, r = 1", lambda: lora(GPT3, 1), "4.7"),
    Row("GPT-3", "LoRA, r = 8", lambda: lora(GPT3, 8), "37.7"),
    Row("GPT-3", "Adapter H, m = 1", lambda: bottleneck(GPT3, 1), "7.1"),
    Row("GPT-3", "Adapter H, m = 8", lambda: bottleneck(GPT3, 8), "40.1"),
    Row("GPT-3", "PrefixEmbed, 256 + 8", lambda: prompt(GPT3, 256 + 8), "3.2"),
    Row("GPT-3", "PrefixLayer, 8 + 8", lambda: prefix(GPT3, 8), "20.2", "L C (8 + 8) are 18.9"),
    Row("GPT-3", "BitFit", lambda: bitfit(GPT3), "14.2", "12 C L are 14.2; GPT-3 has 11 C L + C"),
]


def table() -> list[list[str]]:
    """ROWS as text: what a method trains, in millions with the slide's digits, and the slide's."""
    lines = [["trained, millions", "method", "formula", "slide", "why"]]
    for row in ROWS:
        digits = len(row.slide.partition(".")[2])
        lines.append([row.model, row.method, f"{row.count() / 1e6:.{digits}f}", row.slide, row.why])
    return lines
