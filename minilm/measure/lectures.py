"""The lectures' arithmetic, printed: our formulas, the slides' numbers, and why they differ.

`python scripts/plan_memory.py --lectures` prints it. The formulas are in lecture_numbers.py
(memory), lecture_cards.py (cards and activations), lecture_compute.py (operations) and counts.py
(what methods train). Each table here is rows of text, the first of them a head.
"""

from minilm.data.mixture import mixture_table
from minilm.measure import lecture_cards, lecture_compute
from minilm.measure.counts import GPT2_M, table
from minilm.measure.lecture_numbers import (
    LLAMA_MIXTURE,
    LLAMA_TOKENS,
    LLAMAS,
    Bytes,
    full_float32,
    kinds,
    layer_share,
    one_layer_trainable,
    qlora,
    resident_16bit,
    reversing,
    short,
)
from minilm.measure.step import parameters

# what the slides say
SLIDE_FULL = {7: 140, 13: 260, 70: 1400}  # lecture 004, GB in 32 bits
SLIDE_4BIT = {"7B": 5, "13B": 10, "33B": 21, "65B": 41}  # lecture 002, table 6, GB
SLIDE_16BIT = {"13B": 26, "33B": 66}
SLIDE_RANKS = {  # lecture 001: LoRA's numbers in models of one layer
    1: "167K 228K 529K 849K", 2: "334K 456K 1M 2M", 8: "1M 2M 4M 7M", 16: "3M 4M 8M 14M",
    512: "86M 117M 270M 434M", 1024: "171M 233M 542M 869M", 8192: "1.4B 1.8B 4.3B 7B"}
SLIDE_INT8 = {1.5: 18, 5.6: 69}  # lecture 001: x by 127 / 10.2 = 12.4509, rounded
SLIDE_END = 50526  # lecture 004: the token between two texts of GPT-2


def float32() -> list[list[str]]:
    rows = [["full, float32", *Bytes._fields, "total", "slide", "why"]]
    for n, slide in SLIDE_FULL.items():
        found = full_float32(n * 1e9)
        rows.append([f"Llama-2 {n}B", *map(gb, (*found, found.total)), f"{slide} GB", ""])
    rows[1][-1] = "its activations are an estimate; see below"
    return rows


def low_bits() -> list[list[str]]:
    rows = [["QLoRA, r = 64", "parameters", *Bytes._fields, "total", "slide", "16 bits", "slide",
             "why"]]
    for name, config in LLAMAS.items():
        found, whole = qlora(config), resident_16bit(parameters(config))
        slide, other = SLIDE_4BIT[name], SLIDE_16BIT.get(name)
        why = [f"{found.total / 1e9 / slide - 1:+.1%}: theirs is measured"]
        if other and abs(whole / 1e9 / other - 1) > 0.01:
            why.append(f"{name} are {short(parameters(config))}")
        rows.append([f"LLaMA {name}", short(parameters(config)), *map(gb, (*found, found.total)),
                     f"{slide} GB", gb(whole), f"{other} GB" if other else "", "; ".join(why)])
    return rows


def one_layer() -> list[list[str]]:
    sizes = (7e9, 13e9, 70e9, 180e9)
    rows = [["LoRA, one layer", *map(short, sizes), "slide", "why"]]
    for r, slide in SLIDE_RANKS.items():
        found = [short(one_layer_trainable(n, r)) for n in sizes]
        other = [f"{b} for {a}" for a, b in zip(found, slide.split()) if a != b]
        rows.append([f"rank {r}", *found, ", ".join(other) or "the same",
                     "rounded down" * bool(other)])
    return rows


def small_layer() -> list[list[str]]:
    W, A, B, share = layer_share(768, 768, 16)
    return [["768 x 768, rank 16", "W", "A", "B", "A and B", "slide", "why"],
            ["", f"{W:,}", f"{A:,}", f"{B:,}", f"{share:.1%}", "590k, 12k, 95 % less",
             f"{1 - share:.1%} less, rounded down"]]


def slips() -> list[list[str]]:
    """What a line of arithmetic, or the paper itself, says otherwise than a slide."""
    c = 127 / 10.2
    return [["slips", "is", "slide", "why"],
            *[[f"absmax, {x} in 8 bits", str(round(c * x)), str(slide),
               f"{c * x:.2f}, rounded down"] for x, slide in SLIDE_INT8.items()],
            ["end of a text, GPT-2", str(GPT2_M.vocab_size - 1), str(SLIDE_END),
             f"a slip: there are {GPT2_M.vocab_size:,} tokens"],
            ["MeZO's gain", "memory", "orders of magnitude faster",
             "the abstract of arXiv:2305.17333 has up to 12 x less memory, 2 x fewer GPU hours"]]


def tables() -> list[list[list[str]]]:
    """All tables but the mixture."""
    cards, compute = lecture_cards, lecture_compute
    return [float32(), cards.activation_table(), cards.table(), cards.ten_billion(), low_bits(),
            one_layer(), cards.gpt3(), small_layer(), reversing(), kinds(), compute.hours(),
            compute.gpt4(), compute.growth(), compute.chinchilla(), compute.constants(),
            compute.sizes(), table(), slips()]


def print_lectures():
    """Print every table, with the formulas' numbers and the slides'."""
    for rows in tables():
        show(rows)
    print("Llama: share, epochs and size as the slide has them; tokens = p 1.4T / epochs")
    print(mixture_table(LLAMA_MIXTURE, LLAMA_TOKENS), end="\n\n")


def gb(n: float) -> str:
    return f"{n / 1e9:,.1f} GB"


def show(rows: list[list[str]]):
    """Print rows in columns, numbers to the right, names and reasons to the left, and an empty
    line."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.ljust(width) if head in ("why", "so", "method", "model") or i == 0
                 else cell.rjust(width)
                 for i, (cell, width, head) in enumerate(zip(row, widths, rows[0]))]
        print("  ".join(cells).rstrip())
    print()
