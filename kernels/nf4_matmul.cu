// A linear layer of 4-bit weights, with its low-rank update, for at most 16 rows of x.
//
//     W = levels.astype(bfloat16)[codes] * repeat(c2, 64)    (N, K), blocks of 64 along K
//     y = (x @ W.T + h @ B.T).astype(bfloat16)               x (M, K), h (M, r), B (N, r): bfloat16
//
// Rounded to bfloat16: the levels (by 2^-8 at most, no worse than weights dequantized to bfloat16)
// and the result. Products of two bfloat16 are exact; sums and the constants are float32.
//
// Launch: a block of 32 x 8 threads for each multiprocessor, at most one for 8 rows of W. A block
// takes tile after tile of 8 rows, and each of its 8 warps up to 8 blocks of 64 columns of a tile.
// So a warp that has all its columns at once (K <= 4096) keeps their part of x in registers. Codes
// come to shared memory two tiles ahead. Tensor cores multiply 16 rows of x (zeros past the last)
// by the 8 rows of W, which leaves its 4 bits only in their registers. The warps' sums are added in
// their order, so that y has the same bits every time.
//
// Bytes: N K (1/2 + 1/64 + 4/16384) + 2 (M K + M N + (M + N) r) double quantized; flops:
// 2 M N (K + r). What limits: a multiprocessor's shared memory and cache move 128 bytes a cycle.
// For 8 x 512 codes they take 125 cycles, half of them the table's, 32 the codes', and a warp about
// 520 instructions, two warps sharing a scheduler. So 11008 x 4096 takes 11 tiles x 1050 = 11500
// cycles at best, 6.2 us at 1.85 GHz, and 2 - 3 us until the first codes are there.
// Floor at 4.26 TB/s: 11008 x 4096 5.5 us, 4096 x 4096 2.0 us. Expected: 9 - 11 and 4.5 - 5.5 us,
// for each M. Reached: not yet measured. The version before (a block for 16 rows, x and codes
// through the cache), H200, 2026-11-27: 18.0, 18.8, 19.6, 25.6 us for M = 1, 4, 8, 16;
// 4096 x 4096 8.5, 8.7, 9.2, 12.5 us.
// Check: python scripts/bench/gpu_cases.py matmul
// Registers: at most 255
#include "hardware.cuh"

#define WARPS 8
#define DEPTH 8   // blocks of 64 columns that a warp has of a tile
#define STAGES 3  // of codes: those to multiply now, and two that are under way
#define ROWS 8    // of W, in a tile
#define SPAN (WARPS * DEPTH)

struct Shared {
    unsigned table[256][32];  // the two levels of each byte, a copy for each lane: in the lane's
                              // own bank, where none collides with another
    uint4 codes[STAGES][WARPS][ROWS][2 * DEPTH];  // part p of row n at p ^ 2 (n % 4): see multiply
    float sum[2][WARPS][16][ROWS];
    float constant[2][SPAN][ROWS + 2];  // 2 more, so that half a warp writes without a collision
    float map[256];
};
static_assert(sizeof(Shared) == 96256, "minilm/cuda/codes.py asks for as many bytes");

struct Weight {
    const uint4* packed;           // 32 bytes a block of 64 columns
    const unsigned char* c2_codes;
    const float* factors;          // constant i is map[c2_codes[i]] * factors[i >> shift] + offset;
    int shift, doubled;            // without codes, 1 * factors[i] + 0
    int N, blocks, share, spans;   // a warp has `share` <= DEPTH blocks of a row in each of `spans`
};

// What a block works on at a time: rows 8 tile .. 8 tile + 7, and WARPS * share blocks of columns.
struct Piece { int tile, span; };

__device__ __forceinline__ Piece after(Piece p, int spans) {
    p.span++;
    if (p.span == spans) p.span = 0, p.tile += gridDim.x;
    return p;
}

// The warp's first block of columns in a span.
__device__ __forceinline__ int first_block(const Weight& W, int span) {
    return (span * WARPS + threadIdx.y) * W.share;
}

// Block b of row n of a tile; past W's last row that one again, whose products are not stored.
__device__ __forceinline__ int block_at(const Weight& W, int tile, int n, int b) {
    return min(ROWS * tile + n, W.N - 1) * W.blocks + b;
}

// Begins to copy the warp's codes of a piece, two rows at once.
__device__ __forceinline__ void fetch(
    uint4 (&codes)[ROWS][2 * DEPTH], const Weight& W, Piece piece) {
    int half = threadIdx.x / 16 * 4, part = threadIdx.x % 16, first = first_block(W, piece.span);
    if (ROWS * piece.tile < W.N && part < 2 * min(W.share, W.blocks - first)) {
        #pragma unroll
        for (int i = 0; i < 4; i++)
            load_async(&codes[half + i][part ^ 2 * i],
                       W.packed + part + 2LL * block_at(W, piece.tile, half + i, first));
    }
    commit_async();
}

// A thread has two of a piece's constants, of block tid % 64 and rows tid / 64 and the same + 4.
// They are asked for while the piece before is multiplied; those of no block are 0.
struct Constants { float factor[2]; unsigned code[2]; };

__device__ __forceinline__ Constants ask(const Weight& W, Piece piece) {
    int i = threadIdx.y % 2 * 32 + threadIdx.x, b = piece.span * WARPS * W.share + i;
    Constants c = {};
    if (ROWS * piece.tile < W.N && i < WARPS * W.share && b < W.blocks) {
        int at[2] = {block_at(W, piece.tile, threadIdx.y / 2, b),
                     block_at(W, piece.tile, threadIdx.y / 2 + 4, b)};
        c.factor[0] = __ldg(W.factors + (at[0] >> W.shift));
        c.factor[1] = __ldg(W.factors + (at[1] >> W.shift));
        if (W.doubled) c.code[0] = __ldg(W.c2_codes + at[0]), c.code[1] = __ldg(W.c2_codes + at[1]);
    }
    return c;
}

__device__ __forceinline__ void answer(
    float (&constant)[SPAN][ROWS + 2], const Constants& c, const float* map, float offset) {
    float* to = &constant[threadIdx.y % 2 * 32 + threadIdx.x][threadIdx.y / 2];
    to[0] = __fadd_rn(__fmul_rn(map[c.code[0]], c.factor[0]), offset);
    to[4] = __fadd_rn(__fmul_rn(map[c.code[1]], c.factor[1]), offset);
}

// The registers of x for step i (see multiply) of block j: of rows g and g + 8, zeros past the
// last row and the last block. The choice between them and zero is a move too, from where 16 bytes
// were loaded to where the tensor core wants them.
__device__ __forceinline__ void load_x(
    unsigned (&v)[DEPTH][4][4], const uint4* x, int M, const Weight& W, int span) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4, first = first_block(W, span);
    #pragma unroll
    for (int j = 0; j < DEPTH; j++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int m = g + 8 * half, b = first + j;
            bool exists = m < M && j < W.share && b < W.blocks;
            const uint4* from = x + (exists ? 8 * (m * W.blocks + b) + 2 * t : 0);
            uint4 one = __ldg(from), two = __ldg(from + 1);
            unsigned eight[8] = {one.x, one.y, one.z, one.w, two.x, two.y, two.z, two.w};
            #pragma unroll
            for (int i = 0; i < 8; i++)
                v[j][i / 2][half + 2 * (i % 2)] = exists ? eight[i] : 0;
        }
}

// The two levels of the byte in bits 7 .. 14: so many bytes from the table's begin is its row.
__device__ __forceinline__ unsigned levels_of(const Shared& shared, unsigned bits) {
    unsigned at = (bits & 255 << 7) | 4 * threadIdx.x;
    return *reinterpret_cast<const unsigned*>(reinterpret_cast<const char*>(shared.table) + at);
}

// sum += x W^T over the warp's blocks.
//
// A tensor core adds over k, 16 columns at a time, and any order of columns will do if W and x
// agree on it. Here lane t of the four that share a row has columns 16 t .. 16 t + 15 of a block,
// which are 8 bytes of codes. Step i takes four of them: 16 t + 4 i and the next where mma has
// k = 2 t, 2 t + 1, and the two after where it has k = 2 t + 8, 2 t + 9. So a byte of codes is one
// register of W, and the registers of x are used in the order in which they were loaded. Rows keep
// their blocks at different places, so that no two of the four rows that are read at once collide.
__device__ __forceinline__ void multiply(
    float (&sum)[4], const Shared& shared, const uint4 (&codes)[ROWS][2 * DEPTH],
    const float (&constant)[SPAN][ROWS + 2], const unsigned (&x)[DEPTH][4][4], int share) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const uint2* row = reinterpret_cast<const uint2*>(codes[g]) + t;
    float d[DEPTH][4] = {};
    #pragma unroll
    for (int i = 0; i < 4; i++)
        #pragma unroll
        for (int j = 0; j < DEPTH; j++) {  // products that do not wait for each other
            uint2 bytes = row[4 * (j ^ g % 4)];
            unsigned four = (i < 2 ? bytes.x : bytes.y) >> 16 * (i % 2);
            unsigned w[2] = {levels_of(shared, four << 7), levels_of(shared, four >> 1)};
            mma_m16n8k16_bf16(d[j], x[j][i], w);
        }
    #pragma unroll
    for (int j = 0; j < DEPTH; j++) {
        const float* c = &constant[threadIdx.y * share + j][2 * t];
        float2 two = *reinterpret_cast<const float2*>(c);  // of columns 2 t and 2 t + 1 of d
        #pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = fmaf(d[j][i], i % 2 ? two.y : two.x, sum[i]);
    }
}

// Columns k and k + 1 of a row of r numbers in one register; zeros beyond its end.
__device__ __forceinline__ unsigned pair(const __nv_bfloat16* row, int k, int r, bool exists) {
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(row) + k;
    unsigned first = exists && k < r ? bits[0] : 0, second = exists && k + 1 < r ? bits[1] : 0;
    return first | second << 16;
}

// The lane's registers for the columns 16 k .. 16 k + 15 of h and B.
struct LowRank { unsigned h[4], B[2]; };

__device__ __forceinline__ LowRank load_low_rank(
    const __nv_bfloat16* h, const __nv_bfloat16* B, int M, int N, int r, int tile, int k) {
    int g = threadIdx.x / 4, column = 16 * k + 2 * (threadIdx.x % 4);
    const __nv_bfloat16 *row = h + g * r, *low = row + 8 * r;
    B += (long long)(ROWS * tile + g) * r;
    bool in_B = ROWS * tile + g < N;
    return {{pair(row, column, r, g < M), pair(low, column, r, g + 8 < M),
             pair(row, column + 8, r, g < M), pair(low, column + 8, r, g + 8 < M)},
            {pair(B, column, r, in_B), pair(B, column + 8, r, in_B)}};
}

__device__ __forceinline__ void make_tables(
    Shared& shared, const float* levels, const float* map, int doubled) {
    int tid = 32 * threadIdx.y + threadIdx.x;
    float own = doubled ? map[tid] : 1;  // under way while the table is made
    for (int byte = threadIdx.y; byte < 256; byte += WARPS) {
        __nv_bfloat162 two = __floats2bfloat162_rn(levels[byte >> 4], levels[byte & 15]);
        shared.table[byte][threadIdx.x] = *reinterpret_cast<const unsigned*>(&two);
    }
    shared.map[tid] = own;
}

__device__ __forceinline__ void put_sums(float (&to)[16][ROWS], const float (&sum)[4]) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    *reinterpret_cast<float2*>(&to[g][2 * t]) = make_float2(sum[0], sum[1]);
    *reinterpret_cast<float2*>(&to[g + 8][2 * t]) = make_float2(sum[2], sum[3]);
}

// Adds the warps' sums of a tile, 8 columns of y.
__device__ __forceinline__ void write(
    __nv_bfloat16* y, const float (&sum)[WARPS][16][ROWS], int M, int N, int tile) {
    int tid = 32 * threadIdx.y + threadIdx.x, row = tid / ROWS, n = tid % ROWS;
    if (row >= M || ROWS * tile + n >= N) return;
    float total = 0;
    #pragma unroll
    for (int warp = 0; warp < WARPS; warp++) total += sum[warp][row][n];
    put(y + (long long)row * N + ROWS * tile + n, total);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) nf4_matmul(
    const __nv_bfloat16* __restrict__ x, const unsigned char* __restrict__ packed,
    const float* __restrict__ levels, const float* __restrict__ c2,
    const unsigned char* __restrict__ c2_codes, const float* __restrict__ c1,
    const float* __restrict__ c2_map, const float* __restrict__ offset,
    const __nv_bfloat16* __restrict__ h, const __nv_bfloat16* __restrict__ B,
    __nv_bfloat16* __restrict__ y, int M, int N, int blocks, int share, int spans, int r,
    int doubled) {
    DYN_SHARED(Shared, shared);
    Weight W = {reinterpret_cast<const uint4*>(packed), c2_codes, doubled ? c1 : c2,
                doubled ? 8 : 0, doubled, N, blocks, share, spans};
    int warp = threadIdx.y;
    Piece piece = {int(blockIdx.x), 0}, next = after(piece, spans);
    fetch(shared->codes[0][warp], W, piece);
    fetch(shared->codes[1][warp], W, next);
    Constants constants = ask(W, piece);
    float mean = doubled ? __ldg(offset) : 0;
    unsigned v[DEPTH][4][4];
    load_x(v, reinterpret_cast<const uint4*>(x), M, W, 0);
    make_tables(*shared, levels, c2_map, doubled);
    __syncthreads();
    answer(shared->constant[0], constants, shared->map, mean);
    __syncthreads();

    float sum[4] = {};
    for (int stage = 0, now = 0; ROWS * piece.tile < N; now = 1 - now) {
        fetch(shared->codes[stage == 0 ? STAGES - 1 : stage - 1][warp], W, after(next, spans));
        constants = ask(W, next);
        bool last = piece.span == spans - 1;
        LowRank low = {};
        if (last && 16 * warp < r) low = load_low_rank(h, B, M, N, r, piece.tile, warp);
        if (spans > 1) load_x(v, reinterpret_cast<const uint4*>(x), M, W, piece.span);
        wait_async<STAGES - 1>();
        __syncwarp();
        multiply(sum, *shared, shared->codes[stage][warp], shared->constant[now], v, share);
        for (int k = warp; last && 16 * k < r; k += WARPS) {
            mma_m16n8k16_bf16(sum, low.h, low.B);
            low = load_low_rank(h, B, M, N, r, piece.tile, k + WARPS);
        }
        answer(shared->constant[1 - now], constants, shared->map, mean);
        if (last) put_sums(shared->sum[now][warp], sum);
        __syncthreads();  // who writes to either again has first waited here once more
        if (last) {
            write(y, shared->sum[now], M, N, piece.tile);
            sum[0] = sum[1] = sum[2] = sum[3] = 0;
        }
        piece = next, next = after(next, spans);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
}
