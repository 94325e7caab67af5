// A linear layer of 4-bit weights, with its low-rank update, for at most 16 rows of x.
//
//     W = levels.astype(bfloat16)[codes] * repeat(c2, 64)    (N, K), blocks of 64 along K
//     y = (x @ W.T + h @ B.T).astype(bfloat16)               x (M, K), h (M, r), B (N, r): bfloat16
//
// The levels and the result are rounded to bfloat16. A level changes by 2^-8 of it at most, no more
// than a weight that is dequantized to bfloat16. Products of two bfloat16 are exact; sums and the
// constants are float32.
//
// Launch: ceil(N / 32) blocks of 256 threads. A block owns 32 rows of W, and each of its 8 warps an
// eighth of their columns. The sums of the warps are added in order, so y has the same bits every
// time. Tensor cores multiply 16 rows of W by 8 rows of x, for TILES = ceil(M / 8) tiles of x. Each
// TILES is compiled by itself. W leaves its 4 bits only in registers.
// Bytes: N K (1/2 + 4/64) + 2 (M K + M N + (M + N) r); flops: 2 M N (K + r).
// Floor at 4.26 TB/s: 11008 x 4096 5.5 us, predicted 11 - 13 us; 4096 x 4096 2.0 us.
// Reached on an H200, 2026-11-27, M = 1, 8, 16, with codes by __ldg: 11008 x 4096 13.75, 14.57,
// 18.54 us; 4096 x 4096 6.80, 7.07, 8.88 us; 4096 x 11008 14.29, 14.69, 18.76 us. By __ldcs, as
// here: 13.09, 13.95, 17.50; 6.36, 6.54, 8.16; 13.75, 14.18, 17.69 us, but that variant lacked the
// unsigned index of x, and spilled 8 bytes for M > 8. With 16 rows a block: 17.5, 18.9, 24.2 us for
// the first. The path to cache and shared memory limits: 128 bytes or one line a cycle. For 16 x 64
// codes the table takes 16 cycles, codes 10, constants 6 and a tile of x 16, shared by 32 rows.
// Check: python scripts/bench/check_kernels.py matmul
// Registers: at most 128
#include "fourbit.cuh"
#include "hardware.cuh"

#ifndef TILES
#define TILES 2
#endif
constexpr int WARPS = 8;         // 16 warps of 128 registers fill a multiprocessor
constexpr int RUNS = 2;          // times 16 rows of W, which share what their warp loads of x
constexpr int ROWS = 16 * RUNS;  // of W, in a block
constexpr int EACH = 2 * RUNS;   // rows of W that a lane has, 8 apart

// Loads the lane's 16 bytes of codes in each of its rows of W, of the blocks of 64 columns b and
// b + 1. Lanes 0 and 1 of the four that share a row load the first, 2 and 3 the second: 64
// neighbouring bytes, because a load takes as long as the lines that it touches are many.
__device__ __forceinline__ void load_codes(
    uint4 (&codes)[EACH], const uint4* packed, const int (&row)[EACH], int b, int count) {
    int t = threadIdx.x % 4;
    #pragma unroll
    for (int i = 0; i < EACH; i++)
        codes[i] = b + t / 2 < count ? __ldcs(packed + (2 * (row[i] + b) + t))
                                     : make_uint4(0, 0, 0, 0);  // read once: x stays in the cache
}

// Gives the lane a quarter of each of the two blocks: the first's in x and y, the second's in z and
// w. Lanes 0 .. 3 get the quarters 0, 2, 1, 3.
__device__ __forceinline__ void exchange(uint4& codes) {
    bool second = threadIdx.x % 4 >= 2;
    unsigned x = __shfl_xor_sync(0xffffffff, second ? codes.x : codes.z, 2);
    unsigned y = __shfl_xor_sync(0xffffffff, second ? codes.y : codes.w, 2);
    if (second) codes.x = x, codes.y = y;
    else codes.z = x, codes.w = y;
}

// The two levels of the byte in bits 7 .. 14: a row of the table has 128 bytes. The lane's copy is
// `copy` bytes from its begin. Written like this, an address takes two instructions.
__device__ __forceinline__ unsigned levels_of(
    const unsigned (*table)[32], unsigned bits, unsigned copy) {
    return *reinterpret_cast<const unsigned*>(
        reinterpret_cast<const char*>(table) + ((bits & 255 << 7) | copy));
}

// sum += W x^T over a block of 64 columns, of which the lane has a quarter: `codes` and constants c
// of its rows of W, and x (16 numbers) of its row in each tile.
//
// A tensor core adds over k, 16 columns at a time, and any order of columns will do if W and x
// agree on it. Step i takes four of the lane's 16 columns: 4 i and the next as mma's k = 2 t and
// 2 t + 1, and the two after those as its k = 2 t + 8 and 2 t + 9. So a byte of codes is one
// register of W, and the registers of x are used in the order in which they were loaded.
__device__ __forceinline__ void multiply(
    float (&sum)[RUNS][TILES][4], const uint2 (&codes)[EACH], const float (&c)[EACH],
    const uint4 (&x)[TILES][2], const unsigned (*table)[32], unsigned copy) {
    float d[RUNS][TILES][4] = {};
    #pragma unroll
    for (int i = 0; i < 4; i++)
        #pragma unroll
        for (int run = 0; run < RUNS; run++) {
            const uint2 *row = codes + 2 * run;
            unsigned one = (i < 2 ? row[0].x : row[0].y) >> 16 * (i % 2);
            unsigned two = (i < 2 ? row[1].x : row[1].y) >> 16 * (i % 2);
            unsigned w[4] = {levels_of(table, one << 7, copy), levels_of(table, two << 7, copy),
                             levels_of(table, one >> 1, copy), levels_of(table, two >> 1, copy)};
            #pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const uint4& four = x[tile][i / 2];
                unsigned v[2] = {i % 2 ? four.z : four.x, i % 2 ? four.w : four.y};
                mma_m16n8k16_bf16(d[run][tile], w, v);
            }
        }
    #pragma unroll
    for (int run = 0; run < RUNS; run++)
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            #pragma unroll
            for (int i = 0; i < 4; i++)
                sum[run][tile][i] = fmaf(d[run][tile][i], c[2 * run + i / 2], sum[run][tile][i]);
}

// Columns k and k + 1 of a row of r numbers in one register; zeros beyond the row's end.
__device__ __forceinline__ unsigned pair(const __nv_bfloat16* matrix, int row, int k, int r) {
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(matrix) + row * r + k;
    unsigned first = k < r ? bits[0] : 0, second = k + 1 < r ? bits[1] : 0;
    return first | second << 16;
}

// sum += B h^T: r more columns, 16 for each warp in turn. B has N rows from the block's first on.
__device__ __forceinline__ void add_low_rank(
    float (&sum)[RUNS][TILES][4], const __nv_bfloat16* h, const __nv_bfloat16* B,
    int M, int N, int r) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    #pragma unroll 1  // r is small: most warps have no step, few have two
    for (int first = 16 * warp; first < r; first += 16 * WARPS)
        #pragma unroll
        for (int run = 0; run < RUNS; run++) {
            int k = first + 2 * t, n[2] = {min(16 * run + g, N - 1), min(16 * run + g + 8, N - 1)};
            unsigned w[4] = {pair(B, n[0], k, r), pair(B, n[1], k, r),
                             pair(B, n[0], k + 8, r), pair(B, n[1], k + 8, r)};
            #pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                int m = min(8 * tile + g, M - 1);
                unsigned v[2] = {pair(h, m, k, r), pair(h, m, k + 8, r)};
                mma_m16n8k16_bf16(sum[run][tile], w, v);
            }
        }
}

union Shared {
    unsigned table[256][32];  // the two levels of each byte, a copy for each lane in its own bank,
                              // so that no two lanes collide
    float partial[WARPS][ROWS][8 * TILES + 1];  // later; 1 more, so that rows are in other banks
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS) nf4_matmul(
    const __nv_bfloat16* __restrict__ x, const unsigned char* __restrict__ packed,
    const float* __restrict__ levels, const float* __restrict__ c2,
    const unsigned char* __restrict__ c2_codes, const float* __restrict__ c1,
    const float* __restrict__ c2_map, const float* __restrict__ offset,
    const __nv_bfloat16* __restrict__ h, const __nv_bfloat16* __restrict__ B,
    __nv_bfloat16* __restrict__ y, int M, int N, int K, int r, int doubled) {
    __shared__ Shared shared;
    __shared__ float map[256];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

    // A lane has rows g, g + 8 .. of the block's rows of W, and row g of each tile of x. Past W's
    // last row it uses that row again, and these products are not stored. x has zeros past its last
    // row and past the warp's last column; they are not loaded.
    int first = ROWS * blockIdx.x, blocks = K / 64, share = (blocks + WARPS - 1) / WARPS;
    int begin = warp * share, count = min(share, blocks - begin), row[EACH];
    for (int i = 0; i < EACH; i++) row[i] = min(8 * i + g, N - 1 - first) * blocks + begin;
    const uint4* columns = reinterpret_cast<const uint4*>(x) + g * (K / 8) + 8 * begin
                           + 2 * (2 * (t % 2) + t / 2);  // the quarter that the lane has of W
    const uint4* codes = reinterpret_cast<const uint4*>(packed) + 2LL * first * blocks;
    uint4 next[EACH];
    load_codes(next, codes, row, 0, count);

    int byte = threadIdx.x;
    __nv_bfloat162 two = __floats2bfloat162_rn(levels[byte >> 4], levels[byte & 15]);
    unsigned bits = *reinterpret_cast<const unsigned*>(&two);
    for (int i = 0; i < 8; i++)  // in an order in which eight threads use all banks
        reinterpret_cast<uint4*>(shared.table[byte])[(byte + i) % 8] =
            make_uint4(bits, bits, bits, bits);
    if (doubled) map[byte] = c2_map[byte];
    __syncthreads();

    float sum[RUNS][TILES][4] = {};
    unsigned copy = __shfl_sync(0xffffffff, 4 * lane, lane);  // else made for each address again
    for (int b = 0; b < share; b += 4) {
        float constant[EACH];  // of block b + t
        unsigned at = (unsigned)first * blocks + min(b + t, count - 1);
        if (doubled)  // one test for all, so that all loads are under way together
            #pragma unroll
            for (int i = 0; i < EACH; i++)
                constant[i] = constant_of(at + row[i], c2, c2_codes, c1, map, offset, 1);
        else
            #pragma unroll
            for (int i = 0; i < EACH; i++) constant[i] = __ldg(c2 + (at + row[i]));
        #pragma unroll
        for (int j = 0; j < 4; j += 2) {
            if (b + j >= share) break;
            uint4 now[EACH];
            #pragma unroll
            for (int i = 0; i < EACH; i++) exchange(now[i] = next[i]);
            load_codes(next, codes, row, b + j + 2, count);
            #pragma unroll
            for (int k = j; k < j + 2; k++) {
                uint2 eight[EACH];
                float c[EACH];
                uint4 v[TILES][2];
                #pragma unroll
                for (int i = 0; i < EACH; i++) {
                    eight[i] = k % 2 ? make_uint2(now[i].z, now[i].w)
                                     : make_uint2(now[i].x, now[i].y);
                    c[i] = __shfl_sync(0xffffffff, constant[i], k, 4);
                }
                #pragma unroll
                for (int i = 0; i < 2 * TILES; i++) {  // with a signed index registers spill
                    bool exists = 8 * (i / 2) + g < M && b + k < count;
                    const uint4* from = columns + (unsigned)(i / 2 * K + 8 * (b + k) + i % 2);
                    v[i / 2][i % 2] = exists ? __ldg(from) : make_uint4(0, 0, 0, 0);
                }
                multiply(sum, eight, c, v, shared.table, copy);
                if (TILES == 2) __syncwarp();  // the next products need these registers
            }
        }
    }
    add_low_rank(sum, h, B + (long long)first * r, M, N - first, r);

    __syncthreads();  // all have used the table
    for (int run = 0; run < RUNS; run++)
        for (int tile = 0; tile < TILES; tile++)
            for (int i = 0; i < 4; i++)
                shared.partial[warp][16 * run + g + 8 * (i / 2)][8 * tile + 2 * t + i % 2] =
                    sum[run][tile][i];
    __syncthreads();
    #pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * M; i += 32 * WARPS) {
        int column = i % ROWS, m = i / ROWS;  // of y
        if (first + column >= N) continue;
        float total = 0;
        for (int w = 0; w < WARPS; w++) total += shared.partial[w][column][m];
        put(y + (long long)m * N + first + column, total);
    }
}
