"""The CUDA kernels of kernels/*.cu: compiled once, and a launcher for each.

CuPy's RawKernel checks nothing: a wrong dtype, a strided array or a Python int where the kernel
wants 32 bits is undefined behaviour on the card. `Kernel` therefore holds every argument against
the parameter list in the kernel's own source before it launches. The launchers below check shapes.
"""

import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (gives NumPy the dtype bfloat16)
import numpy as np

from minilm.backend import array_module, cupy, one_dtype, pointer

# Beside this file in a wheel, one folder up in the source tree.
KERNELS = next(folder for folder in (Path(__file__).parent / "kernels",
                                     Path(__file__).parents[1] / "kernels") if folder.is_dir())
REAL = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
DTYPES = {c: dtype for dtype, c in REAL.items()} | {
    "unsigned char": "uint8", "int": "int32", "long long": "int64"}


class Kernel:
    """A kernel of a file, compiled with REAL = real and other macros; call it with a grid, a block
    and arguments.

    Arrays must have the parameter's dtype, be C-contiguous and begin at a multiple of 16 bytes:
    TypeError and ValueError otherwise. Python numbers are converted to the parameter's type;
    OverflowError where one does not fit.
    """

    def __init__(self, file: str, name: str, real: str = "float32", **macros: int):
        source, self.name = read(file), name
        self.parameters = parameters(source, name, real)
        values = {"REAL": REAL[real], **macros}
        options = ("-std=c++17", *(f"-D{macro}={value}" for macro, value in values.items()))
        module = cupy().RawModule(code=source, options=options)
        self.launch = module.get_function(name)

    def __call__(self, grid, block, *args, shared_mem: int = 0):
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}")
        args = tuple(self._checked(arg, *p) for arg, p in zip(args, self.parameters))
        self.launch(grid, block, args, shared_mem=shared_mem)

    def _checked(self, arg, name, dtype, is_array):
        what = f"{self.name}: {name}"
        if not is_array:
            if dtype.kind == "i" and not (number := np.iinfo(dtype)).min <= arg <= number.max:
                raise OverflowError(f"{what} = {arg} does not fit {dtype}")
            return dtype.type(arg)
        if array_module(arg) is np:
            raise TypeError(f"{what} must be an array on the GPU, got {type(arg).__name__}")
        if arg.dtype != dtype:
            raise TypeError(f"{what} must be {dtype}, got {arg.dtype}")
        if not arg.flags.c_contiguous:
            raise ValueError(f"{what} must be contiguous, got strides {arg.strides}")
        if arg.size and pointer(arg) % 16:
            raise ValueError(f"{what} must begin at a multiple of 16 bytes, not {pointer(arg):#x}")
        return arg


kernel = functools.cache(Kernel)


def read(file: str) -> str:
    """The source of a kernel file, its headers in place, so that errors and caches see them."""
    def inline(match):
        line = source.count("\n", 0, match.start()) + 2
        return f'{_numbered(match[1])}\n#line {line} "{file}"'
    source = (KERNELS / file).read_text(encoding="utf-8")
    return f'#line 1 "{file}"\n' + re.sub(r'#include "(\w+\.cuh)"', inline, source)


def _numbered(header):
    return f'#line 1 "{header}"\n' + (KERNELS / header).read_text(encoding="utf-8")


def parameters(source: str, name: str, real: str) -> list[tuple[str, np.dtype, bool]]:
    """(name, dtype, whether it is an array) of each parameter of a kernel, read from its source."""
    start = r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s+)?'
    declared, found = re.search(start + name + r"\((.*?)\)\s*{", source, re.S), []
    for text in declared[1].split(","):
        words = re.sub(r"\bconst\b|\b__restrict__\b", "", text).replace("*", " * ").split()
        c_type = " ".join(w for w in words[:-1] if w != "*")
        found.append((words[-1], np.dtype(real if c_type == "REAL" else DTYPES[c_type]),
                      "*" in words))
    return found


class Codes(NamedTuple):
    """What the kernels want of a FourBit: its arrays and two tables, all on the GPU.

    Constants c2 are float32; in 8 bits they are c2_codes, with c1, map and offset, and c2 is empty.
    """

    packed: object  # uint8 (n / 2,)
    levels: object  # float32 (16,)
    c2: object  # float32 (blocks,) or (0,)
    c2_codes: object  # uint8 (blocks,) or (0,)
    c1: object  # float32 (blocks / 256,) or (0,)
    map: object  # float32 (256,) or (0,)
    offset: object  # float32 (1,) or (0,)
    shape: tuple
    block_size: int

    @property
    def arrays(self):
        return self[:7]

    def checked(self, what: str):
        """The number of codes n; ValueError where an array does not go with the shape."""
        n = int(np.prod(self.shape))
        blocks, doubled = -(-n // self.block_size), self.c2_codes.size > 0
        wanted = {"packed": -(-n // 2), "levels": 16, "c2": 0 if doubled else blocks,
                  "c2_codes": blocks if doubled else 0, "c1": -(-blocks // 256) if doubled else 0,
                  "map": 256 if doubled else 0, "offset": 1 if doubled else 0}
        for name, size in wanted.items():
            if (found := getattr(self, name).size) != size:
                raise ValueError(f"{what}: {name} of {self.shape} in blocks of {self.block_size} "
                                 f"has {size} elements, got {found}")
        if self.block_size < 32 or self.block_size & (self.block_size - 1):
            raise ValueError(f"{what}: block_size must be 32, 64, 128 ..., got {self.block_size}")
        return n


def nf4_dequantize(W: Codes, dtype):
    """The numbers that 4-bit codes stand for, in W's shape: float32, float16 or bfloat16."""
    n, xp = W.checked("nf4_dequantize"), array_module(W.packed)
    out = xp.empty(W.shape, dtype)
    if n:
        kernel("nf4_dequantize.cu", "nf4_dequantize", str(out.dtype))(
            (-(-n // 8192),), (256,), *W.arrays, out, n, W.block_size.bit_length() - 1,
            W.c2_codes.size > 0)
    return out


def lora_forward(x, W, A, B, scale):
    """y = x W^T + h B^T and h = scale x A^T, for x (M, I), W (O, I), A (r, I), B (O, r).

    All float32, float16 or bfloat16, with sums in float32. Returns (y, h); lora_backward wants h.
    """
    _check_lora("lora_forward", x=x, W=W, A=A, B=B)
    h = _lora_matmul(x, A, scale=scale)
    return _lora_matmul(x, W, (h, B)), h


def lora_backward(dy, x, h, W, A, B, scale):
    """(dx, dA, dB) of lora_forward, for dy (M, O) and the h that it returned, (M, r)."""
    _check_lora("lora_backward", x=x, W=W, A=A, B=B, dy=dy, h=h)
    dh = _lora_matmul(dy, B, turned=(False, True), scale=scale)
    dx = _lora_matmul(dy, W, (dh, A), turned=(False, True))
    dA, dB = (_lora_matmul(*pair, turned=(True, True)) for pair in ((dh, x), (dy, h)))
    return dx, dA, dB


def _check_lora(what, x, W, A, **others):
    """Hold all arrays against each other, before the first of several launches."""
    arrays = {"x": x, "W": W, "A": A, **others}
    one_dtype(what, **arrays)
    if str(x.dtype) not in REAL:
        raise TypeError(f"{what} computes in {', '.join(REAL)}, got {x.dtype}")
    matmul = kernel("lora_matmul.cu", "lora_matmul", str(x.dtype))
    for name, a in arrays.items():
        matmul._checked(a, name, x.dtype, True)
    if not x.ndim == W.ndim == A.ndim == 2:
        raise ValueError(f"{what} takes matrices, got x {x.shape}, W {W.shape}, A {A.shape}")
    (M, I), O, r = x.shape, len(W), len(A)
    fits = {"x": (M, I), "W": (O, I), "A": (r, I), "B": (O, r), "dy": (M, O), "h": (M, r)}
    for name, a in arrays.items():
        if a.shape != fits[name]:
            raise ValueError(f"{what}: {name} must be {fits[name]}, got {a.shape}")


def _lora_matmul(P, Q, more=None, turned=(False, False), scale=1.0):
    """scale (P Q^T + P2 Q2^T) for more = (P2, Q2), without it scale P Q^T.

    turned: whether P and P2, and whether Q and Q2, lie in memory as their transposes.
    """
    p, q = (-1 if t else 1 for t in turned)
    P2, Q2 = more or (P, Q)
    (M, K), N, R = P.shape[::p], Q.shape[::q][0], P2.shape[::p][1] if more else 0
    C = array_module(P).empty((M, N), P.dtype)
    if C.size:
        kernel("lora_matmul.cu", "lora_matmul", str(C.dtype))(
            (-(-M // 64) * -(-N // 64),), (256,), P, Q, P2, Q2, C, M, N, K, R, *turned, scale)
    return C


def adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, scale=1.0):
    """minilm.optim.adamw on float32 arrays with gradients g scale, in one pass, the same bits."""
    sizes = [a.size for a in (p, g, m, v)]
    if len(set(sizes)) > 1:
        raise ValueError(f"adamw: p, g, m and v must be of one size, got {sizes}")
    correction = math.sqrt(1 - beta2**t)
    if p.size:
        kernel("adamw.cu", "adamw")(
            (p.size // 1024 + 1,), (256,), p, g, m, v, p.size, scale, 1 - beta1, 1 - beta2,
            1 - lr * weight_decay, eps * correction, lr * correction / (1 - beta1**t))


def nf4_quantize(x, middles, order, block_size: int):
    """(packed, c2) of float32 numbers: 4-bit codes, two a byte, and the absmax of every block.

    middles: (15,) float32 between the levels, ascending; order: (16,) uint8, the levels' codes from
    the lowest level up. Blocks of 32 to 4096.
    """
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"nf4_quantize: block_size must be 32, 64 .. 4096, got {block_size}")
    if (middles.size, order.size) != (15, 16):
        raise ValueError("nf4_quantize: middles and order must have 15 and 16 elements, got "
                         f"{middles.size} and {order.size}")
    xp, n = array_module(x), x.size
    packed, c2 = xp.empty(-(-n // 2), "uint8"), xp.empty(-(-n // block_size), "float32")
    if n:
        kernel("nf4_quantize.cu", "nf4_quantize")(
            (-(-n // 4096),), (256,), x, middles, order, packed, c2, n, block_size.bit_length() - 1)
    return packed, c2


def nf4_matmul(x, W: Codes, h=None, B=None):
    """y = x W^T + h B^T for 1 to 16 rows: x (M, K), W (N, K), h (M, r), B (N, r) -> (M, N).

    All but W are bfloat16. W has blocks of 64 and K is a multiple of 64. Rounded to bfloat16 are
    the levels of W and y; the sums are float32.
    """
    W.checked("nf4_matmul")
    xp, (N, K) = array_module(x), W.shape
    if h is None:
        h, B = (xp.empty((rows, 0), "bfloat16") for rows in (len(x), N))
    if x.ndim != 2 or x.shape[1] != K or K % 64 or W.block_size != 64 or not 1 <= len(x) <= 16:
        raise ValueError("nf4_matmul takes x of (1 to 16, K) and W of (N, K) in blocks of 64, K a "
                         f"multiple of 64; got {x.shape} and {W.shape} in {W.block_size}")
    if h.shape[:-1] != (len(x),) or B.shape != (N, h.shape[-1]):
        raise ValueError(f"nf4_matmul takes h of ({len(x)}, r) and B of ({N}, r), got {h.shape} "
                         f"and {B.shape}")
    y = xp.empty((len(x), N), "bfloat16")
    if y.size:
        kernel("nf4_matmul.cu", "nf4_matmul")(
            (-(-N // 16),), (256,), x, *W.arrays, h, B, y, len(x), N, K, h.shape[1],
            W.c2_codes.size > 0)
    return y


def attention_forward(q, k, v, causal: bool):
    """(y, lse) of softmax(q k^T / sqrt(D)) v: q (B, H, T, D), k and v (B, K, S, D), all bfloat16.

    H is a multiple of K; D of 16, up to 128. causal: the last query sees every key, each earlier
    query one key fewer. lse (B, H, T) float32, the logarithm of the softmax's denominator, is what
    attention_backward wants.
    """
    xp, (T, D), S = array_module(q), q.shape[-2:], k.shape[-2]
    _check_attention("attention_forward", q, k, v, causal)
    y, lse = xp.empty(q.shape, "bfloat16"), xp.empty(q.shape[:3], "float32")
    _attention("attention.cu", "attention_forward", D)(
        (q.size // (T * D), -(-T // 64)), (128,), q, k, v, y, lse,
        T, S, q.shape[1] // k.shape[1], causal, 1 / math.sqrt(D))
    return y, lse


def attention_backward(dy, q, k, v, y, lse, causal: bool):
    """(dq, dk, dv) of attention_forward, for dy like its y; the same bits every time."""
    xp, (T, D), S = array_module(q), q.shape[-2:], k.shape[-2]
    _check_attention("attention_backward", q, k, v, causal, dy=dy, y=y, lse=lse)
    dq, dk, dv = (xp.empty(a.shape, "bfloat16") for a in (q, k, v))
    delta = xp.empty(lse.shape, "float32")
    sizes = T, S, q.shape[1] // k.shape[1], causal, 1 / math.sqrt(D)
    _attention("attention_backward.cu", "attention_dq", D)(  # writes delta
        (q.size // (T * D), -(-T // 64)), (128,), dy, q, k, v, y, lse, delta, dq, *sizes)
    _attention("attention_backward.cu", "attention_dk_dv", D)(
        (k.size // (S * D), -(-S // 64)), (128,), dy, q, k, v, lse, delta, dk, dv, *sizes)
    return dq, dk, dv


def _attention(file, name, D):
    return kernel(file, name, "bfloat16", HEAD_WIDTH=D)


def _check_attention(what, q, k, v, causal, **others):
    """Hold the shapes against each other."""
    shapes = f"{what}: q {q.shape} does not go with k {k.shape} and v {v.shape}"
    if not q.ndim == k.ndim == 4 or k.shape != v.shape or 0 in q.shape + k.shape:
        raise ValueError(shapes)
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if k.shape != (B, K, S, D) or H % K or (causal and T > S):
        raise ValueError(shapes)
    if D % 16 or D > 128:
        raise ValueError(f"{what} takes heads of width 16, 32 .. 128, got {D}")
    for name, a in others.items():
        if a.shape != (q.shape[:3] if name == "lse" else q.shape):
            raise ValueError(f"{what}: {name} {a.shape} does not go with q {q.shape}")
