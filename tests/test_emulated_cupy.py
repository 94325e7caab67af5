"""The stand-in for CuPy (tests/emulated_cupy) refuses what CuPy has not, counts, and multiplies.

What is held against the real CuPy needs it installed (extra `kernels`), though no GPU.
"""

import ctypes
import inspect
import re
import sys
from pathlib import Path

import emulated_cupy
import ml_dtypes  # noqa: F401  makes "bfloat16" the name of a dtype
import numpy as np
import pytest
from conftest import close
from emulated_cupy import (
    arrays,
    blas,
    installed,
    launches,
    memory,
    real,
    streams,
    to_device,
    to_host,
)
from hypothesis import given
from hypothesis import strategies as st

from minilm import blas as blas_of_ours
from minilm.backend import peak_memory
from minilm.optim import flat
from minilm.quantize import quantize_4bit

pytestmark = pytest.mark.kernels
DTYPES = {"float32": 0, "float16": 2, "bfloat16": 14, "float64": 1}


@pytest.fixture
def cp():
    with installed() as cupy:
        yield cupy


@pytest.fixture
def strict(cp):
    """The stand-in, held against the real CuPy."""
    if real.REAL is None:
        pytest.skip('the stand-in is held against CuPy: pip install -e ".[kernels]"')
    return cp


def arange(cp, *shape, dtype=np.float32):
    return cp.asarray(np.arange(np.prod(shape), dtype=dtype).reshape(shape))


# names and signatures


@pytest.mark.parametrize("name", ["vecdot", "errstate", "spacing", "erf", "matvec"])
def test_names_that_cupy_lacks(strict, name):
    with pytest.raises(AttributeError, match=name):
        getattr(strict, name)


@pytest.mark.parametrize("name", ["newbyteorder", "itemset", "resize", "ctypes", "getfield"])
def test_attributes_that_an_array_lacks(strict, name):
    with pytest.raises(AttributeError, match=name):
        getattr(arange(strict, 3), name)


@pytest.mark.parametrize("call", [
    lambda cp, x: cp.take(x, x.astype(int), mode="clip"),
    lambda cp, x: x.take(x.astype(int), mode="clip"),
    lambda cp, x: x.max(initial=0),
    lambda cp, x: x.sum(where=x > 0),
    lambda cp, x: cp.add(x, x, where=x > 0),
    lambda cp, x: cp.exp(x, order="C"),
    lambda cp, x: cp.zeros(3, device="cpu"),
    lambda cp, x: cp.broadcast_to(x, (3, 4), subok=True),
    lambda cp, x: cp.RawModule("", ("-DX",)),
], ids=["take", "take of an array", "initial", "where", "ufunc where", "order", "device", "subok",
        "options by place"])
def test_arguments_that_cupy_lacks(strict, call):
    with pytest.raises(TypeError):
        call(strict, arange(strict, 4))


def test_every_name_of_the_stand_in_is_in_cupy(strict):
    for name in vars(arrays.ndarray).keys() - {"_host", "__slots__", "__weakref__", "__getattr__"}:
        assert name in dir(real.REAL.ndarray), name
    for path, module in emulated_cupy.MODULES.items():
        if path.split(".")[0] == "cupy":
            owner = real.REAL
            for part in path.split(".")[1:]:
                owner = getattr(owner, part)
            assert {n for n in vars(module) if n[0] != "_"} <= set(dir(owner)), path
    for name in ("MemoryPool", "MemoryHook"):
        ours, theirs = getattr(memory, name), getattr(real.REAL.cuda, name)
        assert {n for n in dir(ours) if n[0] != "_"} <= set(dir(theirs))
    for name in ("CUDA_R_32F", "CUDA_R_64F", "CUDA_R_16F", "CUDA_R_16BF"):
        assert getattr(strict.cuda.runtime, name) == getattr(real.REAL.cuda.runtime, name)


@pytest.mark.parametrize("name", ["Stream", "Event", "PinnedMemory"])
def test_streams_and_pinned_memory_are_made_as_cupys(strict, name):
    ours, theirs = getattr(streams, name), getattr(real.REAL.cuda, name)
    own = {"memory", "limit", "used", "blocks", "disable_timing", "recorded",
           "is_non_blocking", "ptr"}  # CuPy gives the last two to each stream, not to the class
    assert {n for n in vars(ours) if n[0] != "_"} - own <= set(dir(theirs))
    given = real.signature(f"cuda.{name}.__init__")
    assert list(given.parameters) == list(inspect.signature(ours.__init__).parameters)


@pytest.mark.parametrize("name", ["gemmEx", "gemmStridedBatchedEx", "setMathMode"])
def test_cublas_takes_the_same_arguments(strict, name):
    """The real module cannot be imported without cuBLAS, but holds its signatures as text."""
    folder = Path(real.REAL.__file__).parents[1] / "cupy_backends" / "cuda" / "libs"
    [file] = folder.glob("cublas.*.so")
    [text] = re.findall(rb"\x00%s\((.*?)\)" % name.encode(), file.read_bytes())
    theirs = list(real.parse(text.decode()).parameters)
    assert theirs == list(inspect.signature(getattr(blas, name)).parameters)


def test_the_error_of_a_full_memory_reads_as_cupys(strict):
    ours, theirs = memory.OutOfMemoryError, real.REAL.cuda.memory.OutOfMemoryError
    assert str(ours(1 << 20, 4096, 5000)) == str(theirs(1 << 20, 4096, 5000))


def test_signatures_in_docstrings():
    found = real.parse("self, *shape, order='C', tuple options=(), **kwargs")
    assert str(found) == "(self, *shape, order=None, options=None, **kwargs)"
    assert str(real.parse("self, Py_ssize_t axis1, *, stream=None")) == (
        "(self, axis1, *, stream=None)")


# NumPy arrays stay outside


@pytest.mark.parametrize("call", [
    lambda cp, x, n: x + n,
    lambda cp, x, n: n + x,
    lambda cp, x, n: x @ n,
    lambda cp, x, n: n @ x,
    lambda cp, x, n: x == n,
    lambda cp, x, n: x.__iadd__(n),
    lambda cp, x, n: n.__iadd__(x),
    lambda cp, x, n: x[n.astype(int)],
    lambda cp, x, n: n[x.astype(int)],
    lambda cp, x, n: x.__setitem__(slice(None), n),
    lambda cp, x, n: n.__setitem__(slice(None), x),
    lambda cp, x, n: cp.maximum(x, n),
    lambda cp, x, n: cp.concatenate([x, n]),
    lambda cp, x, n: cp.add.at(x, x.astype(int), n),
    lambda cp, x, n: cp.exp(x, out=n),
    lambda cp, x, n: np.exp(x),
    lambda cp, x, n: np.concatenate([x, x]),
    lambda cp, x, n: np.asarray(x),
    lambda cp, x, n: np.array([x, x]),
    lambda cp, x, n: np.add(np.float32(1), x),
])
def test_no_mix_with_numpy(cp, call):
    x = arange(cp, 3)
    with pytest.raises(TypeError):
        call(cp, x, np.zeros(3, np.float32))
    np.testing.assert_array_equal(x.get(), [0, 1, 2])


def test_scalars_of_python_and_numpy(cp):
    x = arange(cp, 3, dtype=np.float16)
    assert (2 * x).dtype == (x / 2.0).dtype == np.float16
    assert (np.float32(2) * x).dtype == (x - np.float32(2)).dtype == np.float32
    assert (x.astype("bfloat16") * 2.0).dtype == np.float32  # as in NumPy and in CuPy
    np.testing.assert_array_equal((2 ** x).get(), [1, 2, 4])
    assert x.__add__(object()) is NotImplemented


def test_results_are_never_numpys(cp):
    x = arange(cp, 2, 3)
    for y in (x.sum(), x[0, 1], x.max(0), x[x > 1], cp.exp(x[0, 0]), x.argmax(), *x[0],
              *cp.split(x, 3, axis=1), cp.allclose(x, x)):
        assert isinstance(y, cp.ndarray) and not isinstance(y, np.ndarray)
    assert float(x.sum()) == 15 and int(x[1, 2]) == 5 and x[0, 1].item() == 1
    assert f"{x.min()} {x.max():.1f}" == "0.0 5.0"
    with pytest.raises(ValueError):
        bool(x)


def test_views_share_memory_and_copies_do_not(cp):
    x = arange(cp, 2, 3)
    x.T[2, 1] = 50
    x[0][...] = x[1]
    x[:, 1] += 1
    np.testing.assert_array_equal(x.get(), [[3, 5, 50], [3, 5, 50]])
    element = x[1, 0]
    element[...] = 9  # an element is a view, too
    assert float(x[1, 0]) == 9 and element.data.ptr == x.data.ptr + 12
    y = x[[0, 1]]
    y[...] = 0
    assert float(x[0, 0]) == 3
    assert (x.T + 1).flags.c_contiguous and not x.T.flags.c_contiguous
    host = x.get()
    host[...] = 7
    x.set(host)
    assert float(x.sum()) == 42


def test_what_cupy_computes_otherwise(cp):
    x = arange(cp, 2, 2, 2).astype("bfloat16")
    with pytest.raises(TypeError, match="'E'"):
        x @ x
    assert (x[0] @ x[1]).dtype == "bfloat16"  # NumPy gives float32
    with pytest.raises(NotImplementedError):
        cp.multiply.at(x, 0, 2)
    with pytest.raises(TypeError, match=r"add\.at only supports"):
        cp.add.at(x, 0, 2)
    total = cp.zeros(3)
    cp.add.at(total, cp.asarray([1, 1, 2]), cp.ones(3))
    np.testing.assert_array_equal(total.get(), [0, 2, 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_fresh_memory_is_nan(cp, dtype):
    x = cp.empty((3, 5), dtype)
    assert np.isnan(x.get().astype(np.float64)).all() and x.data.ptr % 16 == 0
    assert np.isnan(cp.empty_like(x.T).get().astype(np.float64)).all()


# counting


def test_launches_traffic_and_copies(cp):
    x, y = arange(cp, 8, 8), arange(cp, 8, 8)
    assert to_device == {"asarray": 2}
    emulated_cupy.reset()
    x.T, x[2:4], x.reshape(4, 16), x[None], cp.broadcast_to(x, (3, 8, 8)), x.astype(np.float32,
                                                                                    copy=False)
    assert not launches
    x @ y.T
    cp.exp(x, out=y)
    x[:, 0] += 1
    x.T.reshape(64)
    x[cp.asarray([1, 2])]
    x.sum(), x.copy(), x.fill(0)
    assert launches == {"matmul": 1, "exp": 1, "add": 1, "reshape": 1, "getitem": 1, "sum": 1,
                        "copy": 1, "fill": 1}
    assert emulated_cupy.traffic["matmul"] == 3 * 256 and emulated_cupy.traffic["exp"] == 512
    assert emulated_cupy.traffic["sum"] == 256 + 4
    assert not to_host
    float(x.sum()), x.get()
    assert to_host == {"float": 1, "get": 1}


def test_strided_stacks_are_copied_before_a_product(cp):
    x = arange(cp, 2, 4, 4)
    x @ x.swapaxes(1, 2)
    assert launches == {"copy": 1, "matmul": 1}


# memory


def test_memory_is_counted_and_limited(cp):
    pool, before = memory.MemoryPool(), 0
    cp.cuda.set_allocator(pool.malloc)
    x = cp.zeros(1000, np.uint8)
    view = x[10:]
    assert pool.used_bytes() == before + 1024
    pool.set_limit(size=before + 2100)  # room for the 8 bytes of ones(1), not for their block
    y = cp.zeros(1000, np.uint8)
    expected = (f"Out of memory allocating 512 bytes (allocated so far: {before + 2048:,} bytes, "
                f"limit set to: {before + 2100:,} bytes).")
    with pytest.raises(cp.cuda.memory.OutOfMemoryError, match=re.escape(expected)) as caught:
        cp.ones(1)
    assert isinstance(caught.value, MemoryError) and pool.used_bytes() == before + 2048
    del x, y
    assert pool.used_bytes() == before + 1024, "the view keeps its memory"
    assert pool.total_bytes() >= before + 2048 and pool.free_bytes() >= 1024
    del view
    pool.free_all_blocks()
    assert pool.used_bytes() == pool.total_bytes() == before
    pool.set_limit(size=0)
    assert pool.get_limit() == 0


def test_a_pool_splits_joins_and_gives_back():
    """As CuPy 14.2's: sizes of 512 bytes, the smallest chunk that holds it, whole chunks go."""
    pool = memory.MemoryPool()
    first, second = pool.malloc(4000), pool.malloc(9000)
    assert (first.size, second.size) == (4096, 9216) and pool.used_bytes() == 13_312
    del first, second
    assert (pool.used_bytes(), pool.free_bytes(), pool.total_bytes()) == (0, 13_312, 13_312)
    piece, other = pool.malloc(3000), pool.malloc(600)  # of the smaller chunk both
    pool.free_all_blocks()
    assert (pool.used_bytes(), pool.total_bytes()) == (4096, 4096)
    del piece
    pool.set_limit(size=4096)
    assert pool.malloc(1).size == 512  # what is free is given in spite of the limit
    with pytest.raises(memory.OutOfMemoryError, match=r"4,096 bytes .*so far: 4,096 bytes"):
        pool.malloc(4000)
    del other
    assert pool.malloc(4000).size == 4096  # joined
    with streams.Stream(non_blocking=True):  # the chunks of a stream are its own
        assert pool.malloc(512).size == 512 and pool.total_bytes() == 512
    pool.set_limit(size=512)
    assert pool.malloc(512).size == 512  # and are given back before memory is refused


@pytest.mark.parametrize("given", [(3, -1, -1), (-1, 3), (0, 600, 300)])
def test_arange_casts_its_numbers(cp, given):
    with pytest.raises(OverflowError):
        cp.arange(*given, dtype=np.uint8)
    assert cp.arange(3, dtype=np.uint8)[::-1].tolist() == [2, 1, 0]


def test_small_numbers_are_0_in_arithmetic_alone(cp):
    tiny = np.finfo(np.float32).tiny
    host = np.array([tiny / 2, -tiny / 2, tiny], np.float32)
    x = cp.asarray(host)
    assert x.copy().tolist() == x.tolist() == host.tolist()
    assert (x + 0).tolist() == (x * 1).tolist() == cp.abs(x).tolist() == [0, 0, tiny]
    assert cp.maximum(x, np.float32(1e-38)).tolist() == [0, 0, tiny]
    assert (x[2:] / 2).tolist() == [0] and (x > 0).tolist() == [False, False, True]
    x /= 2
    assert x.tolist() == [0, 0, 0]


@pytest.mark.parametrize("codebook", ["nf3", "int3", "nf2", "int2", "nf4"])
@pytest.mark.parametrize("shape", [(4, 64), (3, 50)])
def test_blocks_of_zeros_in_few_bits(cp, codebook, shape):
    """What would be divided by 1e-38 is divided by 0 where that is flushed."""
    x = np.zeros(shape, np.float32)
    found = quantize_4bit(cp.asarray(x), codebook, 64, False)
    expected = quantize_4bit(x, codebook, 64, False)
    assert found.packed.get().tobytes() == expected.packed.tobytes()
    assert np.array_equal(found.dequantize().get(), x)


def test_hooks_hear_of_memory(cp):
    heard, pool = [], cp.get_default_memory_pool()
    pool.free_all_blocks()

    class Hook(cp.cuda.MemoryHook):
        name = "test"

        def malloc_postprocess(self, **block): heard.append(block)
        def free_postprocess(self, **block): heard.append(block)

    with Hook() as hook:
        x = cp.zeros(100)
        with pytest.raises(KeyError), hook:
            pass
        place = x.data.ptr
        del x
        pool.set_limit(size=1)
        with pytest.raises(MemoryError):
            cp.zeros(1000)
    pool.set_limit(size=0)
    cp.zeros(100)
    common = {"device_id": 0, "mem_size": 1024, "mem_ptr": place, "pmem_id": place}
    refused = common | {"size": 8000, "mem_size": 8192, "mem_ptr": 0, "pmem_id": 0}
    assert heard == [common | {"size": 800}, common, refused]


# products on pointers


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_norm_takes_no_memory(cp, dtype):
    x = arange(cp, 300, dtype=dtype)  # whose squares are counted exactly
    assert blas_of_ours.dot(x, x) == 299 * 300 * 599 / 6
    with peak_memory() as peak:
        before = peak.bytes
        assert flat.squares(x) == 299 * 300 * 599 / 6
        assert peak.bytes == before
        x @ x
        assert peak.bytes >= before + x.nbytes

def column_major(cp, matrices, pitch, dtype):
    """(n, rows, columns) laid out down the columns `pitch` apart, nan between; and the array."""
    n, rows, columns = matrices.shape
    memory = np.full((n, columns, pitch), np.nan, dtype)
    memory[:, :, :rows] = matrices.swapaxes(1, 2).astype(dtype)
    return cp.asarray(memory)


@given(sizes=st.tuples(*4 * [st.integers(1, 4)]), turned=st.tuples(st.booleans(), st.booleans()),
       gaps=st.tuples(*3 * [st.integers(0, 2)]), seed=st.integers(0, 99),
       factors=st.sampled_from([(1, 0), (0.5, 1), (-2, 0.25)]),
       dtypes=st.sampled_from([("float32",) * 2, ("float16",) * 2, ("bfloat16",) * 2,
                               ("bfloat16", "float32"), ("float16", "float32"), ("float64",) * 2]))
def test_gemm_equals_numpy(sizes, turned, gaps, seed, factors, dtypes):
    (batch, m, n, k), rng, (alpha, beta) = sizes, np.random.default_rng(seed), factors
    a, b, c = (rng.integers(-8, 8, (batch, *shape)) for shape in ((m, k), (k, n), (m, n)))
    expected = alpha * (a @ b) + beta * c
    stored = [x.swapaxes(1, 2) if t else x for x, t in zip((a, b), turned)]
    pitches = [x.shape[1] + gap for x, gap in zip((*stored, c), gaps)]
    with installed() as cp:
        from cupy_backends.cuda.libs import cublas

        A, B = (column_major(cp, x, p, dtypes[0]) for x, p in zip(stored, pitches))
        C = column_major(cp, c if beta else np.full(c.shape, np.nan), pitches[2], dtypes[1])
        kind = np.float64 if dtypes[0] == "float64" else np.float32
        compute = 70 if dtypes[0] == "float64" else cublas.CUBLAS_COMPUTE_32F
        numbers = np.array([alpha, beta], kind)
        address = numbers.ctypes.data
        handle, (t, s) = cp.cuda.device.get_cublas_handle(), (DTYPES[d] for d in dtypes)
        head = (handle, *map(int, turned), m, n, k, address)
        if batch == 1:
            cublas.gemmEx(*head, A.data.ptr, t, pitches[0], B.data.ptr, t, pitches[1],
                          address + kind().itemsize, C.data.ptr, s, pitches[2], compute, -1)
        else:
            cublas.gemmStridedBatchedEx(
                *head, A.data.ptr, t, pitches[0], A.size // batch, B.data.ptr, t, pitches[1],
                B.size // batch, address + kind().itemsize, C.data.ptr, s, pitches[2],
                C.size // batch, batch, compute, -1)
        found = C.get().astype(np.float64)
    close(found[:, :, :m].swapaxes(1, 2), expected, dtypes[1])
    assert np.isnan(found[:, :, m:]).all(), "nothing is written between the columns"


def test_gemm_refuses(cp):
    from cupy_backends.cuda.libs import cublas

    x, one = arange(cp, 4, 4), ctypes.c_float(1)
    def product(m=4, kinds=(0, 0, 0), pitch=4, place=0, compute=68, algo=-1):
        operands = [(x.data.ptr + place, kind, pitch) for kind in kinds]
        address = ctypes.addressof(one)
        cublas.gemmEx(1, 0, 0, m, 4, 4, address, *operands[0], *operands[1], address, *operands[2],
                      compute, algo)

    product()
    assert launches == {"gemmEx": 1}
    for wrong in (dict(pitch=3), dict(m=-1), dict(algo=5)):
        with pytest.raises(cublas.CUBLASError, match="INVALID_VALUE"):
            product(**wrong)
    for wrong in (dict(kinds=(0, 14, 0)), dict(kinds=(0, 0, 2)), dict(compute=64)):
        with pytest.raises(cublas.CUBLASError, match="NOT_SUPPORTED"):
            product(**wrong)
    with pytest.raises(IndexError, match="in no array"):
        product(place=4)
    with pytest.raises(IndexError, match="in no array"):
        product(pitch=5)


# installing


def test_modules_come_and_go():
    def ours(): return {n: m for n, m in sys.modules.items() if n.split(".")[0].startswith("cupy")}
    before = ours()
    with installed() as cp:
        import cupy
        import cupyx.scipy.special

        assert cupy is cp and cupy.is_available() and cupy.cuda.is_available()
        x = cupyx.scipy.special.erf(cp.asarray(np.float32([0, 0.5])))
        np.testing.assert_allclose(x.get(), [0, 0.5204999], rtol=1e-6)
        cp.zeros(3)
        cp.get_default_memory_pool().set_limit(size=1 << 40)
    assert ours() == before and sys.modules.get("cupy") is real.REAL
    with installed() as cp:
        assert not launches and cp.get_default_memory_pool().get_limit() == 0


def test_kernels_run_on_arrays(cp):
    source = """extern "C" __global__ void twice(float *y, const float *x, float by, int n) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) y[i] = by * x[i];
    }"""
    x = arange(cp, 37)
    y, kernel = cp.empty_like(x), cp.RawModule(code=source).get_function("twice")
    kernel((2,), (32,), (y, x, np.array([2], np.float32), np.int32(37)))
    np.testing.assert_array_equal(y.get(), 2 * x.get())
    assert launches["twice"] == 1 and emulated_cupy.traffic["twice"] == 2 * 37 * 4
    with pytest.raises(TypeError, match=r"numpy\.ndarray"):
        kernel((2,), (32,), (y, x.get(), np.float32(2), np.int32(37)))
