// The products of LoRA (arXiv:2106.09685), forward and backward, on tiles in shared memory: the one
// to learn from. What is fast is dequantizing W and a product of cuBLAS, on tensor cores.
//
//     C = scale (P Q^T + P2 Q2^T)     P (M, K), Q (N, K), P2 (M, R), Q2 (N, R) -> C (M, N)
//
//     h = scale x A^T                 dh = scale dy B
//     y = x W^T + h B^T               dx = dy W + dh A        dA = dh^T x        dB = dy^T h
//
// in NumPy, in float64 say, rounded once to REAL. P_turned says that P and P2 lie in memory as
// (K, M) and (R, M), Q_turned the same of Q and Q2: a transpose is another order of reading. Both
// terms are one sum of K + R products: the update costs no further pass over y or dx. Each sum is
// one thread's, first term first, so that the result is always the same bits.
//
// Launch: a block of 256 threads a tile of 64 x 64, ceil(M / 64) ceil(N / 64) blocks. A thread has
// 4 x 4 sums: 8 numbers from shared memory make 16 products. Each block reads 64 (K + R) numbers
// of either side, so a number of P comes N / 64 times, mostly from the L2 cache.
// Flops: 2 M N (K + R). Bytes: at least those of the operands and of C, once.
// Floor at 790 TFLOP/s for M = 2048, W 4096 x 4096, r = 16 in bf16: y and h 87.7 us, the gradients
// 88.4 us; their bytes alone, at 4.3 TB/s, 15.7 us and 19.6 us. This kernel multiplies in float
// without tensor cores, whose peak is a twelfth of theirs: it cannot come near.
// Reached: not yet measured.
// Registers: at most 80
#include "hardware.cuh"

#define TILE 64   // lines of P and of Q: rows and columns of C
#define DEPTH 16  // terms of the sums that a tile holds
#define PITCH (TILE + 4)  // four numbers stay one load; a warp's stores meet twice a bank, not 16 times

// A tile of a matrix of `lines` x `depth`, zero beyond it: tile[k * PITCH + line].
__device__ __forceinline__ void load_tile(
    float* tile, const REAL* from, int lines, int depth, long long pitch, int turned) {
    #pragma unroll
    for (int j = 0; j < TILE * DEPTH / 256; j++) {
        int i = threadIdx.x + 256 * j;  // neighbours in a warp read neighbours in memory
        int line = turned ? i % TILE : i / DEPTH, k = turned ? i / TILE : i % DEPTH;
        bool inside = line < lines && k < depth;
        const REAL* at = from + (turned ? k * pitch + line : line * pitch + k);
        tile[k * PITCH + line] = inside ? widen(*at) : 0.0f;
    }
}

// sum += P Q^T of the tile of C that begins at (row, column).
__device__ __forceinline__ void add_product(
    float (&sum)[4][4], float* p_tile, float* q_tile, const REAL* P, const REAL* Q,
    int M, int N, int K, int row, int column, int P_turned, int Q_turned) {
    long long p_pitch = P_turned ? M : K, q_pitch = Q_turned ? N : K;
    P += P_turned ? row : row * p_pitch;
    Q += Q_turned ? column : column * q_pitch;
    int my_row = threadIdx.x / 16 * 4, my_column = threadIdx.x % 16 * 4;
    for (int left = K; left > 0; left -= DEPTH) {
        load_tile(p_tile, P, M - row, left, p_pitch, P_turned);
        load_tile(q_tile, Q, N - column, left, q_pitch, Q_turned);
        P += P_turned ? DEPTH * p_pitch : DEPTH;
        Q += Q_turned ? DEPTH * q_pitch : DEPTH;
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            const float* p = p_tile + k * PITCH + my_row;
            const float* q = q_tile + k * PITCH + my_column;
            #pragma unroll
            for (int i = 0; i < 4; i++)
                #pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] = fmaf(p[i], q[j], sum[i][j]);
        }
        __syncthreads();  // everybody has read before the next tile comes
    }
}

extern "C" __global__ void __launch_bounds__(256) lora_matmul(
    const REAL* __restrict__ P, const REAL* __restrict__ Q,
    const REAL* __restrict__ P2, const REAL* __restrict__ Q2, REAL* __restrict__ C,
    int M, int N, int K, int R, int P_turned, int Q_turned, float scale) {
    __shared__ __align__(16) float p_tile[DEPTH * PITCH], q_tile[DEPTH * PITCH];
    int across = (N - 1) / TILE + 1;
    int row = blockIdx.x / across * TILE, column = blockIdx.x % across * TILE;
    float sum[4][4] = {};
    add_product(sum, p_tile, q_tile, P, Q, M, N, K, row, column, P_turned, Q_turned);
    add_product(sum, p_tile, q_tile, P2, Q2, M, N, R, row, column, P_turned, Q_turned);

    row += threadIdx.x / 16 * 4;
    column += threadIdx.x % 16 * 4;
    #pragma unroll
    for (int i = 0; i < 4; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++)
            if (row + i < M && column + j < N)
                put(C + (long long)(row + i) * N + column + j, __fmul_rn(sum[i][j], scale));
}
