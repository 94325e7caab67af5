// A linear layer of 4-bit weights, with its low-rank update, for at most 16 rows of x.
//
//     W = levels.astype(bfloat16)[codes] * repeat(c2, 64)    (N, K), blocks of 64 along K
//     y = (x @ W.T + h @ B.T).astype(bfloat16)               x (M, K), h (M, r), B (N, r): bfloat16
//
// Rounded to bfloat16: the levels (by 2^-8 at most, no worse than weights dequantized to bfloat16)
// and the result. Products of two bfloat16 are exact; sums and the constants are float32.
//
// Launch: ceil(N / 16) blocks of 256 threads. A block owns 16 rows of W, each of its 8 warps an
// eighth of their columns; the warps' sums are added in their order, so that y has the same bits
// every time. Tensor cores multiply 16 rows of W by TILES = ceil(M / 8) times 8 rows of x, each
// number of tiles compiled for itself; W leaves its 4 bits only in their registers.
// Bytes: N K (1/2 + 4/64) + 2 (M K + M N + (M + N) r); flops: 2 M N (K + r).
// What limits: the path to cache and shared memory, which takes 128 bytes or one line a cycle. For
// 16 rows and 64 columns of W it is busy 16 cycles with the table, 10 with codes, 6 with constants,
// 4 with making the table, and 2 with each row of x: 40 at M = 1. 11008 x 4096 has 334 of these for
// each of 132 multiprocessors, 7 us, and they issue about 105 instructions each, 5 us beside it.
// Floor at 4.26 TB/s: 11008 x 4096 5.5 us, 4096 x 4096 2.0 us. Reached: not yet measured.
// Registers: at most 128
#include "hardware.cuh"

#ifndef TILES
#define TILES 2
#endif
#define WARPS 8
#define ROWS 16  // of W, in a block

// The lane's codes of two blocks of 64 columns, for each of its rows of W: 8 bytes of each.
//
// Loaded are 16 bytes a lane, so that the four lanes of a row have 64 neighbouring bytes: a request
// takes as long as the lines that it touches are many. So lanes 0 and 1 have the first block, 2 and
// 3 the second, until lanes 2 apart exchange what they have of the other's quarter.
__device__ __forceinline__ void load(
    uint4 (&codes)[2], const uint4* packed, const int (&row)[2], int b, bool exists) {
    int t = threadIdx.x % 4;
    #pragma unroll
    for (int i = 0; i < 2; i++)
        codes[i] = exists ? __ldg(packed + (2 * (row[i] + b) + t)) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void exchange(uint4& codes) {
    bool second = threadIdx.x % 4 >= 2;
    unsigned x = __shfl_xor_sync(0xffffffff, second ? codes.x : codes.z, 2);
    unsigned y = __shfl_xor_sync(0xffffffff, second ? codes.y : codes.w, 2);
    if (second) codes.x = x, codes.y = y;
    else codes.z = x, codes.w = y;
}

// What makes a constant of each row: asked for while the blocks before are multiplied.
struct Constants { float factor[2]; unsigned code[2]; };

// Constant i is map[c2_codes[i]] * factors[i >> shift] + offset; without codes it is factors[i].
struct Scales {
    const unsigned char* c2_codes;
    const float* factors;
    unsigned start;  // the thread block's first
    int shift, doubled;
};

__device__ __forceinline__ Constants ask(
    const Scales& scales, const int (&row)[2], int b, bool exists) {
    Constants c = {};
    if (exists)
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned at = scales.start + row[i] + b;
            c.factor[i] = __ldg(scales.factors + (at >> scales.shift));
            if (scales.doubled) c.code[i] = __ldg(scales.c2_codes + at);
        }
    return c;
}

// The lane's quarter of a block of x, in row 8 tile + g of each tile. Rows past the last are zeros,
// and cost nothing.
__device__ __forceinline__ void load_x(
    uint4 (&v)[TILES][2], const uint4* const (&columns)[TILES], const int (&limit)[TILES], int b) {
    #pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        #pragma unroll
        for (int i = 0; i < 2; i++)
            v[tile][i] = b < limit[tile] ? __ldg(columns[tile] + 8 * b + i)
                                         : make_uint4(0, 0, 0, 0);
}

// The two levels of the byte in bits 7 .. 14, from the lane's copy.
__device__ __forceinline__ unsigned levels_of(
    const unsigned (*table)[32], unsigned bits, unsigned copy) {
    return *reinterpret_cast<const unsigned*>(
        reinterpret_cast<const char*>(table) + ((bits & 255 << 7) | copy));
}

// sum += W x^T over a block of 64 columns. The lane's rows of W have `codes` and constants c, and x
// is its part of the block, in each tile.
//
// A tensor core adds over k, 16 columns at a time, and any order of columns will do if W and x
// agree on it. Here a lane has a quarter of a block, 8 bytes of codes. Step i takes four of its 16
// columns: 4 i and the next where mma has k = 2 t, 2 t + 1, and the two after where it has
// k = 2 t + 8, 2 t + 9. So a byte of codes is one register of W, and the registers of x are used in
// the order in which they were loaded.
__device__ __forceinline__ void multiply(
    float (&sum)[TILES][4], const uint2 (&codes)[2], const float (&c)[2],
    const uint4 (&x)[TILES][2], const unsigned (*table)[32], unsigned copy) {
    float d[TILES][4] = {};
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned one = (i < 2 ? codes[0].x : codes[0].y) >> 16 * (i % 2);
        unsigned two = (i < 2 ? codes[1].x : codes[1].y) >> 16 * (i % 2);
        unsigned w[4] = {levels_of(table, one << 7, copy), levels_of(table, two << 7, copy),
                         levels_of(table, one >> 1, copy), levels_of(table, two >> 1, copy)};
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const uint4& four = x[tile][i / 2];
            unsigned step[2] = {i % 2 ? four.z : four.x, i % 2 ? four.w : four.y};
            mma_m16n8k16_bf16(d[tile], w, step);
        }
    }
    #pragma unroll
    for (int tile = 0; tile < TILES; tile++)
        #pragma unroll
        for (int i = 0; i < 4; i++) sum[tile][i] = fmaf(d[tile][i], c[i / 2], sum[tile][i]);
}

// Columns k and k + 1 of a row of r numbers in one register; zeros beyond the row's end.
__device__ __forceinline__ unsigned pair(const __nv_bfloat16* matrix, int row, int k, int r) {
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(matrix) + row * r + k;
    unsigned first = k < r ? bits[0] : 0, second = k + 1 < r ? bits[1] : 0;
    return first | second << 16;
}

// sum += B h^T: r more columns, 16 for each warp in turn. N rows of B exist.
__device__ __forceinline__ void add_low_rank(
    float (&sum)[TILES][4], const __nv_bfloat16* h, const __nv_bfloat16* B,
    int N, int M, int r) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int n[2] = {min(g, N - 1), min(g + 8, N - 1)};
    #pragma unroll 1  // r is small: most warps have none, few have two
    for (int first = 16 * warp; first < r; first += 16 * WARPS) {
        int k = first + 2 * t;
        unsigned w[4] = {pair(B, n[0], k, r), pair(B, n[1], k, r),
                         pair(B, n[0], k + 8, r), pair(B, n[1], k + 8, r)};
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            int m = min(8 * tile + g, M - 1);
            unsigned v[2] = {pair(h, m, k, r), pair(h, m, k + 8, r)};
            mma_m16n8k16_bf16(sum[tile], w, v);
        }
    }
}

union Shared {
    unsigned table[256][32];  // the two levels of each byte, a copy for each lane: the lane's own
                              // bank, where none collides with another
    float partial[WARPS][ROWS][8 * TILES + 1];  // then the sums; 1 more, for other banks each row
};

__device__ __forceinline__ void make_table(unsigned (*table)[32], const float* levels) {
    int byte = threadIdx.x;
    __nv_bfloat162 two = __floats2bfloat162_rn(levels[byte >> 4], levels[byte & 15]);
    unsigned bits = *reinterpret_cast<const unsigned*>(&two);
    uint4 four = make_uint4(bits, bits, bits, bits), *row = reinterpret_cast<uint4*>(table[byte]);
    for (int i = 0; i < 8; i++) row[(byte + i) % 8] = four;  // eight lanes, all banks
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, TILES == 1 ? 3 : 2) nf4_matmul(
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
    // last row it repeats that one, whose products are not stored.
    int first = ROWS * blockIdx.x, blocks = K / 64, share = (blocks + WARPS - 1) / WARPS;
    int begin = warp * share, end = min(begin + share, blocks), row[2], limit[TILES];
    for (int i = 0; i < 2; i++) row[i] = min(8 * i + g, N - 1 - first) * blocks + begin;
    const uint4* codes = reinterpret_cast<const uint4*>(packed) + 2LL * first * blocks;
    const uint4 *columns[TILES];
    for (int tile = 0; tile < TILES; tile++) {
        int m = 8 * tile + g;
        columns[tile] = reinterpret_cast<const uint4*>(x) + m * (K / 8) + 8 * begin
                        + 2 * (2 * (t % 2) + t / 2);
        limit[tile] = m < M ? end - begin : 0;
    }
    int mine = end - begin - t / 2, its = end - begin - t;  // blocks left of codes, of constants
    Scales scales = {c2_codes, doubled ? c1 : c2, (unsigned)first * blocks, doubled ? 8 : 0,
                     doubled};
    uint4 next[2][2];
    load(next[0], codes, row, 0, 0 < mine);
    load(next[1], codes, row, 2, 2 < mine);
    Constants constants = ask(scales, row, t, 0 < its);
    uint4 next_x[TILES][2];
    load_x(next_x, columns, limit, 0);

    float mean = doubled ? __ldg(offset) : 0;
    if (doubled) map[threadIdx.x] = c2_map[threadIdx.x];
    make_table(shared.table, levels);
    __syncthreads();

    float sum[TILES][4] = {};
    unsigned copy = 4 * lane;  // bytes from a row's begin
    for (int b = 0; b < share; b += 4) {  // lane t has the constants of block b + t
        float constant[2];
        #pragma unroll
        for (int i = 0; i < 2; i++)
            constant[i] = doubled ? __fadd_rn(__fmul_rn(map[constants.code[i]],
                                                        constants.factor[i]), mean)
                                  : constants.factor[i];
        constants = ask(scales, row, b + 4 + t, b + 4 < its);
        #pragma unroll
        for (int j = 0; j < 4; j += 2) {
            if (b + j >= share) break;
            uint4 now[2];
            #pragma unroll
            for (int i = 0; i < 2; i++) exchange(now[i] = next[j / 2][i]);
            load(next[j / 2], codes, row, b + j + 4, b + j + 4 < mine);
            #pragma unroll
            for (int k = 0; k < 2; k++) {
                uint2 eight[2];
                float c[2];
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    eight[i] = k ? make_uint2(now[i].z, now[i].w) : make_uint2(now[i].x, now[i].y);
                    c[i] = __shfl_sync(0xffffffff, constant[i], j + k, 4);
                }
                uint4 v[TILES][2];
                #pragma unroll
                for (int i = 0; i < 2 * TILES; i++) v[i / 2][i % 2] = next_x[i / 2][i % 2];
                load_x(next_x, columns, limit, b + j + k + 1);
                multiply(sum, eight, c, v, shared.table, copy);
            }
        }
    }
    add_low_rank(sum, h, B + (long long)first * r, N - first, M, r);

    __syncthreads();  // the table is not needed any more
    for (int tile = 0; tile < TILES; tile++)
        for (int i = 0; i < 4; i++)
            shared.partial[warp][g + 8 * (i / 2)][8 * tile + 2 * t + i % 2] = sum[tile][i];
    __syncthreads();
    int column = threadIdx.x % ROWS, m = threadIdx.x / ROWS;  // of y
    if (m >= M || first + column >= N) return;
    float total = 0;
    for (int w = 0; w < WARPS; w++) total += shared.partial[w][column][m];
    put(y + (long long)m * N + first + column, total);
}
