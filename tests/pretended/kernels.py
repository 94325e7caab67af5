"""What a launch computes: our kernels run in tests/emulator, CuPy's generated ones by NumPy.

CuPy writes the source of its elementwise kernels and reductions itself, with parameters such as

    cupy_add__float32_float_float32(const CArray<float, 2, 0, 1> _raw_in0, const float in1,
                                    CArray<float, 2, 1, 1> _raw_out0, CIndexer<2, 1> _ind)

The name tells the operation. CArray<T, ndim, ...> is {address, size, shape, strides} by value.
`typedef double in0_type;` tells the type in which input 0 is computed.
"""

import ctypes
import math
import re
from typing import NamedTuple

import emulator
import numpy as np

from pretended.products import at

DTYPES = {"float": "float32", "double": "float64", "float16": "float16", "bfloat16": "bfloat16",
          "bool": "bool", "signed char": "int8", "unsigned char": "uint8", "short": "int16",
          "unsigned short": "uint16", "int": "int32", "unsigned int": "uint32",
          "long long": "int64", "unsigned long long": "uint64", "long": "int64",
          "unsigned long": "uint64", "ptrdiff_t": "int64"}


class Parameter(NamedTuple):
    """A parameter of a generated kernel: dtype is "" for an indexer, ndim is None for a number."""

    name: str
    dtype: str
    ndim: int | None

    def read(self, address: int):
        """The array or number at the argument's address; None for an indexer."""
        if not self.dtype:
            return None
        if self.ndim is None:
            return at(address, self.dtype)[()]
        n = self.ndim
        data, _, *rest = (ctypes.c_int64 * (2 + 2 * n)).from_address(address)
        return at(data, self.dtype, rest[:n], rest[n:])


class Generated:
    """A kernel that CuPy generated. `run` returns whether NumPy could compute it."""

    def __init__(self, source: str, name: str):
        self.operation = re.sub(r"^cupyx?_(scipy_special_)?|_kernel$", "", name.partition("__")[0])
        declared = re.search(rf"__global__ void {name}\((.*?)\) {{", source, re.S)[1]
        self.parameters = [parameter(text) for text in re.split(r",\s*(?![^<]*>)", declared)]
        self.computed = {name: DTYPES.get(kind) for kind, name in re.findall(
            r"typedef ([\w ]+?) (in\d+)_type;", source)}
        self.is_reduction = "_block_stride" in declared

    def run(self, arguments: list[int]) -> bool:
        given = {p.name.removeprefix("_raw_"): p.read(address)
                 for p, address in zip(self.parameters, arguments, strict=True)}
        for name, dtype in self.computed.items():
            if dtype and name in given:
                given[name] = given[name].astype(dtype)
        given = {name: x for name, x in given.items() if x is not None and name[0] != "_"}
        with np.errstate(all="ignore"):
            if self.is_reduction:
                return reduce(self.operation, *given.values())
            if self.operation in SPECIAL:
                return SPECIAL[self.operation](**given) is not NotImplemented
            return elementwise(self.operation, given)


def parameter(text: str) -> Parameter:
    kind, name = re.fullmatch(r"(?:const )?(.+) (\w+)", text.strip()).groups()
    if kind.startswith("CIndexer"):
        return Parameter(name, "", None)
    if found := re.fullmatch(r"CArray<([\w ]+), (\d+), .*>", kind):
        return Parameter(name, DTYPES[found[1]], int(found[2]))
    return Parameter(name, DTYPES[kind], None)


def elementwise(operation, given) -> bool:
    """Run NumPy's ufunc of the same name; False if there is none."""
    ufunc, out = getattr(np, operation, None), given.pop("out0", None)
    if not isinstance(ufunc, np.ufunc) or out is None or set(given) > {"in0", "in1"}:
        return False
    out[...] = ufunc(*(given[name] for name in sorted(given))).astype(out.dtype)
    return True


def reduce(operation, *given) -> bool:
    """Reduce. The reduced axes come first, so x is taken as (reduced, kept) -> (kept,)."""
    (x, *others), out = given[:-1], given[-1]
    if operation == "_tensordot_core_mul_sum":
        operation, x = "sum", x * others.pop()
    if operation not in REDUCTIONS or others:
        return False
    if x.dtype.kind not in "biu":
        x = x.astype(np.promote_types(np.float32, out.dtype))
    y = REDUCTIONS[operation](x.reshape(-1, max(1, out.size)), 0)
    out[...] = y.reshape(out.shape).astype(out.dtype)
    return True


REDUCTIONS = {name: getattr(np, name) for name in (
    "sum", "mean", "max", "min", "prod", "all", "any", "argmax", "argmin", "count_nonzero")}


def copy(in0, out0): out0[...] = in0.astype(out0.dtype)
def fill(x, y): y[...] = x
def where(in0, in1, in2, out0): out0[...] = np.where(in0, in1, in2)
def clip(in0, in1, in2, out0): out0[...] = np.clip(in0, in1, in2)


def arange(in0, in1, out0):
    out0[...] = (in0 + np.arange(out0.size) * in1).astype(out0.dtype)


def take(a, indices, ldim_, cdim_, rdim_, index_range_, out):
    """out (l, c, r) from a (l, range, r) at the indices c, which come broadcast to out's shape."""
    a = a.reshape(ldim_, index_range_, rdim_)
    i = indices.reshape(ldim_, cdim_, rdim_)[:1, :, :1] % index_range_
    out[...] = np.take_along_axis(a, np.broadcast_to(i, (ldim_, cdim_, rdim_)), 1).reshape(
        out.shape)


def scatter_update(v, indices, cdim_, rdim_, adim_, a):
    np.put_along_axis(a.reshape(-1, adim_, rdim_), indices.reshape(-1, cdim_, rdim_) % adim_,
                      v.reshape(-1, cdim_, rdim_), 1)


def scatter_add(v, indices, cdim_, rdim_, adim_, a):
    a, v = a.reshape(-1, adim_, rdim_), v.reshape(-1, cdim_, rdim_)
    np.add.at(a, (slice(None), indices.reshape(-1, cdim_, rdim_)[0, :, 0] % adim_), v)


def erf(in0, out0):
    out0[...] = np.reshape([math.erf(x) for x in in0.reshape(-1).tolist()], in0.shape)


def searchsorted(x, bins, n_bins, side_is_right, assume_increasing, y):
    y[...] = np.searchsorted(bins, x, "right" if side_is_right else "left")


def packbits_big(a, a_size, packed): packed[...] = np.packbits(a[:a_size])
def unpackbits_big(a, unpacked): unpacked[...] = np.unpackbits(a)


def scan_naive(b, a, out):
    """Running sums, which CuPy puts together from blocks."""
    if a.size > 512:
        return NotImplemented
    out[...] = np.cumsum(a, dtype=out.dtype)


def scatter_update_mask(v, mask, mask_scanned, a):
    a[mask] = v.reshape(-1)[mask_scanned[mask] - 1]


def tri(m, k, out):
    row, column = divmod(np.arange(out.size), m)
    out[...] = column <= row + k


def mat_ptrs(base, stride, out):
    """Addresses of the matrices of a stack, one axis after the other."""
    out[...] = base + np.arange(out.shape[-1]).astype(out.dtype) * stride


def prepare_array_indexing(s, len, stride, out): out += stride * (s % len)


SPECIAL = {f.__name__: f for f in (
    copy, fill, where, clip, arange, take, scatter_update, scatter_add, prepare_array_indexing, tri,
    mat_ptrs, erf, searchsorted, packbits_big, unpackbits_big, scan_naive, scatter_update_mask)}
INTEGERS = {"a": "int8", "h": "uint8", "s": "int16", "t": "uint16", "i": "int32", "j": "uint32",
            "l": "int64", "m": "uint64", "x": "int64", "y": "uint64", "b": "bool"}  # as C++ says


def integer_product(dtype):
    """CuPy's kernel for dtypes that cuBLAS does not multiply: c (N, M) = b (N, K) a (K, M)."""
    def run(shape, shared, arguments):
        M, N, K = (int(at(arguments[i], "int32")[()]) for i in range(3))
        a, b, c = (matrix(int(at(arguments[3 + i], "int64")[()]), dtype, *size)
                   for i, size in enumerate(((K, M), (N, K), (N, M))))
        c[...] = b @ a
        return True
    return run


def matrix(address, dtype, rows, columns):
    size = np.dtype(dtype).itemsize
    return at(address, dtype, (rows, columns), (columns * size, size))


def kernel(source: str, options: tuple, name: str):
    """A kernel's run(shape, shared memory, addresses of arguments) -> whether it was computed."""
    if "CArray<" in source and not source.startswith("#line"):
        generated = Generated(source, name)
        return lambda shape, shared, arguments: generated.run(
            [arguments[i] for i in range(len(generated.parameters))])
    if found := re.search(r"_tensordot_core_int_kernelI(\w)E", name):
        return integer_product(INTEGERS[found[1]])
    macros = tuple(option for option in options if option.startswith("-D"))
    ours = emulator.RawModule(source, macros).get_function(name)

    def run(shape, shared, arguments):
        ours.launch(shape, shared, arguments)
        return True
    return run
