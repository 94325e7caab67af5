"""Runs every kernel on a small problem, as it is and with bugs planted, in processes of its own.

    python tests/planted_bugs.py

Kernels are built as CUDA_SANITIZER says, and the bugs are those that such a build is to find. A
sanitizer ends a process at its first report, so each run is a fork. Prints one line a run: its
name, a tab, and how it ended; test_sanitizers.py reads them.
"""

import os
import traceback
from typing import NamedTuple

import ml_dtypes
import numpy as np
from emulated_cupy import installed

from minilm import cuda
from minilm.attention import attention
from minilm.cuda import raw
from minilm.optim.adamw import adamw
from minilm.quantize import quantize_4bit
from minilm.tensor import Tensor


class Bug(NamedTuple):
    """A piece of a kernel's source, what stands there instead, and who says what about it.

    build: None for the plain one, where the emulator or the values tell, or a sanitizer.
    """

    name: str
    build: str | None
    says: str  # a regular expression
    file: str
    piece: str
    instead: str


BUGS = [
    Bug("store one past the end", "address", "heap-buffer-overflow", "nf4_dequantize.cu",
        "i < n; i++", "i <= n; i++"),
    Bug("missing tail test", "address", "heap-buffer-overflow", "lora_matmul.cu",
        "if (row + i < M && column + j < N)", ""),
    Bug("misaligned vector load", "address", "misaligned address .* 'const struct float4'",
        "adamw.cu", "<const float4*>(g + first)", "<const float4*>(g + first / 2)"),
    Bug("shared array overrun", "address", "index 256 out of bounds", "nf4_dequantize.cu",
        "map[threadIdx.x] = c2_map[threadIdx.x]", "map[threadIdx.x + 1] = c2_map[threadIdx.x]"),
    Bug("vectors of a short half", "address", "misaligned address", "rotary.cu",
        "half % VECTOR == 0", "true"),
    Bug("run past the last key", "address", "heap-buffer-overflow", "scatter_add.cu",
        "i + lane < N ? keys", "i + lane < N + 2 ? keys"),
    Bug("missing __syncthreads in a loop", "thread", "data race .*lora_matmul.cu",
        "lora_matmul.cu", "__syncthreads();  // all have read it", "// all have read it"),
    Bug("missing __syncthreads before a sum", "thread", "data race .*nf4_matmul.cu",
        "nf4_matmul.cu", "    __syncthreads();\n    #pragma unroll 1", "    #pragma unroll 1"),
    Bug("sums over a table that others still read", "thread", "data race .*nf4_matmul.cu",
        "nf4_matmul.cu", "    __syncthreads();  // all have used the table\n", ""),
    Bug("race across blocks", "thread", "data race .*nf4_dequantize.cu", "nf4_dequantize.cu",
        "blockIdx.x * (1024LL * EACH)", "blockIdx.x * (1000LL * EACH)"),
    Bug("missing __syncthreads between tiles", "thread", r"(?s)data race.*attention\.cu",
        "attention.cu", "__syncthreads();  // this tile has come", "// this tile has come"),
    Bug("missing __syncthreads between tiles, backward", "thread",
        r"(?s)data race.*attention_backward\.cu", "attention_backward.cu",
        "__syncthreads();  // this tile has come", "// this tile has come"),
    Bug("missing __syncthreads, shared memory of the file", "thread", "data race .*rms_norm.cu",
        "rms_norm.cu", "__syncthreads();", ""),
    Bug("wrong shuffle mask", None, r"nf4_quantize.cu:\d+: .* lane 31, which mask 0x7fffffff",
        "nf4_quantize.cu", "0xffffffff", "0x7fffffff"),
    Bug("divergent __syncthreads", None, r"nf4_dequantize.cu:\d+: .* 128 of 256 threads",
        "nf4_dequantize.cu", "    __syncthreads();", "    if (threadIdx.x < 128) __syncthreads();"),
    Bug("shared memory read before it is written", None, "wrong values", "nf4_dequantize.cu",
        "if (threadIdx.x < 16) table", "if (threadIdx.x < 15) table"),
    Bug("missing __syncthreads, seen by its values", None, "wrong values", "nf4_matmul.cu",
        "    __syncthreads();\n    #pragma unroll 1", "    #pragma unroll 1"),
    Bug("tile read before its copies have landed", None, "wrong values", "attention.cu",
        "wait_async();\n        __syncthreads();", "__syncthreads();"),
    Bug("copy past the end", "address", "heap-buffer-overflow", "attention_backward.cu",
        "query + i < T);", "true);"),
    Bug("wrong order of registers", None, "wrong values", "nf4_matmul.cu",
        "levels_of(table, one >> 1, copy), levels_of(table, two >> 1, copy)",
        "levels_of(table, two >> 1, copy), levels_of(table, one >> 1, copy)"),
    Bug("another quarter of x than of the codes", None, "wrong values", "nf4_matmul.cu",
        "2 * (2 * (t % 2) + t / 2)", "2 * t"),
]


# One small problem for each file: it runs the kernels there and asserts what they give.

RNG = np.random.default_rng(0)


def normal(*shape): return RNG.standard_normal(shape, dtype=np.float32)
def bf16(*shape): return normal(*shape).astype(ml_dtypes.bfloat16)


def near(a, b, tolerance):
    assert np.abs(a.get() - b).max() <= tolerance * np.abs(b).max(), "wrong values"


def dequantize(cp):
    W = quantize_4bit(normal(8192 + 64 + 7))
    on_card = quantize_4bit(cp.asarray(W.dequantize()))
    near(on_card.dequantize(), W.dequantize(), 0.01)


def few_rows(cp):
    W, x = quantize_4bit(normal(24, 192)), bf16(3, 192)
    h, B = bf16(3, 4), bf16(24, 4)
    on_card = quantize_4bit(cp.asarray(W.dequantize()))
    y = cuda.nf4_matmul(cp.asarray(x), on_card.on_card(), cp.asarray(h), cp.asarray(B))
    x, h, B = (a.astype(np.float32) for a in (x, h, B))
    near(y.astype(np.float32), x @ W.dequantize().T + h @ B.T, 0.03)


def lora(cp):
    x, W, dy = normal(70, 40), normal(66, 40), normal(70, 66)
    A, B = normal(3, 40), normal(66, 3)
    on_card = [cp.asarray(a) for a in (x, W, A, B)]
    y, h = cuda.lora_forward(*on_card, 0.5)
    near(y, x @ W.T + 0.5 * x @ A.T @ B.T, 1e-5)
    dx, dA, dB = cuda.lora_backward(cp.asarray(dy), on_card[0], h, *on_card[1:], 0.5)
    near(dx, dy @ W + 0.5 * dy @ B @ A, 1e-5)
    near(dA, 0.5 * (dy @ B).T @ x, 1e-5)
    near(dB, 0.5 * dy.T @ (x @ A.T), 1e-5)


def attended(cp):
    q, k, v, dy = (bf16(1, heads, n, 16) for heads, n in ((2, 17), (1, 70), (1, 70), (2, 17)))
    on_card = [cp.asarray(a) for a in (q, k, v)]
    y, lse = cuda.attention_forward(*on_card, True)
    found = y, *cuda.attention_backward(cp.asarray(dy), *on_card, y, lse, True)
    leaves = [Tensor(a.astype(np.float32), requires_grad=True) for a in (q, k, v)]
    expected = attention(*leaves, causal=True)
    expected.backward(dy.astype(np.float32))
    for a, b in zip(found, (expected.data, *(leaf.grad for leaf in leaves))):
        near(a.astype(np.float32), b, 0.03)


def step(cp):
    arrays = [normal(1027), normal(1027), normal(1027), normal(1027) ** 2]
    settings = 3, 1e-2, 0.9, 0.99, 1e-8, 0.1
    on_card = [cp.asarray(a) for a in arrays]
    cuda.adamw(*on_card, *settings)
    adamw(*arrays, *settings)
    near(on_card[0], arrays[0], 0)


def gated(cp):
    gate, up, dy = normal(1, 1027), normal(1, 1027), normal(1, 1027)
    on_card = [cp.asarray(a) for a in (gate, up)]
    s = 1 / (1 + np.exp(-gate))
    near(cuda.swiglu(*on_card), gate * s * up, 1e-5)
    dgate, dup = cuda.swiglu_backward(cp.asarray(dy), *on_card)
    near(dgate, dy * up * s * (1 + gate * (1 - s)), 1e-5)
    near(dup, dy * gate * s, 1e-5)


def normed(cp):
    x, g, dy = normal(3, 1030), normal(1030), normal(3, 1030)
    on_card = [cp.asarray(a) for a in (x, g)]
    y, rstd = cuda.rms_norm(*on_card, 1e-6)
    xhat = x / np.sqrt((x * x).mean(-1, keepdims=True))
    near(y, xhat * g, 1e-5)
    dx, along = cuda.rms_norm_backward(cp.asarray(dy), *on_card, rstd), dy * g * xhat
    near(dx, rstd.get()[:, None] * (dy * g - xhat * along.mean(-1, keepdims=True)), 1e-5)


def turned(cp):
    x, cos, sin = normal(2, 3, 2, 6), normal(3, 3), normal(3, 3)
    a, b = np.split(x.swapaxes(1, 2), 2, -1)
    y = cuda.rotary(*map(cp.asarray, (x, cos, sin)))
    near(y, np.concatenate([a * cos - b * sin, b * cos + a * sin], -1), 0)


def dropped(cp):
    x = normal(1027)
    near(cuda.dropout(cp.asarray(x), 0.3, 5), np.where(cuda.kept(1027, 0.3, 5), x / 0.7, 0), 1e-6)


def scattered(cp):
    ids, dy, total = np.array([2, 0, 2, 2, 1]), normal(5, 130), np.zeros((4, 130), np.float32)
    np.add.at(total, ids, dy)
    near(cuda.scatter_add(ids, cp.asarray(dy), 4), total, 1e-6)


def gathered(cp):
    pieces, flat = [bf16(9), bf16(2100)], cp.zeros(9 + 1 + 2100, "float32")
    cuda.gather([cp.asarray(x) for x in pieces], [0, 10], flat)
    first, second = (x.astype(np.float32) for x in pieces)
    near(flat, np.concatenate([first, [0], second]), 0)


PROBLEMS = {"nf4_dequantize.cu": dequantize, "nf4_quantize.cu": dequantize,
            "nf4_matmul.cu": few_rows, "lora_matmul.cu": lora, "adamw.cu": step,
            "attention.cu": attended, "attention_backward.cu": attended,
            "swiglu.cu": gated, "rms_norm.cu": normed,
            "rotary.cu": turned, "dropout.cu": dropped, "scatter_add.cu": scattered,
            "gather.cu": gathered}


def in_a_fork(run, cp) -> str:
    """How run(cp) ended in a process of its own: "clean", or what it or a sanitizer said."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(into, 2)
        try:
            run(cp)
            os._exit(0)
        except Exception:
            traceback.print_exc()
            os._exit(1)
    os.close(into)
    with open(out, errors="replace") as said:
        text = said.read()
    status = os.waitpid(child, 0)[1]
    return "clean" if status == 0 else text or f"status {status}"


def main():
    read = raw.read
    with installed():
        from minilm.backend import cupy

        for file, run in PROBLEMS.items():
            print(file, repr(in_a_fork(run, cupy())), sep="\t", flush=True)
        for bug in BUGS:
            if bug.build != os.environ.get("CUDA_SANITIZER"):
                continue
            def planted(file, bug=bug):
                source = read(file)
                assert file != bug.file or bug.piece in source, f"{bug.name}: no such piece"
                return source.replace(bug.piece, bug.instead) if file == bug.file else source
            raw.read = planted
            print(bug.name, repr(in_a_fork(PROBLEMS[bug.file], cupy())), sep="\t", flush=True)


if __name__ == "__main__":
    main()
