// SwiGLU's product and its gradients; `swiglu` of minilm/activations.py.
//
//     s     = 1 / (1 + exp(-gate))
//     y     = gate s up
//     dgate = dy up (s + gate s (1 - s))
//     dup   = dy gate s
//
// Everything is computed in float, with the card's fast exp and quotient, and rounded once. The
// backward pass computes s again, so only gate and up are kept for it.
//
// Launch: a block of 256 threads for every 4096 bytes of gate; a thread has 16 bytes of each array.
// Bytes per number in bf16: forward 6, for 3 arrays; backward 10, for 5. About 8 and 16 flops.
// Floor at 4.3 TB/s: 4096 rows of 5632 in bf16, forward 32.2 us, backward 53.7 us.
// Reached on an H200, 2026-11-27, in a CUDA graph: forward 33.7 us, backward 55.8 us.
// Check: python scripts/bench/check_kernels.py rows
// Registers: at most 40
#include "hardware.cuh"
#include "vector.cuh"

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ void product(
    const REAL* gate, const REAL* up, REAL* y, bool whole, long long left) {
    float g[VECTOR], u[VECTOR];
    load_vector(g, gate, whole, left);
    load_vector(u, up, whole, left);
    #pragma unroll
    for (int i = 0; i < VECTOR; i++) u[i] *= g[i] * sigmoid(g[i]);
    store_vector(y, u, whole, left);
}

__device__ __forceinline__ void gradients(
    const REAL* dy, const REAL* gate, const REAL* up, REAL* dgate, REAL* dup, bool whole,
    long long left) {
    float d[VECTOR], g[VECTOR], u[VECTOR];
    load_vector(d, dy, whole, left);
    load_vector(g, gate, whole, left);
    load_vector(u, up, whole, left);
    #pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        float s = sigmoid(g[i]), silu = g[i] * s;
        g[i] = d[i] * u[i] * fmaf(silu, 1.0f - s, s);
        u[i] = d[i] * silu;
    }
    store_vector(dgate, g, whole, left);
    store_vector(dup, u, whole, left);
}

extern "C" __global__ void __launch_bounds__(256) swiglu(
    const REAL* __restrict__ gate, const REAL* __restrict__ up, REAL* __restrict__ y,
    long long n) {
    long long i = VECTOR * (blockIdx.x * 256LL + threadIdx.x);
    if (i + VECTOR <= n)
        product(gate + i, up + i, y + i, true, VECTOR);
    else
        product(gate + i, up + i, y + i, false, n - i);
}

extern "C" __global__ void __launch_bounds__(256) swiglu_backward(
    const REAL* __restrict__ dy, const REAL* __restrict__ gate, const REAL* __restrict__ up,
    REAL* __restrict__ dgate, REAL* __restrict__ dup, long long n) {
    long long i = VECTOR * (blockIdx.x * 256LL + threadIdx.x);
    if (i + VECTOR <= n)
        gradients(dy + i, gate + i, up + i, dgate + i, dup + i, true, VECTOR);
    else
        gradients(dy + i, gate + i, up + i, dgate + i, dup + i, false, n - i);
}
