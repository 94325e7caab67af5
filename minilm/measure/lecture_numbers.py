"""The lectures' arithmetic of memory and of trainable parameters, as formulas.

`python scripts/plan_memory.py --lectures` prints it (lectures.py), with the slides' numbers and a
word why where they differ. GB is 10^9 bytes.
"""

import math
from typing import NamedTuple

from minilm.data.mixture import from_epochs
from minilm.measure.counts import GPT2_M, lora
from minilm.measure.plan import plan
from minilm.measure.step import KINDS, Step, parameters, trainable
from minilm.shapes import linear_layers
from minilm.transformer import Config


class Bytes(NamedTuple):
    """What a run takes, part by part."""

    weights: float
    optimizer: float
    gradients: float
    activations: float = 0.0

    total = property(sum)


def full_float32(parameters: float) -> Bytes:
    """Full fine-tuning in float32, 20 bytes a parameter ("Computational challenges").

    The 4 bytes of activations are the slide's own estimate: they grow with the batch and its
    length, not with the parameters alone. `measure/plan.py` counts them.
    """
    return Bytes(4 * parameters, 8 * parameters, 4 * parameters, 4 * parameters)


def full_16bit(parameters: float) -> Bytes:
    """Full fine-tuning in 16 bits, 12 bytes a parameter.

    The slide draws a base model in FP16 and an optimizer state in FP32, "10B -> 120GB". We read it
    as 2 bytes for weights, 2 for gradients and 8 for AdamW's two states; nothing is left for
    activations. With 12 bytes a parameter, 65B take the "more than 780 GB" of Dettmers et al. 2023,
    arXiv:2305.14314, section 1.
    """
    return Bytes(2 * parameters, 8 * parameters, 2 * parameters)


def lora_16bit(parameters: float, trained: float) -> Bytes:
    """LoRA in 16 bits: 2 bytes a frozen parameter, and `full_16bit` for those trained.

    The slide says "10B -> ~40GB". The base takes 20 GB of it. Adapters of 1 %, with gradients and
    states, add 1.2 GB. The other 19 GB, nearly half, are the slide's approximation: room for
    activations, which no count of parameters gives. `measure/plan.py` finds as much for one row of
    1400 tokens in a GPT of that size (32 layers of width 5120) without checkpoints.
    """
    adapters = full_16bit(trained)
    return adapters._replace(weights=2 * parameters + adapters.weights)


def llama(layers: int, width: int, hidden: int) -> Config:
    """LLaMA (Touvron et al. 2023, arXiv:2302.13971, table 2): heads of 128, 32000 tokens."""
    return Config.llama(32000, 2048, layers, width // 128, width, hidden)


LLAMAS = {"7B": llama(32, 4096, 11008), "13B": llama(40, 5120, 13824),
          "33B": llama(60, 6656, 17920), "65B": llama(80, 8192, 22016)}


def qlora(config: Config, r: int = 64, batch: int = 1, T: int = 512, paged: bool = True) -> Bytes:
    """QLoRA as Guanaco was trained: "65B on a 48 GB GPU", "33B on 24 GB".

    NF4 with double quantization takes 4.127 bits a weight. Embeddings, norms and head stay in 16
    bits. So do the adapters, which are on every linear layer, and their gradients. (In plan.py
    these gradients are float32, and adapters have masters.) Each block runs under a checkpoint.
    AdamW's float32 states are paged. They count as 0 here, since they can wait in the host's memory
    while activations are at their highest. The slide's 41, 21, 10 and 5 GB are published
    measurements; the formula comes near them but need not meet them.
    """
    step = Step(config, "qlora", batch, T, r, "all-linear", "bfloat16", 1, "cuda")
    p, trained = plan(step), trainable(step)
    return Bytes(p.weights + p.adapters, 0 if paged else 8 * trained, 2 * trained, p.activations)


def resident_16bit(parameters: float) -> float:
    """Bytes of a model that answers in 16 bits; lecture 002 has 66 GB for 33B and 26 GB for 13B.

    LLaMA's 33B are 32.5B, so it is 65.1 GB.
    """
    return 2 * parameters


def one_layer_trainable(parameters: float, r: int) -> float:
    """LoRA's parameters if the whole model were one square layer: A (r, C) and B (C, r), C^2 = N.

    The slide says: "This is a generalization considering an LLM of one layer." Rounded to nearest
    by `short`, this gives the slide's table. Only four entries differ, which the slide rounds down:
    334K (rank 2, 7B), 270M (512, 70B), 233M (1024, 13B) and 1.8B (8192, 13B).
    """
    return 2 * r * math.sqrt(parameters)


def short(n: float) -> str:
    """A count as the slide prints it: whole thousands or millions, billions with one digit."""
    if n >= 1e9:
        return f"{n / 1e9:.1f}".removesuffix(".0") + "B"
    return f"{n / 1e6:.0f}M" if n >= 1e6 else f"{n / 1e3:.0f}K"


def layer_share(O: int, I: int, r: int) -> tuple[int, int, int, float]:
    """(numbers in W (O, I), in A (r, I), in B (O, r), the share of A and B together in W's).

    The slide says "W 590k; A, B 12k; 95 % less". A and B have 12k each; exactly it is 95.8 % less.
    """
    return O * I, r * I, O * r, r * (O + I) / (O * I)


MISTRAL = Config.llama(32000, 4096, 32, 32, 4096, 14336, kv_heads=8)  # Jiang et al. 2023, 7B


def packed(c: Config) -> int:
    """The numbers that a program counts in a model of 4 bits: two codes of a linear layer are one
    uint8. Embeddings, norms and the head are as they were.

    Lecture 003 has "3,8B" for Mistral's 7.24B and its adapters. bitsandbytes packs codes so.
    """
    codes = c.layers * sum(O * I for O, I in linear_layers(c).values())
    return parameters(c) - codes + codes // 2


def reversing(r: int = 64) -> list[list[str]]:
    """Lecture 003's "what we trained": QLoRA on q and v of Mistral 7B.

    The slide's "2,7M" is a tenth of what its own shapes give.
    """
    rows, layers = [["QLoRA, Mistral 7B", "W", "A", "B", "A and B", "slide", "why"]], MISTRAL.layers
    for path, (O, I) in linear_layers(MISTRAL).items():
        if path.split(".")[-1] in ("q", "v"):
            _, A, B, _ = layer_share(O, I, r)
            rows.append([f"{path}, rank {r}", f"{I} x {O}", f"{I} x {r}", f"{r} x {O}",
                         f"{A + B:,}", "the same", ""])
    trained = lora(MISTRAL, r)
    rows.append([f"q and v, {layers} layers", *[""] * 3, f"{trained:,}", "2.7M",
                 "a tenth of what its shapes give"])
    rows.append(["and the packed base", *[""] * 3, f"{(packed(MISTRAL) + trained) / 1e9:.3f}B",
                 "3.8B", "two codes of 4 bits counted as one number"])
    return rows


LLAMA_TOKENS = 1.4e12  # that the larger models saw
LLAMA_MIXTURE = [from_epochs(name, share / 100, epochs, size, LLAMA_TOKENS)  # lecture 004, table 1
                 for name, share, epochs, size in (
    ("CommonCrawl", 67.0, 1.10, 3.3e12), ("C4", 15.0, 1.06, 783e9), ("Github", 4.5, 0.64, 328e9),
    ("Wikipedia", 4.5, 2.45, 83e9), ("Books", 4.5, 2.23, 85e9), ("ArXiv", 2.5, 1.06, 92e9),
    ("StackExchange", 2.0, 1.03, 78e9))]


def kinds() -> list[list[str]]:
    """The slide's three methods of PEFT, "additive, selective, reparameterization": which ones of
    finetune.py are of each kind, and what they train of GPT-2 medium as plan_memory.py has them."""
    rows = [["PEFT, GPT-2 medium", "method", "trained", "share"]]
    for kind, methods in KINDS.items():
        for method in methods:
            targets = ("k", "v", "down") if method == "ia3" else ("q", "v")
            n = trainable(Step(GPT2_M, method, 1, 512, targets=targets))
            rows.append([kind, method, f"{n:,}", f"{n / parameters(GPT2_M):.3%}"])
    return rows
