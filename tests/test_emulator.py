"""The CUDA emulator: numbers, barriers, warps and the tensor core's product by their values, every
fault with its file and line, bad launches, and what the sanitizers find in kernels with a planted
bug, and do not find in the same kernels without it.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import emulator
import ml_dtypes
import numpy as np
import pytest

if not emulator.available():
    reason = "no g++: kernels cannot run on the CPU"
    pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason, allow_module_level=True)

i32, f32 = np.int32, np.float32


def line_of(code, comment):
    """The number of the line that ends with this comment, counted from its #line directive."""
    lines = code[code.index("#line"):].splitlines()[1:]
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"// {comment}"))


KERNELS = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#line 1 "kernels.cu"
#define INDEX (blockIdx.x * blockDim.x + threadIdx.x)

extern "C" __global__ void narrow(const float* x, __nv_bfloat16* bf16, __half* half, int n) {
    for (int i = INDEX; i < n; i += gridDim.x * blockDim.x) {
        bf16[i] = __float2bfloat16_rn(x[i]);
        half[i] = __float2half_rn(x[i]);
    }
}
extern "C" __global__ void narrow_pairs(const float2* x, __nv_bfloat162* bf16, __half2* half) {
    bf16[INDEX] = __floats2bfloat162_rn(x[INDEX].x, x[INDEX].y);
    half[INDEX] = __floats2half2_rn(x[INDEX].x, x[INDEX].y);
}
extern "C" __global__ void widen(const __nv_bfloat16* bf16, const __half* half, float* from_bf16,
                                 float* from_half) {
    from_bf16[INDEX] = __bfloat162float(bf16[INDEX]);
    from_half[INDEX] = __half2float(half[INDEX]);
}
extern "C" __global__ void arithmetic(const float* x, float* y) {
    float a = x[0], b = x[1], c = x[2];
    y[0] = __fmul_rn(a, b);
    y[1] = __fadd_rn(a, b);
    y[2] = __fsub_rn(a, b);
    y[3] = __fdiv_rn(a, b);
    y[4] = __fsqrt_rn(a);
    y[5] = __fmaf_rn(a, b, c);
    y[6] = a * b + c;
    y[7] = min(a, NAN);
    y[8] = max(NAN, b);
    y[9] = min(3, 7u);
}
extern "C" __global__ void add(const float* x, const float* y, float* out) {
    out[INDEX] = __fadd_rn(x[INDEX], y[INDEX]);
}
extern "C" __global__ void byte_perm(const unsigned* x, unsigned* out) {
    out[INDEX] = __byte_perm(x[0], x[1], x[2 + INDEX]);
}
extern "C" __global__ void where(uint4* out) {
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * threads + thread] = make_uint4(threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.z);
}

extern "C" __global__ void __launch_bounds__(64)
reverse(const float* x, float* out, int rounds) {
    __shared__ float fixed[64];
    DYN_SHARED(float, sized);
    float value = x[INDEX];
    for (int i = 0; i < rounds; i++) {
        fixed[threadIdx.x] = value;
        __syncthreads();
        sized[63 - threadIdx.x] = fixed[threadIdx.x];
        __syncthreads();
        value = sized[threadIdx.x];
    }
    out[INDEX] = value;
}
extern "C" __global__ void unwritten(float* out, int write) {
    __shared__ float fixed[32];
    DYN_SHARED(__half, sized);
    out[2 * INDEX] = fixed[threadIdx.x];
    out[2 * INDEX + 1] = __half2float(sized[threadIdx.x]);
    if (write) fixed[threadIdx.x] = 1.f;
    if (write) sized[threadIdx.x] = __float2half_rn(1.f);
}
extern "C" __global__ void copies(const uint4* x, uint4* out, int groups) {
    __shared__ uint4 copied[3];
    for (int i = 0; i < 3; i++) {
        load_async(copied + i, x + i);
        commit_async();
    }
    if (groups == 0) wait_async<0>();
    if (groups == 1) wait_async<1>();
    if (groups == 2) wait_async<2>();
    for (int i = 0; i < 3; i++) out[i] = copied[i];
    load_async(copied, x + 1);
    out[3] = copied[0];
    commit_async();
    wait_async<0>();
    out[4] = copied[0];
}

extern "C" __global__ void shuffles(const int* x, int* out, int width) {
    int v = x[threadIdx.x];
    int* row = out + 4 * threadIdx.x;
    row[0] = __shfl_sync(~0u, v, 5, width);
    row[1] = __shfl_xor_sync(~0u, v, 12, width);
    row[2] = __shfl_down_sync(~0u, v, 3, width);
    row[3] = __shfl_up_sync(~0u, v, 3, width);
}
extern "C" __global__ void halves(const float* x, float* out) {
    float v = x[threadIdx.x];
    if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(0x0000FFFFu, v, 1);
    else v = __shfl_xor_sync(0xFFFF0000u, v, 2);
    out[threadIdx.x] = v;
}
extern "C" __global__ void ballot(const int* x, unsigned* out) {
    out[threadIdx.x] = __ballot_sync(~0u, x[threadIdx.x]);
}
extern "C" __global__ void arrivals(int* count, float* sum, int* out) {
    out[INDEX] = atomicAdd(count, 1);
    atomicAdd(sum, 0.5f);
}
extern "C" __global__ void mma(const unsigned* a, const unsigned* b, float* d) {
    unsigned lane = threadIdx.x;
    unsigned left[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
    unsigned right[2] = {b[2 * lane], b[2 * lane + 1]};
    float sums[4] = {d[4 * lane], d[4 * lane + 1], d[4 * lane + 2], d[4 * lane + 3]};
    mma_m16n8k16_bf16(sums, left, right);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = sums[i];
}
extern "C" __global__ void many(const float* x, char i8, short i16, int i32, long long i64,
                                __half f16, float f32, double f64, double* out) {
    double values[8] = {x[0], double(i8), double(i16), double(i32), double(i64), f16, f32, f64};
    for (int i = 0; i < 8; i++) out[i] = values[i];
}
"""


@pytest.fixture(scope="module")
def kernels():
    return emulator.RawModule(KERNELS).get_function


def aligned(shape, dtype):
    """Zeros that begin at a multiple of 16 bytes, as an allocation on a GPU does."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 16, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start:start + size].view(dtype).reshape(shape)


def floats():
    """Float32 of every sort: each bfloat16, what lies halfway between two halves, random bits."""
    every = np.arange(2**16, dtype=np.uint16)
    halves = np.sort(every.view(np.float16)[np.isfinite(every.view(np.float16))]).astype(f32)
    between = (halves[1:] + halves[:-1]) / 2
    near = [np.nextafter(between, f32(side)) for side in (-np.inf, np.inf)]
    random = np.random.default_rng(0).integers(0, 2**32, 2**18, np.uint32).view(f32)
    edges = f32([65519.996, 65520, -65520, 65504, 1e30, np.inf, -np.inf, np.nan, -0.0])
    return np.concatenate([every.view(ml_dtypes.bfloat16).astype(f32), halves, between, *near,
                           random, edges])


def same(actual, expected):
    """Equal bits, but any NaN equals any other."""
    assert actual.dtype == expected.dtype
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    bits = f"u{actual.dtype.itemsize}"
    np.testing.assert_array_equal(actual[~nan].view(bits), expected[~nan].view(bits))


def test_floats_round_to_16_bits_as_in_numpy(kernels):
    x = floats()
    bf16, half = np.empty(x.size, ml_dtypes.bfloat16), np.empty(x.size, np.float16)
    kernels("narrow")((4,), (64,), (x, bf16, half, i32(x.size)))
    with np.errstate(all="ignore"):
        same(bf16, x.astype(ml_dtypes.bfloat16))
        same(half, x.astype(np.float16))


def test_pairs_round_in_their_order(kernels):
    x = aligned((64, 2), f32)
    x[:] = np.random.default_rng(0).standard_normal((64, 2))
    bf16, half = aligned((64, 2), ml_dtypes.bfloat16), aligned((64, 2), np.float16)
    kernels("narrow_pairs")((2,), (32,), (x, bf16, half))
    same(bf16, x.astype(ml_dtypes.bfloat16))
    same(half, x.astype(np.float16))


def test_all_16_bit_floats_widen_exactly(kernels):
    every = np.arange(2**16, dtype=np.uint16)
    bf16, half = every.view(ml_dtypes.bfloat16), every.view(np.float16)
    from_bf16, from_half = np.empty(2**16, f32), np.empty(2**16, f32)
    kernels("widen")((64,), (1024,), (bf16, half, from_bf16, from_half))
    same(from_bf16, bf16.astype(f32))
    same(from_half, half.astype(f32))


def test_arithmetic_rounds_each_operation_once(kernels):
    a, b = x = np.array([1 + 2**-12, 1 + 2**-13], f32)
    c = -(a * b)
    y = np.empty(10, f32)
    kernels("arithmetic")((1,), (1,), (np.append(x, c), y))
    fused = f32(np.float64(a) * np.float64(b) + np.float64(c))
    assert fused != 0
    np.testing.assert_array_equal(
        y, f32([a * b, a + b, a - b, a / b, np.sqrt(a), fused, 0, a, b, 3]))


def test_denormals_count_as_zero_in_kernels_and_only_there(kernels):
    from_denormal, to_denormal = f32([1e-40, 1e10, 0]), f32([2e-38, 1.9e-38, 0])
    y, z = np.empty(10, f32), np.empty(10, f32)
    kernels("arithmetic")((1,), (1,), (from_denormal, y))
    kernels("arithmetic")((1,), (1,), (to_denormal, z))
    assert y[0] == z[2] == 0
    assert from_denormal[0] * from_denormal[1] > 0
    assert to_denormal[0] - to_denormal[1] > 0


def test_byte_perm(kernels):
    x = np.array([0x83020100, 0x07060504, 0x3210, 0x7531, 0x0123, 0xB3A2], np.uint32)
    out = np.empty(4, np.uint32)
    kernels("byte_perm")((1,), (4,), (x, out))
    assert out.tolist() == [0x83020100, 0x07058301, 0x00010283, 0xFF830002]


def test_indices_run_x_first(kernels):
    out = aligned((2 * 3 * 2, 4 * 3 * 2, 4), np.uint32)
    kernels("where")((2, 3, 2), (4, 3, 2), (out,))
    z, y, x = np.indices((2, 3, 4)).reshape(3, -1)
    for block, threads in enumerate(out):
        np.testing.assert_array_equal(threads.T, [x, y, z, np.full(24, block // 6)])


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_shared_memory_and_barriers(kernels, rounds):
    x, out = np.random.default_rng(0).random((3, 64), f32), np.empty((3, 64), f32)
    with emulator.thread_order(rounds):
        kernels("reverse")((3,), (64,), (x, out, i32(rounds)), shared_mem=256)
    np.testing.assert_array_equal(out, x[:, ::-1] if rounds % 2 else x)


def test_unwritten_shared_memory_is_nan_in_every_block(kernels):
    out = np.zeros((4, 64), f32)
    kernels("unwritten")((4,), (32,), (out, i32(1)), shared_mem=64)
    assert np.isnan(out).all()


@pytest.mark.parametrize("groups", [0, 1, 2, 3])
def test_copies_come_when_their_group_is_waited_for(kernels, groups):
    """And a place to which one is under way has lost what it held."""
    x, out = aligned((3, 4), np.uint32), aligned((5, 4), np.uint32)
    x[...] = np.random.default_rng(0).integers(0, 2**32, x.shape, np.uint32)
    kernels("copies")((1,), (1,), (x, out, i32(groups)))
    expected = x.copy()
    expected[3 - groups :] = 2**32 - 1
    np.testing.assert_array_equal(out[:3], expected)
    np.testing.assert_array_equal(out[3:], [[2**32 - 1] * 4, x[1]])


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(kernels, width):
    x, out = np.arange(100, 132, dtype=i32), np.empty((32, 4), i32)
    with emulator.thread_order(width):
        kernels("shuffles")((1,), (32,), (x, out, i32(width)))
    lane = np.arange(32)
    place, first = lane % width, lane // width * width
    sources = [first + 5, np.where(lane ^ 12 < first + width, lane ^ 12, lane),
               np.where(place + 3 < width, lane + 3, lane),
               np.where(place >= 3, lane - 3, lane)]
    np.testing.assert_array_equal(out.T, [x[source] for source in sources])


def test_the_halves_of_a_warp_can_shuffle_apart(kernels):
    x, out = np.arange(64, dtype=f32), np.empty(64, f32)
    with emulator.thread_order(1):
        kernels("halves")((1,), (64,), (x, out))
    lane = np.arange(64)
    np.testing.assert_array_equal(out, np.where(lane % 32 < 16, lane ^ 1, lane ^ 2))


@pytest.mark.parametrize("bits", [0x80000001, 0, 0xFFFFFFFF])
def test_ballot(kernels, bits):
    x, out = np.array([7 * (bits >> i & 1) for i in range(32)], i32), np.empty(32, np.uint32)
    kernels("ballot")((1,), (32,), (x, out))
    assert (out == bits).all()


def arrivals(kernels, seed=None):
    """Which thread of 4 blocks of 64 came when; checks the sums."""
    count, total, out = np.zeros(1, i32), np.zeros(1, f32), np.empty(256, i32)
    if seed is None:
        kernels("arrivals")((4,), (64,), (count, total, out))
    else:
        with emulator.thread_order(seed):
            kernels("arrivals")((4,), (64,), (count, total, out))
    assert (count[0], total[0]) == (256, 128)
    assert sorted(out) == list(range(256))
    return out.reshape(4, 64)


def test_atomics_and_the_order_of_threads(kernels):
    np.testing.assert_array_equal(arrivals(kernels), np.arange(256).reshape(4, 64))
    orders = {seed: arrivals(kernels, seed) for seed in range(6)}
    for order in orders.values():
        assert (np.diff(order) < 0).any(axis=1).all()  # threads, in every block
    assert len({tuple(order[:, 0] // 64) for order in orders.values()}) > 2  # blocks
    assert len({order.tobytes() for order in orders.values()}) == 6
    np.testing.assert_array_equal(arrivals(kernels, 3), orders[3])
    np.testing.assert_array_equal(arrivals(kernels), np.arange(256).reshape(4, 64))


def test_mma_has_the_documented_layout(kernels):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((16, 16)).astype(ml_dtypes.bfloat16)
    b = rng.standard_normal((16, 8)).astype(ml_dtypes.bfloat16)
    c = rng.standard_normal((16, 8)).astype(f32)
    left, right = np.empty((32, 4, 2), a.dtype), np.empty((32, 2, 2), a.dtype)
    sums = np.empty((32, 2, 2), f32)
    for lane in range(32):
        group, pair = lane // 4, lane % 4 * 2
        for i, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
            left[lane, i] = a[group + row, pair + column:][:2]
        for i, row in enumerate([0, 8]):
            right[lane, i] = b[pair + row:, group][:2]
        for i, row in enumerate([0, 8]):
            sums[lane, i] = c[group + row, pair:][:2]
    with emulator.thread_order(0):
        kernels("mma")((1,), (32,), (left.view(np.uint32), right.view(np.uint32), sums))
    got = np.empty((16, 8))
    for lane in range(32):
        for i, row in enumerate([0, 8]):
            got[lane // 4 + row, lane % 4 * 2:][:2] = sums[lane, i]
    np.testing.assert_allclose(got, c + a.astype(float) @ b.astype(float), rtol=0, atol=1e-5)


def test_numbers_arrive_as_cupy_passes_them(kernels):
    out = np.empty(8)
    args = (f32([1.5]), np.int8(-2), np.int16(-3), i32(-4), 2**40, np.float16(0.1), f32(0.2), 0.3)
    kernels("many")((1,), (1,), (*args, out))
    expected = [1.5, -2, -3, -4, 2**40, np.float16(0.1), f32(0.2), 0.3]
    np.testing.assert_array_equal(out, np.array(expected, float))


FAULTS = r"""
#line 1 "faults.cu"
extern "C" __global__ void divergent(float*) {
    if (threadIdx.x < 40) __syncthreads();  // divergent
}
extern "C" __global__ void two_barriers(float*) {
    if (threadIdx.x < 16)
        __syncthreads();  // first
    else
        __syncthreads();  // second
}
extern "C" __global__ void one_line(float*) {
    if (threadIdx.x < 16) __syncthreads(); else __syncthreads();  // one line
}
extern "C" __global__ void caller_left_out(float* x) {
    x[threadIdx.x] = __shfl_sync(0x7FFFFFFF, x[threadIdx.x], 0);  // caller left out
}
extern "C" __global__ void source_left_out(float* x) {
    if (threadIdx.x < 16) x[threadIdx.x] = __shfl_sync(0xFFFF, x[threadIdx.x], 16);  // source
}
extern "C" __global__ void returned(float*) {
    if (threadIdx.x % 32 == 9) return;
    __syncwarp();  // lane 9 returned
}
extern "C" __global__ void two_collectives(float* x) {
    float v = x[threadIdx.x];
    if (threadIdx.x < 16)
        v = __shfl_xor_sync(~0u, v, 1);  // here
    else
        v = __shfl_xor_sync(~0u, v, 2);  // there
    x[threadIdx.x] = v;
}
extern "C" __global__ void two_masks(float*) {
    __syncwarp(threadIdx.x < 16 ? 0x1FFFFu : ~0u);  // two masks
}
extern "C" __global__ void deadlock(float*) {
    if (threadIdx.x < 16) __syncwarp();  // waits for ever
    else __syncthreads();
}
extern "C" __global__ void deep(float* x) {
    if (threadIdx.x < 5) return;
    volatile float values[20000];
    for (int i = 0; i < 20000; i++) values[i] = i;
    x[threadIdx.x] = values[7];
}
extern "C" __global__ void two_files(float*) {
    if (threadIdx.x < 16)
#line 5 "a.cuh"
        __syncthreads();
    else
#line 5 "b.cuh"
        __syncthreads();
}
"""


def place(comment):
    return f"faults.cu:{line_of(FAULTS, comment)}"


@pytest.fixture(scope="module")
def faults():
    return emulator.RawModule(FAULTS).get_function


@pytest.mark.parametrize("name, comment, message", [
    ("divergent", "divergent", "24 of 64 threads have already returned"),
    ("two_barriers", "second", rf"thread \(0,0,0\) at that of {place('first')}"),
    ("one_line", "one line", rf"thread \(0,0,0\) at that of {place('one line')}"),
    ("caller_left_out", "caller left out", "mask 0x7fffffff leaves out lane 31, which calls"),
    ("source_left_out", "source", "reads lane 16, which mask 0x0000ffff leaves out"),
    ("returned", "lane 9 returned", "mask 0xffffffff names lane 9, which has returned"),
    ("two_collectives", "there", f"lane 0, which waits with mask 0xffffffff at {place('here')}"),
    ("two_masks", "two masks", "mask 0xffffffff names lane 0, which waits with mask 0x0001ffff"),
    ("deadlock", "waits for ever", "deadlock: waits for its warp, while 48 of 64 threads wait"),
])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_fault_names_kernel_file_line_and_thread(faults, name, comment, message, seed):
    x = np.zeros(64, f32)
    where = rf"{name}: {place(comment)}: thread \(\d+,0,0\) of block \(0,0,0\)"
    if seed is None:
        with pytest.raises(RuntimeError, match=f"{where}: .*{message}"):
            faults(name)((1,), (64,), (x,))
    else:
        with pytest.raises(RuntimeError, match=r"faults\.cu"), emulator.thread_order(seed):
            faults(name)((1,), (64,), (x,))


def test_barriers_of_two_files_are_two_barriers(faults):
    with pytest.raises(RuntimeError, match=r"two_files: b\.cuh:5: .* at that of a\.cuh:5"):
        faults("two_files")((1,), (64,), (np.zeros(1, f32),))


def test_a_mask_may_not_name_lanes_beyond_the_block(faults):
    with pytest.raises(RuntimeError, match="divergent"):
        faults("divergent")((1,), (64,), (np.zeros(1, f32),))  # leaves lane 12 waiting
    with pytest.raises(RuntimeError, match="names lane 12, which has returned or never was"):
        faults("deadlock")((1,), (12,), (np.zeros(1, f32),))


def test_a_launch_after_a_fault_runs(kernels, faults):
    with pytest.raises(RuntimeError):
        faults("divergent")((1,), (64,), (np.zeros(64, f32),))
    test_shared_memory_and_barriers(kernels, 1)


def test_a_thread_that_outgrows_its_stack_crashes():
    code = """if True:
        import sys, emulator, numpy
        kernel = emulator.RawModule(sys.stdin.read()).get_function("deep")
        kernel((1,), (64,), (numpy.zeros(64, "f"),))
    """
    process = subprocess.run([sys.executable, "-c", code], input=FAULTS, text=True,
                             cwd=Path(__file__).parent)
    assert process.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("args, message", [
    ((), "add: 0 arguments, expected 3"),
    ((0, 0, 0, 0), "add: 4 arguments"),
    ((f32([1]), f32(1), f32([1])), "add: argument 1 is of type float32, expected an array"),
    ((f32([1]), f32([1]), None), "add: argument 2 is of type NoneType"),
    ((f32([1]), f32([1]), [1.0]), "add: argument 2 is of type list"),
])
def test_arguments_that_do_not_fit(kernels, args, message):
    with pytest.raises(TypeError, match=message):
        kernels("add")((1,), (1,), args)


@pytest.mark.parametrize("number, message", [
    (5, "argument 2, int64, has 8 bytes, expected 4"),
    (np.int16(5), "argument 2, int16, has 2 bytes, expected 4"),
    (np.array(5, i32), "argument 2 is of type ndarray, expected a number of 4 bytes"),
])
def test_numbers_of_another_size(kernels, number, message):
    x = np.zeros(128, f32)
    with pytest.raises(TypeError, match=f"reverse: {message}"):
        kernels("reverse")((1,), (64,), (x, x, number), shared_mem=256)


@pytest.mark.parametrize("grid, block, message", [
    ((0,), (1,), r"add: grid \(0,\)"),
    ((1, 65536), (1,), r"add: grid \(1, 65536\)"),
    ((1, 1, 1, 1), (1,), "add: grid"),
    ((1,), (0,), r"add: block \(0,\)"),
    ((1,), (1025,), r"add: block \(1025,\)"),
    ((1,), (1, 1, 65), "add: block"),
    ((1,), (32, 33), r"add: a block \(32, 33\) has more than 1024 threads"),
])
def test_launches_that_no_gpu_takes(kernels, grid, block, message):
    x = np.zeros(1, f32)
    with pytest.raises(ValueError, match=message):
        kernels("add")(grid, block, (x, x, x))


def test_limits_of_dynamic_shared_memory(kernels):
    launch, args = kernels("unwritten"), (np.zeros(64, f32), i32(0))
    launch((1,), (32,), args, shared_mem=48 << 10)
    with pytest.raises(ValueError, match="49153 bytes of dynamic shared memory, at most 49152"):
        launch((1,), (32,), args, shared_mem=(48 << 10) + 1)
    launch.max_dynamic_shared_size_bytes = 227 << 10
    launch((1,), (32,), args, shared_mem=227 << 10)
    launch.max_dynamic_shared_size_bytes = 228 << 10
    with pytest.raises(ValueError, match="232449 bytes of dynamic shared memory, at most 232448"):
        launch((1,), (32,), args, shared_mem=(227 << 10) + 1)


def test_launches_are_counted_by_name(kernels):
    before = emulator.launches.copy()
    x = np.zeros(1, f32)
    kernels("add")((1,), (1,), (x, x, x))
    with pytest.raises(TypeError):
        kernels("add")((1,), (1,), (x, x))
    assert emulator.launches - before == {"add": 1}


ONE = 'extern "C" __global__ void one(float* x) {{ x[0] = {}; }}'


def test_options(tmp_path):
    (tmp_path / "value.h").write_text("#define VALUE 7\n")
    code = '#include "value.h"\n' + ONE.format("VALUE * TIMES")
    options = ("-std=c++17", f"-I{tmp_path}", "-DTIMES=3", "--use_fast_math")
    x = np.zeros(1, f32)
    emulator.RawModule(code=code, options=options).get_function("one")((1,), (1,), (x,))
    assert x[0] == 21


@pytest.mark.parametrize("start, place, mistake", [
    ("", "kernel.cu:2:", "y"), ('#line 70 "other.cu"', "other.cu:70:", "0; int unused")])
def test_an_error_or_warning_of_the_compiler_names_file_and_line(start, place, mistake):
    with pytest.raises(RuntimeError, match=f"(?s)g\\+\\+ failed:.*{place}"):
        emulator.RawModule(start + "\n" + ONE.format(mistake))


def test_a_kernel_that_is_not_there():
    with pytest.raises(RuntimeError, match=r"no kernel 'two' in this module; it has \['one'\]"):
        emulator.RawModule(ONE.format(1)).get_function("two")


def test_the_same_source_is_compiled_once(monkeypatch):
    emulator.RawModule(ONE.format(1))
    monkeypatch.setattr(subprocess, "run", None)
    emulator.RawModule(ONE.format(1))


def test_no_fork_after_a_launch_under_tsan(monkeypatch, kernels):
    monkeypatch.setenv("CUDA_SANITIZER", "thread")
    x = np.zeros(1, f32)
    kernels("add")((1,), (1,), (x, x, x))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="forked after a launch"):
        kernels("add")((1,), (1,), (x, x, x))


def test_a_sanitizer_needs_its_environment(monkeypatch):
    monkeypatch.setenv("CUDA_SANITIZER", "thread")
    with pytest.raises(RuntimeError, match=r"emulator.sanitized_environment\('thread'\)"):
        emulator.RawModule(ONE.format(1))


PLANTED = r"""
#line 1 "planted.cu"
#define INDEX (blockIdx.x * blockDim.x + threadIdx.x)
__device__ __noinline__ void store(float* place) {
    *place = 1.f;  // store
}
extern "C" __global__ void past_global(float* out, int bug) {
    out[INDEX + bug] = 1.f;  // past_global
}
extern "C" __global__ void past_static(float* out, int bug) {
    __shared__ float row[64], next[64];
    store(row + threadIdx.x + bug);
    store(next + threadIdx.x);
    __syncthreads();
    out[INDEX] = row[threadIdx.x] + next[threadIdx.x];
}
extern "C" __global__ void past_dynamic(float* out, int bug) {
    DYN_SHARED(float, row);
    row[threadIdx.x + bug] = 1.f;  // past_dynamic
    __syncthreads();
    out[INDEX] = row[threadIdx.x];
}
extern "C" __global__ void misaligned(float* out, int bug) {
    if (threadIdx.x) return;
    float4 v = *reinterpret_cast<float4*>(out + 4 * blockIdx.x + bug);  // misaligned
    out[4 * blockIdx.x] = v.y;
}

extern "C" __global__ void no_barrier(float* out, int bug) {
    __shared__ float row[64];
    row[threadIdx.x] = threadIdx.x;
    if (!bug) __syncthreads();
    out[INDEX] = row[63 - threadIdx.x];  // no_barrier
}
extern "C" __global__ void late_barrier(float* out, int bug) {
    DYN_SHARED(float, row);
    float sum = 0.f;
    for (int i = 0; i < 3; i++) {
        row[threadIdx.x] = i;  // late_barrier
        __syncthreads();
        sum += row[63 - threadIdx.x];
        if (!bug) __syncthreads();
    }
    out[INDEX] = sum;
}
extern "C" __global__ void no_syncwarp(float* out, int bug) {
    __shared__ float row[64];
    row[threadIdx.x] = threadIdx.x;
    if (bug) out[INDEX] = __shfl_xor_sync(~0u, 1.f, 1);
    else __syncwarp();
    out[INDEX] = row[threadIdx.x ^ 1];  // no_syncwarp
}
extern "C" __global__ void late_syncwarp(float* out, int bug) {
    __shared__ float row[64];
    float sum = 0.f;
    for (int i = 0; i < 3; i++) {
        row[threadIdx.x] = i;  // late_syncwarp
        __syncwarp();
        sum += row[threadIdx.x ^ 1];
        if (!bug) __syncwarp();
    }
    out[INDEX] = sum;
}
extern "C" __global__ void atomic_flag(float* out, int bug) {
    __shared__ float value;
    __shared__ unsigned arrived;
    if (threadIdx.x == 0) value = 1.f;
    if (bug) atomicAdd(&arrived, 1u);
    else __syncthreads();
    out[INDEX] = value;  // atomic_flag
}
extern "C" __global__ void one_cell(float* out, int bug) {
    if (bug && blockIdx.x == 0) out[0] += 1.f;  // one_cell
    else atomicAdd(out + blockIdx.x, 1.f);
}
extern "C" __global__ void across_blocks(float* out, int bug) {
    __shared__ float row[64];
    row[threadIdx.x] = 1.f;
    __syncthreads();
    if (threadIdx.x == 0) out[bug ? 0 : blockIdx.x] += row[63];  // across_blocks
    __syncthreads();
}
extern "C" __global__ void local_array(float* out, int) {
    float values[8];
    for (int i = 0; i < 8; i++) values[(i + threadIdx.x) % 8] = i;
    for (int i = 0; i < 8; i++) values[i] += __shfl_xor_sync(~0u, values[7 - i], 1);
    out[INDEX] = values[threadIdx.x % 8];
}
"""

RUNNER = """
import json, os, sys, tempfile
import emulator, numpy as np

def run(name, bug):
    args = np.zeros(192, np.float32), np.int32(bug)
    module.get_function(name)((3,), (64,), args, shared_mem=256)

code, clean, planted = json.load(sys.stdin)
module, ends = emulator.RawModule(code), {}
for name in ["clean", *planted]:
    with tempfile.TemporaryFile() as report:
        child = os.fork()  # a report ends it
        if not child:
            os.dup2(report.fileno(), 2)
            for each in clean if name == "clean" else [name]:
                run(each, name != "clean")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        report.seek(0)
        ends[name] = status, report.read().decode()
json.dump(ends, sys.stdout)
"""

FINDS = {
    "address": {
        "past_global": ("heap-buffer-overflow", "past_global"),
        "past_static": ("global-buffer-overflow", "store"),
        "past_dynamic": ("use-after-poison", "past_dynamic"),
        "misaligned": ("misaligned address", "misaligned"),
    },
    "thread": {
        "no_barrier": ("data race", "no_barrier"),
        "late_barrier": ("data race", "late_barrier"),
        "no_syncwarp": ("data race", "no_syncwarp"),
        "late_syncwarp": ("data race", "late_syncwarp"),
        "atomic_flag": ("data race", "atomic_flag"),
        "one_cell": ("data race", "one_cell"),
        "across_blocks": ("data race", "across_blocks"),
    },
}


@pytest.mark.parametrize("kind", FINDS)
def test_a_sanitizer_finds_the_planted_bugs_and_nothing_else(kind):
    planted = list(FINDS[kind])
    clean = [*FINDS["address"], *FINDS["thread"], "local_array"]
    process = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps([PLANTED, clean, planted]), text=True,
        capture_output=True, cwd=Path(__file__).parent, env=emulator.sanitized_environment(kind))
    assert process.returncode == 0, process.stderr
    ends = json.loads(process.stdout)
    status, report = ends.pop("clean")
    assert status == 0, report
    for name, (status, report) in ends.items():
        what, comment = FINDS[kind][name]
        assert status == 66 and what in report, f"{name} ended with {status}\n{report}"
        assert f"planted.cu:{line_of(PLANTED, comment)}" in report, report
