// Dropout; `dropout` of minilm/ops.py, with the random numbers of `kept` in minilm/cuda/dropout.py.
//
//     y[i] = x[i] * scale if philox(seed, i) >= threshold else 0            x, y (n,)
//
// philox(seed, i) is word i % 4 of Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3", section 4) at counter i / 4 with the seed as its key. Nothing is stored for the
// backward pass: it computes the same numbers again, for x = dy. In float, rounded once.
//
// Launch: a block of 256 threads for every 4096 bytes of x; a thread has 16 bytes.
// Bytes per number in bf16: 4, for x in and y out. About 25 integer operations.
// Floor at 4.26 TB/s: 4096 rows of 2048 in bf16, 7.9 us. Predicted: 9 - 11 us.
// Reached on an H200, 2026-11-27: 11.5 us; for 4096 rows of 5632 28.5 us, the floor is 21.7 us.
// Check: python scripts/bench/check_kernels.py dropout
// Registers: at most 40
#include "hardware.cuh"
#include "vector.cuh"

__device__ __forceinline__ void philox(unsigned (&c)[4], unsigned key0, unsigned key1) {
    #pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned long long p = 0xD2511F53ull * c[0], q = 0xCD9E8D57ull * c[2];
        c[0] = (unsigned)(q >> 32) ^ c[1] ^ key0;
        c[2] = (unsigned)(p >> 32) ^ c[3] ^ key1;
        c[1] = (unsigned)q;
        c[3] = (unsigned)p;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

__device__ __forceinline__ void drop(
    const REAL* x, REAL* y, long long seed, unsigned threshold, float scale, long long first,
    bool whole, long long left) {
    float v[VECTOR];
    load_vector(v, x, whole, left);
    #pragma unroll
    for (int i = 0; i < VECTOR; i += 4) {
        unsigned long long count = (first + i) / 4;
        unsigned c[4] = {(unsigned)count, (unsigned)(count >> 32), 0, 0};
        philox(c, (unsigned)seed, (unsigned)((unsigned long long)seed >> 32));
        #pragma unroll
        for (int j = 0; j < 4; j++) v[i + j] = c[j] >= threshold ? v[i + j] * scale : 0.0f;
    }
    store_vector(y, v, whole, left);
}

// threshold is below 2^32.
extern "C" __global__ void __launch_bounds__(256) dropout(
    const REAL* __restrict__ x, REAL* __restrict__ y, long long n, long long seed,
    long long threshold, float scale) {
    long long i = VECTOR * (blockIdx.x * 256LL + threadIdx.x);
    if (i + VECTOR <= n)
        drop(x + i, y + i, seed, (unsigned)threshold, scale, i, true, VECTOR);
    else
        drop(x + i, y + i, seed, (unsigned)threshold, scale, i, false, n - i);
}
