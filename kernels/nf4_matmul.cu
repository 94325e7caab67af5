// A linear layer of 4-bit weights, with its low-rank update, for at most 16 rows of x.
//
//     W = levels.astype(bfloat16)[codes] * repeat(c2, 64)    (N, K), blocks of 64 along K
//     y = (x @ W.T + h @ B.T).astype(bfloat16)               x (M, K), h (M, r), B (N, r): bfloat16
//
// The levels and the result are rounded to bfloat16. A level changes by 2^-8 of it at most, no more
// than a weight that is dequantized to bfloat16. Products of two bfloat16 are exact; sums and the
// constants are float32.
//
// Launch: ceil(N / 16) blocks of 256 threads. A block owns 16 rows of W, and each of its 8 warps an
// eighth of their columns. The sums of the warps are added in order, so y has the same bits every
// time. Tensor cores multiply 16 rows of W by 8 rows of x, for TILES = ceil(M / 8) tiles of x. Each
// TILES is compiled by itself. W leaves its 4 bits only in registers.
// Bytes: N K (1/2 + 4/64) + 2 (M K + M N + (M + N) r); flops: 2 M N (K + r).
// Floor at 4.3 TB/s: 4096 x 4096 2.2 us at M = 1, 2.3 us at M = 16; 11008 x 4096 5.9 and 6.0 us.
// Reached on an H200, 2026-11-27: 11008 x 4096, M = 1, 4, 8, 16: 18.0, 18.8, 19.6, 25.6
// us; 4096 x 4096 8.6, 8.7, 9.2, 12.5 us. Shared memory and the L1 cache decide: about 54 cycles
// for 16 x 64 codes, of which the table takes 16 and the codes' 8 lines a load 16.
// Check: python scripts/bench/check_kernels.py matmul
// Registers: at most 128
#include "fourbit.cuh"
#include "hardware.cuh"

#ifndef TILES
#define TILES 2
#endif
#define WARPS 8
#define DEPTH 4  // blocks of 64 columns that a warp starts to load before it multiplies the first

typedef unsigned long long Codes;  // 16 codes of a row, the first in the high half of the low byte

// sum += W x^T over `blocks` <= DEPTH blocks of 64 columns. The lane's rows of W have `codes`. Lane
// t of four has the `constant` of block t. `x` points to the lane's columns of the first block.
//
// A tensor core adds over k, 16 columns at a time, and any order of columns will do if W and x
// agree on it. Here lane t of the four that share a row has columns 16 t .. 16 t + 15 of a block,
// which are 8 bytes of codes. Step i takes four of them: 16 t + 4 i and the next as mma's k = 2 t
// and 2 t + 1, and the two after those as its k = 2 t + 8 and 2 t + 9. So a byte of codes is one
// register of W, and the registers of x are used in the order in which they were loaded.
__device__ __forceinline__ void multiply(
    float (&sum)[TILES][4], const Codes (&codes)[DEPTH][2], const float (&constant)[2],
    const uint4* const (&x)[TILES], int blocks, const unsigned (*table)[32]) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int j = 0; j < DEPTH; j++) {
        alignas(16) unsigned v[TILES][8] = {};
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            if (j < blocks) {
                reinterpret_cast<uint4*>(v[tile])[0] = __ldg(x[tile] + 8 * j);
                reinterpret_cast<uint4*>(v[tile])[1] = __ldg(x[tile] + 8 * j + 1);
            }
        float d[TILES][4] = {};
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int low = 16 * i, high = 16 * i + 8;  // where the step's two bytes begin
            unsigned w[4] = {
                table[codes[j][0] >> low & 255][lane], table[codes[j][1] >> low & 255][lane],
                table[codes[j][0] >> high & 255][lane], table[codes[j][1] >> high & 255][lane]};
            #pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                unsigned step[2] = {v[tile][2 * i], v[tile][2 * i + 1]};
                mma_m16n8k16_bf16(d[tile], w, step);
            }
        }
        float c[2] = {__shfl_sync(0xffffffff, constant[0], j, 4),
                      __shfl_sync(0xffffffff, constant[1], j, 4)};
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            #pragma unroll
            for (int i = 0; i < 4; i++) sum[tile][i] = fmaf(d[tile][i], c[i / 2], sum[tile][i]);
    }
}

// Columns k and k + 1 of a row of r numbers in one register; zeros beyond the row's end.
__device__ __forceinline__ unsigned pair(const __nv_bfloat16* matrix, int row, int k, int r) {
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(matrix) + row * r + k;
    unsigned first = k < r ? bits[0] : 0, second = k + 1 < r ? bits[1] : 0;
    return first | second << 16;
}

// sum += B h^T: r more columns, 16 for each warp in turn. A lane has rows n of B, m of h.
__device__ __forceinline__ void add_low_rank(
    float (&sum)[TILES][4], const __nv_bfloat16* h, const __nv_bfloat16* B,
    const int (&m)[TILES], const int (&n)[2], int r) {
    int warp = threadIdx.x / 32, t = threadIdx.x % 4;
    #pragma unroll 1  // r is small: most warps have no step, few have two
    for (int first = 16 * warp; first < r; first += 16 * WARPS) {
        int k = first + 2 * t;
        unsigned w[4] = {pair(B, n[0], k, r), pair(B, n[1], k, r),
                         pair(B, n[0], k + 8, r), pair(B, n[1], k + 8, r)};
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            unsigned v[2] = {pair(h, m[tile], k, r), pair(h, m[tile], k + 8, r)};
            mma_m16n8k16_bf16(sum[tile], w, v);
        }
    }
}

// If it is asked for 3 blocks per multiprocessor, the compiler uses the registers to load x ahead.
// With two tiles it does better without being asked.
extern "C" __global__ void __launch_bounds__(32 * WARPS, TILES == 1 ? 3 : 0) nf4_matmul(
    const __nv_bfloat16* __restrict__ x, const unsigned char* __restrict__ packed,
    const float* __restrict__ levels, const float* __restrict__ c2,
    const unsigned char* __restrict__ c2_codes, const float* __restrict__ c1,
    const float* __restrict__ c2_map, const float* __restrict__ offset,
    const __nv_bfloat16* __restrict__ h, const __nv_bfloat16* __restrict__ B,
    __nv_bfloat16* __restrict__ y, int M, int N, int K, int r, int doubled) {
    __shared__ unsigned table[256][32];  // the two levels of each byte, a copy for each lane in
    __shared__ float map[256];           // its own bank, so that no two lanes collide
    __shared__ float partial[WARPS][16][8 * TILES];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

    __nv_bfloat162 two = __floats2bfloat162_rn(levels[threadIdx.x >> 4], levels[threadIdx.x & 15]);
    for (int i = 0; i < 32; i++)
        table[threadIdx.x][(lane + i) % 32] = *reinterpret_cast<const unsigned*>(&two);
    if (doubled) map[threadIdx.x] = c2_map[threadIdx.x];
    __syncthreads();

    // A lane has rows g and g + 8 of the block's rows of W, and row g of each tile of x. Past the
    // last row it uses the last row again, and these products are not stored. Past its last block
    // of columns it uses that block again, with zeros for x.
    int first = 16 * blockIdx.x, n[2] = {min(g, N - 1 - first), min(g + 8, N - 1 - first)};
    int m[TILES], blocks = K / 64, share = (blocks + WARPS - 1) / WARPS;
    for (int tile = 0; tile < TILES; tile++) m[tile] = min(8 * tile + g, M - 1);
    int end = min((warp + 1) * share, blocks);
    long long start = (long long)first * blocks;  // the first row's first block
    float sum[TILES][4] = {};
    for (int b = warp * share; b < end; b += DEPTH) {
        Codes codes[DEPTH][2];
        #pragma unroll
        for (int j = 0; j < DEPTH; j++)
            #pragma unroll
            for (int i = 0; i < 2; i++)
                codes[j][i] = __ldg(reinterpret_cast<const Codes*>(packed) + 4 * start
                                    + 4 * (n[i] * blocks + min(b + j, end - 1)) + t);
        float constant[2];
        long long at[2] = {start + n[0] * blocks + min(b + t, end - 1),
                           start + n[1] * blocks + min(b + t, end - 1)};
        if (doubled)  // one test for both, so that both loads are under way together
            for (int i = 0; i < 2; i++)
                constant[i] = constant_of(at[i], c2, c2_codes, c1, map, offset, 1);
        else
            for (int i = 0; i < 2; i++) constant[i] = __ldg(c2 + at[i]);
        const uint4* columns[TILES];
        for (int tile = 0; tile < TILES; tile++)
            columns[tile] = reinterpret_cast<const uint4*>(x) + m[tile] * (K / 8) + 8 * b + 2 * t;
        multiply(sum, codes, constant, columns, end - b, table);
    }
    add_low_rank(sum, h, B + (long long)first * r, m, n, r);

    for (int tile = 0; tile < TILES; tile++)
        for (int i = 0; i < 4; i++)
            partial[warp][g + 8 * (i / 2)][8 * tile + 2 * t + i % 2] = sum[tile][i];
    __syncthreads();
    int column = threadIdx.x % 16, row = threadIdx.x / 16;  // of y
    if (row >= M || first + column >= N) return;
    float total = 0;
    for (int w = 0; w < WARPS; w++) total += partial[w][column][row];
    put(y + (long long)row * N + first + column, total);
}
