// The products of LoRA (arXiv:2106.09685), forward and backward, on tiles in shared memory. This is
// a kernel to learn from: it is faster to dequantize W and multiply by cuBLAS, on tensor cores.
//
//     C = scale (P Q^T + P2 Q2^T)     P (M, K), Q (N, K), P2 (M, R), Q2 (N, R) -> C (M, N)
//
//     h = scale x A^T                 dh = scale dy B
//     y = x W^T + h B^T               dx = dy W + dh A        dA = dh^T x        dB = dy^T h
//
// P_turned says that P and P2 lie in memory as (K, M) and (R, M); Q_turned says the same of Q and
// Q2. So a transpose is only another order of reading. Both terms are one sum of K + R products, so
// the update costs no further pass over y or dx. Sums are in float, rounded once to REAL. One
// thread computes each sum, first term first, so the bits are always the same.
//
// Launch: ceil(M / 64) ceil(N / 64) blocks of 256 threads, one for each tile of 64 x 64. A thread
// has 4 x 4 sums: 8 numbers from shared memory make 16 products. Each block reads 64 (K + R)
// numbers of P and P2 and as many of Q and Q2. So each number of P is read N / 64 times, mostly
// from the L2 cache.
// Flops: 2 M N (K + R). Bytes: at least those of the operands and of C, once.
// Floor at 790 TFLOP/s for M = 2048, W 4096 x 4096, r = 16 in bf16: y and h 87.7 us, the gradients
// 88.3 us; their bytes alone, at 4.3 TB/s, 15.7 us and 19.6 us. This kernel multiplies in float
// without tensor cores. Its peak is a twelfth of theirs, so it cannot come near the floor.
// Reached on an H200, 2026-11-27: 1024 x 1024 x 1024 forward 179 us, backward 333 us
// (cuBLAS 95 and 118): it is there to be read.
// Check: python scripts/bench/check_kernels.py lora
// Registers: at most 80
#include "hardware.cuh"

#define TILE 64   // lines of P and of Q: rows and columns of C
#define DEPTH 16  // terms of the sums that a tile holds
#define PITCH (TILE + 4)  // 2 stores of a warp share a bank, not 16, and 4 numbers stay one load

// Loads a tile of a `lines` x `depth` matrix, zero beyond it, into tile[k * PITCH + line].
__device__ __forceinline__ void load_tile(
    float* tile, const REAL* from, int lines, int depth, long long pitch, int turned) {
    // Neighbours in a warp read neighbours in memory: 16 of a line, or 32 lines if turned.
    int line = turned ? threadIdx.x % TILE : threadIdx.x / DEPTH;
    int k = turned ? threadIdx.x / TILE : threadIdx.x % DEPTH;
    int next_line = turned ? 0 : 256 / DEPTH, next_k = turned ? 256 / TILE : 0;
    from += turned ? k * pitch + line : line * pitch + k;
    #pragma unroll
    for (int j = 0; j < TILE * DEPTH / 256; j++) {
        tile[k * PITCH + line] = line < lines && k < depth ? widen(*from) : 0.0f;
        line += next_line;
        k += next_k;
        from += (next_line + next_k) * pitch;
    }
}

extern "C" __global__ void __launch_bounds__(256) lora_matmul(
    const REAL* __restrict__ P, const REAL* __restrict__ Q,
    const REAL* __restrict__ P2, const REAL* __restrict__ Q2, REAL* __restrict__ C,
    int M, int N, int K, int R, int P_turned, int Q_turned, float scale) {
    alignas(16) __shared__ float p_tile[DEPTH * PITCH], q_tile[DEPTH * PITCH];
    int across = (N - 1) / TILE + 1, row = blockIdx.x / across * TILE;
    int column = blockIdx.x % across * TILE, my_row = threadIdx.x / 16 * 4;
    int my_column = threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    for (int term = 0; term < 2; term++) {
        long long p_pitch = P_turned ? M : K, q_pitch = Q_turned ? N : K;
        P += P_turned ? row : row * p_pitch;
        Q += Q_turned ? column : column * q_pitch;
        for (int left = K; left > 0; left -= DEPTH) {
            load_tile(p_tile, P, M - row, left, p_pitch, P_turned);
            load_tile(q_tile, Q, N - column, left, q_pitch, Q_turned);
            P += P_turned ? DEPTH * p_pitch : DEPTH;
            Q += Q_turned ? DEPTH * q_pitch : DEPTH;
            __syncthreads();
            #pragma unroll 8
            for (int k = 0; k < DEPTH; k++) {
                const float* p = p_tile + k * PITCH + my_row;
                const float* q = q_tile + k * PITCH + my_column;
                #pragma unroll
                for (int i = 0; i < 4; i++)
                    #pragma unroll
                    for (int j = 0; j < 4; j++) sum[i][j] = fmaf(p[i], q[j], sum[i][j]);
            }
            __syncthreads();  // all have read it before the next tile comes
        }
        P = P2, Q = Q2, K = R;
    }
    row += my_row;
    column += my_column;
    #pragma unroll
    for (int i = 0; i < 4; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++)
            if (row + i < M && column + j < N)
                put(C + (long long)(row + i) * N + column + j, __fmul_rn(sum[i][j], scale));
}
