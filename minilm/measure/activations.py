"""Bytes of the activations of a training step: what is alive at its highest moment.

Each part of the model is an `Op`. It says what its vjps keep until the backward pass is through
with them, and what is alive only while it runs; `peak` goes through the ops in order.

Letters: B batch, T tokens, N = B T rows, C width, H heads, D head width, V vocabulary, I in, O out,
r rank. Everything else is in bytes.

What is kept it says to the byte (`tests/test_kept.py`), but for numbers that do not grow with the
batch. For full, LoRA and QLoRA it predicts the measured peak. Of the other methods it leaves out
some that is alive for a moment: DoRA's W0 + s B A, AdaLoRA's lam Q and R(P, Q), a prefix's MLP. It
has been within 2 % for them (`tests/test_plan_memory.py`).
"""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from minilm.arrays import BLOCK
from minilm.attention import TILE
from minilm.measure.step import Step, parameters, trainable
from minilm.peft.subspace import power_of_2

QKV = ("attention.q", "attention.k", "attention.v")


class Op(NamedTuple):
    """A part of the model; a list of them is in the order of the forward pass."""

    saved: int  # what its vjps keep until they have run
    forward: int  # alive while it runs, beside what earlier ops saved
    backward: int  # alive while its vjps run, beside what it and earlier ops saved


def peak(ops: Iterable[Op]) -> int:
    """The highest moment: at each op, the backward pass finds what the forward pass had saved."""
    saved = highest = 0
    for op in ops:
        highest = max(highest, saved + op.forward)
        saved += op.saved
        highest = max(highest, saved + op.backward)
    return highest


def step(s: Step) -> list[Op]:
    """All of a training step.

    The gradient of the residual stream is counted in each op. The gradient of a tied embedding is
    alive from the head down to the embedding.
    """
    c, full = s.config, s.whole
    x, table = s.array(c.width), c.vocab_size * c.width * s.size
    held = table if full and c.tied else 0
    # AdamW's temporary u, one block, comes when all else is gone. The embedding sorts the rows of
    # dy and adds them up. If it is tied, the head's part is added then.
    ops = [Op(0, updating(s), 0),
           Op(0, 3 * x, 3 * x + (3 if c.tied else 1) * table if full else 0)]
    if not c.norm_first:
        ops.append(norm(s, 0, full))
        if s.method == "prompt":  # the norm of its rows
            ops.append(Op(s.array(c.width + 1, wide=True, rows=s.front), 0, 0))
    ops += [Op(op.saved, op.forward, op.backward + held) for op in blocks(s)]
    if c.norm_first:
        ops.append(norm(s, x, True))
    return [*ops, head(s)]


def updating(s: Step) -> int:
    """What the optimizer has for a moment: AdamW's u, or the gradient of theta^D beside the three
    arrays of a transform."""
    if s.method == "subspace":
        return 4 * (parameters(s.config) + 3 * power_of_2(parameters(s.config)))
    return 4 * min(trainable(s), BLOCK)


def blocks(s: Step) -> list[Op]:
    """All blocks, or all checkpointed segments, which save only their input x.

    The functions that run the blocks hold the embedding's output and a block's input; for the first
    block they are the same. A segment that runs again holds its input, which its first block saves
    too. If the norm comes after the residual, a trained layer saves both in any case.
    """
    c, k, x = s.config, s.checkpoint_every, s.array(s.config.width)
    apart = s.method == "top" and not c.norm_first  # trained blocks save their inputs, no others
    held = c.norm_first or not (s.k == c.layers if apart else s.keeps(*QKV))
    most = 1 if apart else 2
    alive = [(i % k > 0 if k else min(i + 1, most)) * x * held for i in range(c.layers)]
    each = [block(s.within(i), alive[i], s.reaches(i)) for i in range(c.layers)]
    if not k:
        return list(chain(*each))
    parts = [chain(*each[i : i + k]) for i in range(0, c.layers, k)]
    # The first run, without a graph, needs less than the second. If the norm comes first, the
    # gradient dy is alive beside the second run. If not, the input, counted twice, stands for it.
    return [Op(x, 0, x * c.norm_first + peak(part)) for part in parts]


def block(s: Step, alive: int, flows: bool) -> list[Op]:
    """Attention, MLP and their norms. alive: bytes that outer functions hold. flows: does a
    gradient flow to the block's input?"""
    attend = [attention(s, alive, flows), bottleneck(s, alive, flows, s.form == "H")]
    first = norm(s, alive, flows, trained=s.whole)
    flows = flows or s.trains("attention.") or attend[1].saved > 0
    flown = flows or s.trains("mlp.") or s.method == "bottleneck"  # behind the MLP
    if not s.config.norm_first or s.config.norm_output:
        around = s.method == "bottleneck" and s.form == "P" and not s.config.norm_first
        inner = [norm(s, alive, flows)] if around else []
        return [*attend, norm(s, alive, flows), mlp(s, alive, flows), *inner,
                bottleneck(s, alive, flows), norm(s, alive, flown)]
    alive2 = alive + s.array(s.config.width)  # the block's input is held beside the sum after it
    both = [norm(s, alive, flows)] if s.config.norm_both else []
    last = [norm(s, alive2, flown)] if s.config.norm_both else []
    return [first, *attend, *both, norm(s, alive2, flows), mlp(s, alive2, flows),
            bottleneck(s, alive2, flows), *last]


def bottleneck(s: Step, alive: int, flows: bool, there: bool = True) -> Op:
    """It keeps its input, which form L's norm makes of xhat, and its middle after f, a ReLU."""
    if s.method != "bottleneck" or not there:
        return Op(0, 0, 0)
    x, middle = s.array(s.config.width), s.array(s.m)
    saved = x + middle + (x + flows * s.array(1, wide=True) if s.form == "L" else 0)
    return Op(saved, alive + saved + x, 3 * x + middle)


def norm(s: Step, alive: int, flows: bool, trained: bool = False) -> Op:
    """A norm keeps xhat and rstd for dx; the gradients of g and b need xhat alone. On a GPU
    rms_norm keeps x instead of xhat. The next layer keeps the result, if it is trained."""
    x, rstd = s.array(s.config.width), s.array(1, wide=True)
    xhat = s.array(s.config.width, wide=s.config.norm == "layer" or s.device == "cpu")
    # forward: xhat, y, xhat g. backward: the residual's gradient, dy, dx, and a temporary or sum
    return Op((flows or trained) * xhat + flows * rstd, alive + 3 * xhat, 3 * x + xhat)


def attention(s: Step, alive: int, flows: bool) -> Op:
    """q, k, v, softmax(q k^T) v, and o.

    Saved: the input, for the dW or dA of q, k, v; the scaled q, k, v; the result y, also the input
    of o. Both passes make each tile's P (b, H, t, s), and a cap's slope like P, and widen 16-bit q,
    k, v.
    """
    c, names = s.config, QKV
    x, y = s.array(c.width), s.array(c.heads * c.D)
    qkv, normed = (c.heads + 2 * c.kv_heads) * c.D, (c.heads + c.kv_heads) * c.D
    operands = s.array(qkv, wide=True) if s.size == 2 else 0
    graph = flows or s.trains(*names)
    entry = s.keeps(*names) * x
    P, gradients = tile(s)
    made = P * (2 if c.attention_cap else 1)  # P, and a cap's slope
    own = s.array(qkv) + s.prefix
    if c.qk_norm:  # xhat and rstd
        rows = c.heads + c.kv_heads if c.qk_norm == "head" else 2
        own += s.array(normed, wide=s.device == "cpu") + s.array(rows, wide=True)
    result = y if graph or s.keeps("attention.o") else 0
    saved = entry + s.beside(*names, "attention.o") + graph * own + result
    # forward: the input, q before scaling, and a tile's P or at the end the output of o
    forward = alive + x + 2 * y + own + operands + max(x, made) + s.beside(*names)
    # backward: the residual's gradient, dy, and either o's weight or dq, dk, dv and a tile's needs
    products = s.array(qkv, wide=True) + operands + made + gradients
    return Op(saved, forward, 2 * x + max(s.weight("attention.o"), products))


def tile(s: Step) -> tuple[int, int]:
    """Bytes of a tile with all keys: (P; dS, g and P^T g of the backward pass).

    P and dS are (b, H, t, S), g is (b, H, t, D), P^T g is (b, H, S, D), all float32.
    """
    B, T, S, H, D = s.batch, s.rows, s.keys, s.config.heads, s.config.D
    b, t = B, T
    if s.device == "cpu":
        t = min(T, TILE)
        b = min(B, max(1, BLOCK // (H * t * S)))
    return 4 * b * H * t * S, 4 * b * H * (t * S + t * D + S * D)


def mlp(s: Step, alive: int, flows: bool) -> Op:
    """down(gelu(up(x))), or down(silu(gate(x)) up(x)), or with gelu instead of silu.

    Saved: the input, for up and gate; the activation's slope, SwiGLU's two factors, or both for
    GEGLU; the input of down, if down is trained.
    """
    c, ups = s.config, ("mlp.up", "mlp.gate")
    x, h, slope = s.array(c.width), s.array(c.hidden), s.array(c.hidden, wide=True)
    graph = flows or s.trains(*ups)
    entry, seen = s.keeps(*ups) * x, s.keeps("mlp.down") * h
    # The activation's formula holds its argument, slope, value and temporaries; SwiGLU's holds its
    # factors and value. The backward pass holds dy and dx; SwiGLU's dy, dgate, dup and the sigmoid.
    if c.activation == "swiglu":
        kept, formula = 2 * h, 3 * h
        backward = 3 * h + s.temporaries(slope, int(s.device == "cpu"), blocks=5)
    else:
        whole = {"gelu_tanh": 2, "gelu": 6, "geglu_tanh": 2}[c.activation]
        formula = h + 2 * slope + s.temporaries(slope, whole, blocks=whole + 4)
        kept, backward = slope + 2 * h * c.gated, 2 * h
    saved = entry + graph * kept + seen + s.beside(*ups, "mlp.down")
    weight = s.weight("mlp.down")
    # forward: the input; then the formula, or its value, down's result and a dequantized weight
    down = kept + h + x + s.beside("mlp.down") + (weight if s.method == "qlora" else 0)
    # backward: the residual's gradient; then down's dx beside its weight, or the formula's arrays
    forward = alive + x + s.beside(*ups) + max(formula, down)
    return Op(saved, forward, x + max(h + weight, backward - seen))


def head(s: Step) -> Op:
    """The last linear layer and the loss. The loss keeps p = softmax(logits), and turns it into
    dlogits in place."""
    c, full = s.config, s.whole
    # x is a view of all rows, a prompt's too
    x, logits = s.array(c.width), s.array(c.vocab_size, rows=s.T)
    p = s.array(c.vocab_size, wide=True, rows=s.T)
    # BERT's transform: its input, the slope of gelu, the norm's xhat and rstd
    transform = c.head == "masked" and (
        full * x + 2 * s.array(c.width, wide=True, rows=s.T) + s.array(1, wide=True, rows=s.T))
    table = full * c.vocab_size * c.width * s.size
    slope = p if c.logits_cap else 0  # of the cap, which makes dlogits anew
    forward = x + transform + logits + p + slope + s.temporaries(p, 0, blocks=4 if slope else 2)
    backward = max(x + table, logits if slope else 0)
    return Op(full * x + transform + p + slope, forward, backward)
