"""The arithmetic of a training step: floating-point operations of its matrix products.

For N rows of a linear layer W (O, I), and of LoRA's A (r, I) and B (O, r) beside it:

    forward    2 N I O               LoRA beside it    2 N r (I + O)                       (1)
    dx         2 N I O               2 N r O for dh, and 2 N r I                           (2)
    dW         2 N I O               2 N r I for dA, and 2 N r O for dB                    (3)

Full training takes 6 N I O. LoRA leaves out dW and takes 4 N I O + 6 N r (I + O). Where no gradient
flows to a layer's input, (2) is dh alone. That is so of the first layers that have an adapter, as
nothing below them trains.

Attention multiplies H heads' queries and keys of width D twice in the forward pass (q k^T, P v) and
four times in the backward pass (dP, dq, dk, dv), with 2 H D operations each for a query and a key.
It goes by tiles of queries, and a causal tile has the keys of its last query for all of them.

Left out is what is no product of matrices: norms, GELU, softmax, the loss, embeddings, AdamW. Left
out, too, is what is only made again to save memory: q k^T in attention's backward pass, and the
forward pass of checkpoints.
"""

from typing import NamedTuple

from minilm.attention import TILE
from minilm.measure.step import Step
from minilm.shapes import linear_layers

ORDER = (("attention.q", "attention.k", "attention.v"), ("attention.o",), ("mlp.gate", "mlp.up"),
         ("mlp.down",))  # the layers of a block that have one input, in the order of forward


class Flops(NamedTuple):
    """Operations of a step, a multiplication and an addition counted as two."""

    forward: int
    backward: int

    total = property(sum)


def flops(s: Step) -> Flops:
    """Operations of a step of full training or of LoRA.

    ValueError for other methods.
    """
    if s.method not in ("full", "lora"):
        raise ValueError(f"the operations of full and lora are known, not those of {s.method}")
    c, N, full = s.config, s.batch * s.T, s.method == "full"
    parts = [_block(s, i) for i in range(c.layers)]
    heads = [(c.vocab_size, c.width), *[(c.width, c.width)] * (c.head == "masked")]
    parts += [_linear(N, O, I, 0, reached=True, trained=full) for O, I in heads]
    return Flops(*map(sum, zip(*parts)))


def _block(s: Step, i: int) -> Flops:
    """Block i. LoRA is in every block, so the first one's input alone may have no gradient."""
    c, N, layers, full = s.config, s.batch * s.T, linear_layers(s.config), s.method == "full"
    reached, parts = s.reaches(i), []
    for paths in ORDER:
        paths = [path for path in paths if path in layers]
        ranks = [s.r * (path in s.adapted) for path in paths]
        parts += [_linear(N, *layers[path], r, reached, full) for path, r in zip(paths, ranks)]
        reached = reached or any(ranks)
        if paths[0] == "attention.q":
            products = 2 * s.batch * c.heads * c.D * pairs(s, i)
            parts.append(Flops(2 * products, 4 * products * reached))
    return Flops(*map(sum, zip(*parts)))


def _linear(N: int, O: int, I: int, r: int, reached: bool, trained: bool) -> Flops:
    """A layer with an adapter of rank r, which may be 0. reached: its input has a gradient."""
    W, A, B = 2 * N * I * O, 2 * N * r * I, 2 * N * r * O
    forward = W + A + B  # eq. (1)
    dx = (W + A) * reached + B  # eq. (2)
    return Flops(forward, dx + W * trained + A + B)  # eq. (3)


def pairs(s: Step, i: int) -> int:
    """Pairs of a query and a key that the tiles of block i hold, for one text.

    >>> from minilm.config import Config
    >>> pairs(Step(Config.gpt2(9, 128, layers=1, heads=1, width=8), "full", 1, T=128), 0)
    12288
    """
    c, T = s.config, s.T
    window = None if i in c.unwindowed else c.window
    found = 0
    for start in range(0, T, TILE):
        stop = min(start + TILE, T)
        first = max(0, start + 1 - window) if window else 0
        found += (stop - start) * ((stop if c.causal else T) - first)
    return found
