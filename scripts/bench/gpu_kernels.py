"""The kernels' rows of the benchmark on a GPU: their inputs, floors and competitors.

A row draws its inputs when it is measured. It draws so many that a pass misses the L2 cache;
gpu_table.py says how they are timed. Rows of the same sizes get the same numbers.
"""

import copy
import math
import statistics
from functools import partial

import numpy as np
from gpu_table import Ceilings, Row, cells, code_bytes, span, times

from minilm import blas, cuda
from minilm.backend import cupy, to_device
from minilm.optim.adamw import adamw
from minilm.peft.qlora import quantized_lora
from minilm.quantize import quantize_4bit
from minilm.quantize.codebooks import steps

COLD = 3 * 60e6  # bytes that a pass must read: three times the L2 cache
SQUARE, LARGE = (4096, 4096), (11008, 4096)  # (O, I) of layers of a Llama of 7 billion parameters
SCALE = 2.0  # of LoRA


def measured_ceilings(rounds, size=1 << 31, n=8192) -> tuple[Ceilings, list[str]]:
    """(the ceilings, as medians; their lines in the table)."""
    cp, rng = cupy(), np.random.default_rng(0)
    a = cp.arange(size // 8, dtype=np.int64)
    b, x, y = cp.empty_like(a), normal(rng, n, n), normal(rng, n, n)
    copies = [2 * size / t for t in times(lambda: 4 * [partial(cp.copyto, b, a)], rounds)]
    products = [2 * n**3 / t for t in times(lambda: 2 * [partial(blas.matmul, x, y)], rounds)]
    rates = [r / 1e12 for r in copies], [r / 1e12 for r in products]
    lines = [cells(title, "", span(r, unit), "", "", "", "")
             for title, unit, r in zip(ceiling_titles(size, n), ("TB/s", "TFLOP/s"), rates)]
    return Ceilings(statistics.median(copies), statistics.median(products)), lines


def ceiling_titles(size=1 << 31, n=8192):
    return (f"ceiling: copy of {size:,} bytes on the card, read and written",
            f"ceiling: cuBLAS's product of two {n} x {n} of bfloat16")


def dequantize_rows(square=SQUARE, large=LARGE):
    cases = (square, "float32"), (square, "bfloat16"), (large, "bfloat16")
    return [dequantize_row(shape, dtype, double, 0.85 if shape == large else 0.0)
            for shape, dtype in cases for double in (False, True)]


def dequantize_row(shape, dtype, double, goal):
    def ours():
        return again([partial(cuda.nf4_dequantize, W.on_card(), dtype)
                      for W in weights(shape, double)])

    size = math.prod(shape) * (4 if dtype == "float32" else 2)
    return Row(f"nf4_dequantize {by(shape)} to {dtype}, {constants(double)}",
               ((code_bytes(shape, double) + size, 0),), ours, share=goal)


def quantize_rows(square=SQUARE, large=LARGE):
    return [quantize_row(shape) for shape in (square, large)]


def quantize_row(shape):
    def ours():
        x, tables = normal(np.random.default_rng(0), *shape, dtype="float32"), steps("nf4")
        middles, order = (to_device(table, "cuda") for table in tables)
        return again([partial(cuda.nf4_quantize, y, middles, order, 64)
                      for y in copies(distinct(x.nbytes), x)])

    work = code_bytes(shape, False) + 4 * math.prod(shape), 0
    return Row(f"nf4_quantize {by(shape)} from float32", (work,), ours)


def few_rows(shapes=(LARGE, SQUARE), counts=(1, 4, 8, 16)):
    return [few_row(shape, M, shape == shapes[0]) for shape in shapes for M in counts]


def few_row(shape, M, is_goal):
    def sides(call):
        def side():
            x = normal(np.random.default_rng(1), M, shape[1])
            return again([partial(call, x.copy(), W.on_card()) for W in weights(shape, True)])
        return side

    O, I = shape
    work = code_bytes(shape, True) + 2 * M * (O + I), 2 * M * O * I
    goals = {"share": 0.5, "speed": 4.0} if is_goal else {}
    return Row(f"nf4_matmul of {M} x {I} with {by(shape)}, {constants(True)}", (work,),
               sides(cuda.nf4_matmul), "nf4_dequantize and cuBLAS",
               sides(dequantize_and_multiply), **goals)


def dequantize_and_multiply(x, W):
    return blas.matmul(x, cuda.nf4_dequantize(W, "bfloat16").T)


def lora_rows(shapes=(LARGE, SQUARE), M=2048, r=16):
    return [row for shape in shapes for row in (lora_forward_row(shape, M, r),
                                                lora_backward_row(shape, M, r))]


def lora_forward_row(shape, M, r):
    def ours():
        return again([partial(quantized_lora, x, W, A, B, scale=SCALE)
                      for x, W, A, B, _ in lora_inputs(shape, M, r)])

    def product():
        return again([partial(blas.matmul, x, W.T) for x, W in dense_inputs(shape, (M, shape[1]))])

    O, I = shape
    return lora_row("forward", shape, M, r, ours, product, 2 * M * r * (O + I))


def lora_backward_row(shape, M, r):
    def ours():
        inputs = lora_inputs(shape, M, r)

        def ready():  # a vjp runs once, so each pass needs vjps of its own
            return [partial(gradients, quantized_lora.__wrapped__(x, W, A, B, scale=SCALE), dy)
                    for x, W, A, B, dy in inputs]
        return ready

    def product():
        return again([partial(blas.matmul, dy, W) for dy, W in dense_inputs(shape, (M, shape[0]))])

    O, I = shape
    return lora_row("backward with dA and dB", shape, M, r, ours, product, 4 * M * r * (O + I))


def lora_row(direction, shape, M, r, ours, product, more_flops):
    O, I = shape
    dequantize = code_bytes(shape, True) + 2 * O * I, 0
    dense = 2 * (O * I + M * (O + I)), 2 * M * O * I + more_flops
    return Row(f"LoRA linear on NF4, {direction}: {M} x {I} with {by(shape)}, r = {r}, bfloat16",
               (dequantize, dense), ours, "floor of nf4_dequantize and cuBLAS's product alone",
               product, (dequantize,), speed=1 / 1.1)


def gradients(results, dy):
    """(dx, dA, dB), from the value and the vjps that quantized_lora returns."""
    _, dx, _, dA, dB, _ = results
    return dx(dy), dA(dy), dB(dy)


def lora_inputs(shape, M, r):
    """Distinct (x, W, A, B, dy)."""
    (O, I), rng = shape, np.random.default_rng(1)
    x, A, B, dy = (normal(rng, *s) for s in ((M, I), (r, I), (O, r), (M, O)))
    return [(x.copy(), W, A.copy(), B.copy(), dy.copy()) for W in weights(shape, True)]


def dense_inputs(shape, rows):
    """Distinct (x or dy, W)."""
    rng = np.random.default_rng(1)
    W, x = normal(rng, *shape), normal(rng, *rows)
    return [(x.copy(), w) for w in copies(distinct(W.nbytes), W)]


def reference_rows(n=1024, r=16):
    """lora_matmul.cu, which uses no tensor cores, beside the same products by cuBLAS in float32."""
    def side(call, inputs):
        def draw():
            rng, square = np.random.default_rng(1), 4 * n * n
            arrays = [normal(rng, *shape, dtype="float32") for shape in inputs]
            return again([partial(call, *(a.copy() for a in arrays), SCALE)
                          for _ in range(distinct(3 * square))])
        return draw

    square, A, B = (n, n), (r, n), (n, r)
    forward, backward = (square, square, A, B), (square, square, B, square, A, B)
    size = f"float32, {n} x {n} with {n} x {n}, r = {r}"
    return [Row(f"lora_forward of lora_matmul.cu, {size}",
                ((4 * (3 * n * n + 3 * r * n), 2 * n * n * (n + 2 * r)),),
                side(cuda.lora_forward, forward), "cuBLAS in float32",
                side(plain_forward, forward)),
            Row(f"lora_backward of lora_matmul.cu, {size}",
                ((4 * (4 * n * n + 5 * r * n), 2 * n * n * (n + 4 * r)),),
                side(cuda.lora_backward, backward), "cuBLAS in float32",
                side(plain_backward, backward))]


def plain_forward(x, W, A, B, scale):
    h = x @ A.T
    h *= scale
    y = x @ W.T
    y += h @ B.T
    return y, h


def plain_backward(dy, x, h, W, A, B, scale):
    dh = dy @ B
    dh *= scale
    dx = dy @ W
    dx += dh @ A
    return dx, dh.T @ x, dy.T @ h


def attention_rows(B=4, H=32, K=4, T=1024, D=64, device="cuda"):
    """Causal attention with H / K query heads for each key/value head, beside PyTorch's best."""
    import torch
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True,
                     enable_gqa=True)
    shapes, rng = [(B, H, T, D)] * 2 + [(B, K, T, D)] * 2, np.random.default_rng(1)

    def draw():  # distinct (dy, q, k, v)
        arrays = [normal(rng, *shape) for shape in shapes]
        return [[a.copy() for a in arrays] for _ in range(distinct(2 * arrays[0].nbytes))]

    def draw_tensors(n):
        return [[torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
                 for shape in shapes] for _ in range(n)]

    def forward():
        return again([partial(cuda.attention_forward, *qkv, True) for _, *qkv in draw()])

    def backward():
        return again([partial(cuda.attention_backward, dy, *qkv,
                              *cuda.attention_forward(*qkv, True), True) for dy, *qkv in draw()])

    def torch_forward():
        return again([partial(attend, *qkv) for _, *qkv in draw_tensors(distinct(2 * q))])

    def torch_backward():
        inputs = draw_tensors(distinct(2 * q))
        return lambda: [partial(torch.autograd.grad, attend(*qkv), qkv, dy) for dy, *qkv in inputs]

    q, kv, lse, product = 2 * B * H * T * D, 2 * B * K * T * D, 4 * B * H * T, B * H * T * T * D
    size = f"B = {B}, H = {H}, K = {K}, T = {T}, D = {D}, causal, bfloat16"
    return [Row(f"attention_forward, {size}", ((2 * q + 2 * kv + lse, 2 * product),), forward,
                "PyTorch's scaled_dot_product_attention", torch_forward),
            Row(f"attention_backward, {size}", ((4 * q + 4 * kv + lse, 5 * product),), backward,
                "PyTorch's scaled_dot_product_attention", torch_backward)]


def adamw_rows(n=1 << 24, device="cuda"):
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

    def ours():
        rng = np.random.default_rng(1)
        p, g = normal(rng, n, dtype="float32"), normal(rng, n, dtype="float32")
        return again([partial(adamw, p.copy(), g.copy(), g * g, g * g, 1, 1e-3, 0.9, 0.999, 1e-8,
                              0.01) for _ in range(distinct(p.nbytes))])

    def other():
        import torch

        parameters = [torch.randn(n, device=device, requires_grad=True)
                      for _ in range(distinct(4 * n))]
        for p in parameters:
            p.grad = torch.randn(n, device=device)
        return again([torch.optim.AdamW([p], fused=True, **settings).step for p in parameters])

    return [Row(f"adamw of {n:,} float32 parameters", ((28 * n, 14 * n),), ours,
                "PyTorch's fused AdamW", other)]


GROUPS = {"dequantize": dequantize_rows, "quantize": quantize_rows, "matmul": few_rows,
          "lora": lora_rows, "reference": reference_rows, "attention": attention_rows,
          "adamw": adamw_rows}


def again(calls):
    """The same calls in each pass."""
    return lambda: calls


def weights(shape, double):
    """Distinct matrices in NF4 on the card, enough for a pass."""
    x = normal(np.random.default_rng(0), *shape, dtype="float32")
    W = quantize_4bit(x, double_quant=double)
    return copies(distinct(W.nbytes), W)


def copies(n, x):
    return [copy.deepcopy(x) for _ in range(n)]


def distinct(size) -> int:
    """How many inputs of this many bytes a pass needs."""
    return max(2, math.ceil(COLD / size))


def normal(rng, *shape, dtype="bfloat16"):
    drawn = rng.standard_normal(shape, dtype=np.float32)
    return to_device(drawn.astype(dtype, copy=False), "cuda")


def constants(double) -> str:
    return "double quantized" if double else "float32 constants"


def by(shape) -> str:
    return " x ".join(map(str, shape))
