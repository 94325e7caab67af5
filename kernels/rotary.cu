// Rotary positions; `rotary` of minilm/heads.py. The same pass moves the heads in front of the
// tokens.
//
//     a, b = x[..., :half], x[..., half:]                x (B, T, H, D), half = D / 2
//     y[..., :half] = a * cos - b * sin                  y (B, H, T, D); cos, sin (T, half)
//     y[..., half:] = b * cos + a * sin
//
// back: the gradient, which is the turn by -sin, from (B, H, T, D) to (B, T, H, D). Each product
// and sum is rounded to REAL, as in NumPy, so the bits are the same.
//
// Launch: blocks of 256 threads. A thread has 16 bytes of a and 16 of b, or what is left of a half.
// It reads both, with cos and sin, and writes both.
// Bytes per number in bf16: 4, for x in and y out; the tables stay in the cache.
// Floor at 4.26 TB/s: 4096 tokens of 32 heads of 64 in bf16, 7.9 us each way. Predicted: 9 - 10
// us. Reached on an H200, 2026-11-27: 11.0 us forward, 12.0 us backward; 4 heads 3.4 and 3.5 us.
// Check: python scripts/bench/check_kernels.py rotary
// Registers: at most 64
#include "hardware.cuh"
#include "vector.cuh"

__device__ __forceinline__ float rounded(float x) {
    REAL r;
    put(&r, x);
    return widen(r);
}

__device__ __forceinline__ void turn(
    const REAL* x, const REAL* cos, const REAL* sin, REAL* y, int half, float sign, bool whole,
    int left) {
    float a[VECTOR], b[VECTOR], c[VECTOR], s[VECTOR];
    load_vector(a, x, whole, left);
    load_vector(b, x + half, whole, left);
    load_vector(c, cos, whole, left);
    load_vector(s, sin, whole, left);
    #pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        float x0 = a[i], x1 = b[i], sine = sign * s[i];
        a[i] = __fsub_rn(rounded(__fmul_rn(x0, c[i])), rounded(__fmul_rn(x1, sine)));
        b[i] = __fadd_rn(rounded(__fmul_rn(x1, c[i])), rounded(__fmul_rn(x0, sine)));
    }
    store_vector(y, a, whole, left);
    store_vector(y + half, b, whole, left);
}

// n: threads that have work, B T H times the vectors of half a head.
extern "C" __global__ void __launch_bounds__(256) rotary(
    const REAL* __restrict__ x, const REAL* __restrict__ cos, const REAL* __restrict__ sin,
    REAL* __restrict__ y, int n, int T, int H, int half, int back) {
    unsigned i = blockIdx.x * 256u + threadIdx.x;
    if (i >= n) return;
    int vectors = (half + VECTOR - 1) / VECTOR, row = i / vectors, at = i % vectors * VECTOR;
    int h = row % H, t = row / H % T, b = row / H / T;
    long long between = row, apart = ((long long)b * H + h) * T + t;  // the head among all heads
    x += (back ? apart : between) * 2 * half + at;
    y += (back ? between : apart) * 2 * half + at;
    cos += (long long)t * half + at;
    sin += (long long)t * half + at;
    if (half % VECTOR == 0)  // every half of a head begins at a multiple of 16 bytes
        turn(x, cos, sin, y, half, back ? -1.0f : 1.0f, true, VECTOR);
    else
        turn(x, cos, sin, y, half, back ? -1.0f : 1.0f, false, half - at);
}
