"""The lectures' arithmetic of cards: which model fits which, how many are needed, and activations.

`python scripts/plan_memory.py --lectures` prints it, with the slide's numbers beside it. GB is 10^9
bytes. The bytes of a parameter are those of lecture_numbers.py.
"""

import math
from dataclasses import replace
from functools import cache

from minilm.measure.counts import GPT3, lora
from minilm.measure.lecture_numbers import (
    LLAMAS,
    full_16bit,
    full_float32,
    lora_16bit,
    qlora,
    resident_16bit,
)
from minilm.measure.plan import plan
from minilm.measure.step import Step, parameters
from minilm.transformer import Config

CARDS = {"T4 16": 16e9, "A10 24": 24e9, "A100 40": 40e9, "A100 80": 80e9}  # lecture 004
CONSUMER = 24e9  # lecture 001, "top-of-the-line consumer-grade"
LLAMA2 = {  # Touvron et al. 2023, arXiv:2307.09288
    "7B": replace(LLAMAS["7B"], context=4096), "13B": replace(LLAMAS["13B"], context=4096),
    "70B": Config.llama(32000, 4096, 80, 64, 8192, 28672, kv_heads=8)}
TEN_B = Config.gpt2(50257, 8192, 32, 40, 5120)  # 10 billion parameters


def cards(size: float, card: float) -> int:
    """How many cards hold so many bytes.

    >>> cards(120e9, 24e9)
    5
    """
    return math.ceil(size / card)


def fits(size: float, card: float) -> str:
    """Whether a card holds so many bytes, or how many do."""
    n = cards(size, card)
    return "fits" if n <= 1 else f"{n} cards"


def table() -> list[list[str]]:
    """Models, and what is done with them, by cards. The slide has the bytes of weights in 32 bits
    and the cards, side by side."""
    rows = [["models and cards", "bytes", *CARDS, "slide"]]
    slide = {"7B": "28 GB, 140 GB", "13B": "52 GB, 260 GB", "70B": "280 GB, 1400 GB"}
    for name, config in LLAMA2.items():
        N = float(name[:-1]) * 1e9
        held, full = slide[name].split(", ")
        kinds = {"weights, 32 bits": (4 * N, held), "weights, 16 bits": (resident_16bit(N), ""),
                 "full, 32 bits": (full_float32(N).total, full),
                 "full, 16 bits": (full_16bit(N).total, ""),
                 "LoRA on 1 %, 16 bits": (lora_16bit(N, N / 100).total, ""),
                 "QLoRA, 512 tokens": (qlora(config).total, "")}
        for kind, (size, told) in kinds.items():
            rows.append([f"Llama-2 {name}, {kind}", f"{size / 1e9:,.1f} GB",
                         *(fits(size, card) for card in CARDS.values()), told])
    return rows


@cache
def activations(config: Config, T: int, dtype: str = "float32", method: str = "full",
                every: int = 0) -> int:
    """Bytes of a step's activations for one row of T tokens, on a card."""
    step = Step(config, method, 1, T, dtype=dtype, checkpoint_every=every, device="cuda")
    return plan(step).activations


def longest(config: Config, size: float, **how) -> int:
    """The tokens of the longest row whose activations take no more; 0 if a token takes more."""
    low, high = 0, config.context + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if activations(config, middle, **how) <= size else (low, middle)
    return low


def activation_table() -> list[list[str]]:
    """Activations in bytes a parameter, of full training in float32. The slide says 4."""
    lengths = (128, 512, 2048, 4096)
    rows = [["activations, 1 row", *(f"{T} tokens" for T in lengths), "slide", "4 bytes at"]]
    for name, config in LLAMA2.items():
        N = parameters(config)
        for every in (0, 1):
            found = [activations(config, T, every=every) / N for T in lengths]
            T = longest(config, 4 * N, every=every)
            most = f"{T:,} tokens" if T < config.context else f"more than {T:,} tokens"
            rows.append([f"Llama-2 {name}" + ", checkpoints" * every,
                         *(f"{x:.2f}" for x in found), "4", most])
    return rows


def ten_billion() -> list[list[str]]:
    """16 bits: what 10B and 65B take, and how many cards of 24 GB."""
    full, adapted = full_16bit(10e9).total, lora_16bit(10e9, 1e8).total
    room = 40e9 - adapted
    few, many = (longest(TEN_B, n * CONSUMER - full, dtype="bfloat16") for n in (6, 7))
    T = longest(TEN_B, room, dtype="bfloat16", method="lora")
    def row(name, size, *more): return [name, f"{size / 1e9:.1f} GB", str(cards(size, CONSUMER)),
                                        *more]
    return [
        ["16 bits", "total", "cards of 24 GB", "slide", "why"],
        row("full, 10B", full, "120 GB, 5 cards", ""),
        row(f"and {many:,} tokens", full + activations(TEN_B, many, "bfloat16"), "7 cards",
            f"so many for a row of {few + 1:,} to {many:,} tokens"),
        row("LoRA, 10B, 1 % trained", adapted, "~40 GB",
            f"the other {room / 1e9:.1f} GB: activations of a row of {T:,} tokens"),
        row("full, 65B", full_16bit(65e9).total, "780 GB", "")]


def gpt3() -> list[list[str]]:
    """LoRA on q and v of GPT-3 against all of it: how much fewer numbers, how much less memory."""
    N, rows = parameters(GPT3), [["GPT-3, q and v", "trained", "fewer", "slide", "why"]]
    for r, slide, why in ((1, "4.7M", ""), (4, "10,000 x", "rounded up"), (8, "37.7M", "")):
        rows.append([f"rank {r}", f"{lora(GPT3, r) / 1e6:.1f}M", f"{N / lora(GPT3, r):,.0f} x",
                     slide, why])
    full, adapted = full_16bit(N).total, lora_16bit(N, lora(GPT3, 4)).total
    paper = 1.2e12  # Hu et al. 2021, section 4.2: from 1.2 TB to 350 GB
    rows.append(["memory, rank 4", f"{adapted / 1e9:.0f} GB", f"{full / adapted:.1f} x", "3 x",
                 f"the paper's 1.2 TB are {paper / N:.1f} bytes a parameter, not 12"])
    return rows
