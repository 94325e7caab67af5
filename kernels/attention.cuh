// What attention.cu and attention_backward.cu share: tiles of rows in shared memory and products of
// them on tensor cores. HEAD_WIDTH, D, is a multiple of 16 up to 128, each compiled for itself.
//
// A block is four warps, and a warp owns 16 rows of each product: no sum crosses a warp. How 16
// rows lie in registers is told at mma_m16n8k16_bf16 in hardware.cuh, where lane l is at g = l / 4,
// t = l % 4. Three facts make attention out of it.
//
// 1. For Q K^T a register holds two neighbours of one row of Q or of K, as they lie in memory: one
//    load of 32 bits (left_operand, add_turned).
// 2. For P V with P made from S = Q K^T, two neighbouring 16 x 8 results, rounded, are a 16 x 16
//    left operand: the same rows and columns in the same lanes. P never leaves its registers.
// 3. For P V a register holds two neighbours of one column of V, from two rows in memory. Loads of
//    32 bits from rows 2t and 2t + 1, at columns 2g and 2g + 1, have two such pairs: one of an even
//    column and one of an odd. So 16 columns become two products, of the 8 even and of the 8 odd
//    columns (add_product). Lane (g, t) then has columns 4t and 4t + 2 in the even result and
//    4t + 1 and 4t + 3 in the odd one, together four neighbours, stored at once (write_rows).
#ifndef HEAD_WIDTH
#define HEAD_WIDTH 128
#endif

constexpr int D = HEAD_WIDTH;
constexpr int THREADS = 128;
constexpr int ROWS = 64;      // of a block: queries, or keys in attention_dk_dv
constexpr int PITCH = D + 8;  // 4 banks more than a multiple of 8: no two lanes of a load collide
constexpr float LOG2_E = 1.44269504f;  // exp(x) = exp2(x log2(e)), and the card has only exp2

#define WARP_ROW ((int)threadIdx.x / 32 * 16)  // the first row of this warp
#define LANE_G ((int)threadIdx.x % 32 / 4)
#define LANE_T ((int)threadIdx.x % 4)

// The sum of x over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// `rows` rows into a tile, of which `left` exist; zeros for the others.
__device__ __forceinline__ void load_tile(
    __nv_bfloat16* tile, const __nv_bfloat16* from, int rows, int left) {
    #pragma unroll 2  // more would cost attention_dk_dv registers that it does not have
    for (int i = threadIdx.x; i < rows * D / 8; i += THREADS) {
        int row = i / (D / 8), column = i % (D / 8) * 8;
        uint4 eight = {0, 0, 0, 0};
        if (row < left) eight = reinterpret_cast<const uint4*>(from)[i];
        *reinterpret_cast<uint4*>(tile + row * PITCH + column) = eight;
    }
}

__device__ __forceinline__ unsigned two(const __nv_bfloat16* neighbours) {
    return *reinterpret_cast<const unsigned*>(neighbours);
}

__device__ __forceinline__ unsigned two(float x, float y) {
    __nv_bfloat162 rounded = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const unsigned&>(rounded);
}

// A left operand: 16 x 16 numbers of a tile.
__device__ __forceinline__ void left_operand(unsigned (&a)[4], const __nv_bfloat16* tile) {
    tile += LANE_G * PITCH + 2 * LANE_T;
    a[0] = two(tile), a[1] = two(tile + 8 * PITCH);
    a[2] = two(tile + 8), a[3] = two(tile + 8 * PITCH + 8);
}

// A left operand from two neighbouring results.
__device__ __forceinline__ void left_operand(
    unsigned (&a)[4], const float (&x)[4], const float (&y)[4]) {
    a[0] = two(x[0], x[1]), a[1] = two(x[2], x[3]);
    a[2] = two(y[0], y[1]), a[3] = two(y[2], y[3]);
}

// d += a Y^T, 16 x 8, for 8 rows and 16 columns of the tile of Y.
__device__ __forceinline__ void add_turned(
    float (&d)[4], const unsigned (&a)[4], const __nv_bfloat16* tile) {
    tile += LANE_G * PITCH + 2 * LANE_T;
    unsigned b[2] = {two(tile), two(tile + 8)};
    mma_m16n8k16_bf16(d, a, b);
}

// d += a V, 16 x D, for 16 rows of the tile of V. Of the 16 columns from 16 n, d[2 n] has the even
// and d[2 n + 1] the odd ones.
__device__ __forceinline__ void add_product(
    float (&d)[D / 8][4], const unsigned (&a)[4], const __nv_bfloat16* tile) {
    tile += 2 * LANE_T * PITCH + 2 * LANE_G;
    #pragma unroll
    for (int n = 0; n < D / 16; n++, tile += 16) {
        unsigned row0 = two(tile), row1 = two(tile + PITCH);
        unsigned row8 = two(tile + 8 * PITCH), row9 = two(tile + 9 * PITCH);
        unsigned even[2] = {__byte_perm(row0, row1, 0x5410), __byte_perm(row8, row9, 0x5410)};
        unsigned odd[2] = {__byte_perm(row0, row1, 0x7632), __byte_perm(row8, row9, 0x7632)};
        mma_m16n8k16_bf16(d[2 * n], a, even);
        mma_m16n8k16_bf16(d[2 * n + 1], a, odd);
    }
}

// The warp's 16 rows of a result of add_product, times factors; `left` rows of the block exist.
__device__ __forceinline__ void write_rows(
    __nv_bfloat16* to, const float (&d)[D / 8][4], const float (&factor)[2], int left) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = WARP_ROW + LANE_G + 8 * half;
        float f = factor[half];
        if (row >= left) continue;
        uint2* out = reinterpret_cast<uint2*>(to + row * D) + LANE_T;
        #pragma unroll
        for (int n = 0; n < D / 16; n++) {
            const float *even = d[2 * n] + 2 * half, *odd = d[2 * n + 1] + 2 * half;
            uint2 four = {two(f * even[0], f * odd[0]), two(f * even[1], f * odd[1])};
            out[4 * n] = four;
        }
    }
}
