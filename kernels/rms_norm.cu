// RMSNorm and its gradient with respect to x; `rms_norm` of minilm/ops.py.
//
//     rstd = 1 / sqrt((x * x).mean(-1) + eps)                x (N, C), rstd (N,)
//     xhat = x * rstd[:, None]
//     y    = xhat * g                                        g (C,)
//     dx   = rstd[:, None] * (dy * g - xhat * (dy * g * xhat).mean(-1)[:, None])
//
// All is computed in float; y and dx are rounded once. Each sum has one order, so the bits are the
// same every time.
//
// Launch: N blocks of 128 threads. A block has one row and reads it in vectors of 16 bytes, first
// for its sum and then for its result. The second time the row comes from the L1 cache, with g.
// Bytes per number in bf16: forward 4, for x in and y out; backward 6, for dy and x in and dx out.
// Floor at 4.3 TB/s: 4096 rows of 2048 in bf16, forward 7.8 us, backward 11.7 us.
// Reached on an H200, 2026-11-27, in a CUDA graph: forward 12.0 us, backward 16.0 us.
// Check: python scripts/bench/check_kernels.py rows
// Registers: at most 48
#include "hardware.cuh"
#include "vector.cuh"

constexpr int THREADS = 128;
__shared__ float warp_sums[THREADS / 32];

// The sum of x over the block, for every thread. It may be called once only.
__device__ __forceinline__ float block_sum(float x) {
    #pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < THREADS / 32; i++) sum += warp_sums[i];
    return sum;
}

__device__ __forceinline__ void normalise(
    const REAL* x, const REAL* g, REAL* y, float* rstd, int C, float eps, bool whole) {
    float v[VECTOR], w[VECTOR], sum = 0.0f;
    for (int c = VECTOR * threadIdx.x; c < C; c += VECTOR * THREADS) {
        load_vector(v, x + c, whole, C - c);
        #pragma unroll
        for (int i = 0; i < VECTOR; i++) sum = fmaf(v[i], v[i], sum);
    }
    float r = 1.0f / sqrtf(block_sum(sum) / C + eps);
    if (threadIdx.x == 0) *rstd = r;
    for (int c = VECTOR * threadIdx.x; c < C; c += VECTOR * THREADS) {
        load_vector(v, x + c, whole, C - c);
        load_vector(w, g + c, whole, C - c);
        #pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] *= r * w[i];
        store_vector(y + c, v, whole, C - c);
    }
}

__device__ __forceinline__ void gradient(
    const REAL* dy, const REAL* x, const REAL* g, float r, REAL* dx, int C, bool whole) {
    float d[VECTOR], v[VECTOR], w[VECTOR], sum = 0.0f;
    for (int c = VECTOR * threadIdx.x; c < C; c += VECTOR * THREADS) {
        load_vector(d, dy + c, whole, C - c);
        load_vector(v, x + c, whole, C - c);
        load_vector(w, g + c, whole, C - c);
        #pragma unroll
        for (int i = 0; i < VECTOR; i++) sum = fmaf(d[i] * w[i], v[i] * r, sum);
    }
    float mean = block_sum(sum) / C;
    for (int c = VECTOR * threadIdx.x; c < C; c += VECTOR * THREADS) {
        load_vector(d, dy + c, whole, C - c);
        load_vector(v, x + c, whole, C - c);
        load_vector(w, g + c, whole, C - c);
        #pragma unroll
        for (int i = 0; i < VECTOR; i++) d[i] = r * fmaf(v[i] * r, -mean, d[i] * w[i]);
        store_vector(dx + c, d, whole, C - c);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    const REAL* __restrict__ x, const REAL* __restrict__ g, REAL* __restrict__ y,
    float* __restrict__ rstd, int C, float eps) {
    long long row = blockIdx.x, i = row * C;
    if (C % VECTOR == 0)  // every row begins at a multiple of 16 bytes
        normalise(x + i, g, y + i, rstd + row, C, eps, true);
    else
        normalise(x + i, g, y + i, rstd + row, C, eps, false);
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_backward(
    const REAL* __restrict__ dy, const REAL* __restrict__ x, const REAL* __restrict__ g,
    const float* __restrict__ rstd, REAL* __restrict__ dx, int C) {
    long long row = blockIdx.x, i = row * C;
    if (C % VECTOR == 0)
        gradient(dy + i, x + i, g, rstd[row], dx + i, C, true);
    else
        gradient(dy + i, x + i, g, rstd[row], dx + i, C, false);
}
