// Gradients of attention.cu, which saved y and lse: FlashAttention-2 (Dao 2023, arXiv:2307.08691),
// algorithm 2. S and P = exp(S - lse) are those of attention.cu, computed again. dk and dv are
// summed over the heads of a group.
//
//     delta = (dy * y).sum(-1)             (B, H, T)
//     dv    = P^T @ dy
//     dP    = dy @ v^T
//     dS    = P * (dP - delta)
//     dq    = scale dS @ k
//     dk    = scale dS^T @ q
//
// attention_dq: (B H, ceil(T / ROWS)) blocks of 128 threads. A block has ROWS queries: 128 if
// D <= 64, else 64. It writes their delta and goes through the keys.
// attention_dk_dv, launched after it: (B K, ceil(S / 64)) blocks of 256 threads. A block has 64
// keys, and the blocks with the longest loops come first. It goes through the queries of all heads
// of its group. It works on S^T, P^T, dP^T and dS^T, whose rows are keys. There are few such
// blocks, so each fills a multiprocessor: its warps share out the keys and also the queries of a
// tile. At the end the warps that have the same keys add up their sums.
//
// So S and dP are computed twice. In return each gradient is a sum in one order: no atomics, always
// the same bits. Causal tiles that no query sees are left out.
//
// Accuracy: as attention.cu. P and dS are rounded to bf16, by 2^-8 at most, before their products.
// Flops: 6 B H T S D for dq and 8 B H T S D for dk and dv, or half of that if causal.
// Floor for B = 4, H = 32, K = 4, T = S = 1024, D = 64 at 791 TFLOP/s: 152 us, causal 76 us. Two
// sevenths of it go to the second S and dP. The bytes, 115 MB at 4.26 TB/s, take 27 us.
// Predicted, causal, at 6.4 cycles for mma.sync (attention.cu): 46 us of mma for dq, 55 to 75 us in
// all; 62 us of mma for dk and dv, 80 to 105 us in all; together 135 to 180 us.
// Reached on an H200, 2026-11-27: 92 - 97 us for dq, 143 - 148 for dk and dv, 232 - 245 in all. The
// version before, with 16 rows a warp, loads of 32 bits from shared memory and four warps a block
// everywhere, took 562 us, 151 us of it dq and 412 us dk and dv, which had 1.4 warps a scheduler.
// PyTorch's attention takes 209 us.
// Check: python scripts/bench/check_kernels.py attention
// Registers: at most 255
#include "hardware.cuh"
#include "attention.cuh"

constexpr int ROWS = 64 * SETS;  // queries of a block of attention_dq
constexpr int TILE = 32 * SETS;  // keys of a tile: two stages of k and v fit 48 KB
constexpr int KEYS = 32;         // keys of a step: their S and dP are in registers

// sum + a0 b0 + a1 b1, for the two numbers in a and the two at b.
__device__ __forceinline__ float add_two(float sum, unsigned a, const __nv_bfloat16* b) {
    __nv_bfloat162 x = reinterpret_cast<const __nv_bfloat162&>(a);
    __nv_bfloat162 y = *reinterpret_cast<const __nv_bfloat162*>(b);
    return fmaf(widen(x.y), widen(y.y), fmaf(widen(x.x), widen(y.x), sum));
}

// delta of this lane's rows, from the dy in its left operands and the y in memory. `left` rows
// exist. The others have a dy of zeros and read the last row, so that all loads are under way at
// once.
__device__ __forceinline__ void sum_delta(
    float (&delta)[SETS][2], const unsigned (&dY)[SETS][D / 16][4], const __nv_bfloat16* y,
    int left) {
    #pragma unroll
    for (int set = 0; set < SETS; set++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const __nv_bfloat16* row = y + min(16 * set + 8 * half + LANE_G, left - 1) * D;
            float sum = 0.0f;
            #pragma unroll
            for (int d = 0; d < D / 8; d++)
                sum = add_two(sum, dY[set][d / 2][half + d % 2 * 2], row + 8 * d + 2 * LANE_T);
            delta[set][half] = row_sum(sum);
        }
}

extern "C" __global__ void __launch_bounds__(128, 2) attention_dq(
    const __nv_bfloat16* __restrict__ dy, const __nv_bfloat16* __restrict__ q,
    const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
    const __nv_bfloat16* __restrict__ y, const float* __restrict__ lse,
    float* __restrict__ delta, __nv_bfloat16* __restrict__ dq,
    int T, int S, int group, int causal, float scale) {
    alignas(16) __shared__ __nv_bfloat16 tiles[2][2][TILE * PITCH];  // stages of k and v
    int first = (gridDim.y - 1 - blockIdx.y) * ROWS, row = 16 * SETS * WARP, left = T - first - row;
    int ahead = causal ? S - T + 1 : S;  // query i sees the keys below min(S, i + ahead)
    long long query = (long long)blockIdx.x * T + first;
    k += (long long)(blockIdx.x / group) * S * D;
    v += (long long)(blockIdx.x / group) * S * D;

    unsigned Q[SETS][D / 16][4], dY[SETS][D / 16][4];
    load_rows<ROWS, 128>(tiles[0][0], q + query * D, T - first);  // fills the stage: ROWS is 2 TILE
    load_rows<ROWS, 128>(tiles[1][0], dy + query * D, T - first);
    wait_async();
    __syncthreads();
    left_operands(Q, tiles[0][0] + row * PITCH);
    left_operands(dY, tiles[1][0] + row * PITCH);
    __syncthreads();  // all have read q before the first k overwrites it
    load_rows<TILE, 128>(tiles[0][0], k, S);
    load_rows<TILE, 128>(tiles[0][1], v, S);

    float dQ[SETS][D / 8][4] = {}, row_lse[SETS][2], row_delta[SETS][2];
    sum_delta(row_delta, dY, y + (query + row) * D, left);
    #pragma unroll
    for (int set = 0; set < SETS; set++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = 16 * set + 8 * half + LANE_G;
            row_lse[set][half] = i < left ? lse[query + row + i] * LOG2_E : 0.0f;
            if (i < left && LANE_T == 0) delta[query + row + i] = row_delta[set][half];
        }

    int block_keys = min(S, first + ROWS - 1 + ahead), stage = 0;
    int fewest = min(S, first + row + ahead), most = min(S, first + row + 16 * SETS - 1 + ahead);
    for (int tile = 0; tile < block_keys; tile += TILE, stage ^= 1) {
        wait_async();
        __syncthreads();  // this tile has come, and all have read the one before
        if (int next = tile + TILE; next < block_keys) {
            load_rows<TILE, 128>(tiles[stage ^ 1][0], k + (long long)next * D, S - next);
            load_rows<TILE, 128>(tiles[stage ^ 1][1], v + (long long)next * D, S - next);
        }
        #pragma unroll
        for (int step = 0; step < TILE; step += KEYS) {
            int key = tile + step;
            if (key >= most) break;
            float P[SETS][KEYS / 8][4] = {}, dS[SETS][KEYS / 8][4] = {};  // S and dP at first
            add_turned<KEYS>(P, Q, tiles[stage][0] + step * PITCH);
            add_turned<KEYS>(dS, dY, tiles[stage][1] + step * PITCH);
            if (key + KEYS > fewest) hide_unseen<KEYS>(P, key, first + row, ahead, S);
            #pragma unroll
            for (int set = 0; set < SETS; set++)
                #pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float p = exp2f(fmaf(P[set][n][i], scale * LOG2_E, -row_lse[set][i / 2]));
                        dS[set][n][i] = p * (dS[set][n][i] - row_delta[set][i / 2]);
                    }
            add_product<KEYS>(dQ, dS, tiles[stage][0] + step * PITCH);
        }
    }
    float scales[SETS][2];
    #pragma unroll
    for (int set = 0; set < SETS; set++) scales[set][0] = scales[set][1] = scale;
    write_rows(dq + (query + row) * D, dQ, scales, left);
}

// attention_dk_dv: KEY_WARPS warps share out the keys of a block. There are SLICES groups of so
// many warps, and each group has 16 queries of every tile.
constexpr int WARPS = 8;
constexpr int KEY_WARPS = 4 / SETS;
constexpr int BLOCK_KEYS = 16 * SETS * KEY_WARPS;
constexpr int SLICES = WARPS / KEY_WARPS;
constexpr int QUERIES = 16 * SLICES;

// Adds the d of the other slices to that of slice 0, in the order of the slices.
__device__ __forceinline__ void add_slices(float (&d)[SETS][D / 8][4], float* sums) {
    sums += threadIdx.x % (32 * KEY_WARPS);
    for (int slice = 1; slice < SLICES; slice++) {
        __syncthreads();  // all have read what lay there
        #pragma unroll
        for (int i = 0; i < SETS * D / 2; i++)
            if (WARP / KEY_WARPS == slice)
                sums[32 * KEY_WARPS * i] = d[i / (D / 2)][i / 4 % (D / 8)][i % 4];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < SETS * D / 2; i++)
            if (WARP < KEY_WARPS)
                d[i / (D / 2)][i / 4 % (D / 8)][i % 4] += sums[32 * KEY_WARPS * i];
    }
}

// Adds the share of 16 queries to dV, and to dK, which gets its scale later. Here the rows of P and
// dS are keys and the columns are queries: query j sees key i if i < j + seen.
__device__ __forceinline__ void add_queries(
    float (&dK)[SETS][D / 8][4], float (&dV)[SETS][D / 8][4],
    const unsigned (&K)[SETS][D / 16][4], const unsigned (&V)[SETS][D / 16][4],
    const __nv_bfloat16* q, const float* lse, int seen, float scale) {
    const __nv_bfloat16* dy = q + QUERIES * PITCH;
    const float* delta = lse + QUERIES;
    float P[SETS][2][4] = {}, dS[SETS][2][4] = {};  // S^T and dP^T at first
    add_turned<16>(P, K, q);
    add_turned<16>(dS, V, dy);
    if (seen < 16 * SETS)  // otherwise every query sees every key
        #pragma unroll
        for (int i = 0; i < 8 * SETS; i++) {
            int set = i / 8, n = i / 4 % 2, key = 16 * set + 8 * (i / 2 % 2) + LANE_G;
            if (key >= 8 * n + 2 * LANE_T + i % 2 + seen) P[set][n][i % 4] = MINUS_INFINITY;
        }
    #pragma unroll
    for (int n = 0; n < 2; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int query = 8 * n + 2 * LANE_T + i % 2;
            float log2_sum = lse[query] * LOG2_E;
            #pragma unroll
            for (int set = 0; set < SETS; set++) {
                P[set][n][i] = exp2f(fmaf(P[set][n][i], scale * LOG2_E, -log2_sum));
                dS[set][n][i] = P[set][n][i] * (dS[set][n][i] - delta[query]);
            }
        }
    add_product<16>(dV, P, dy);
    add_product<16>(dK, dS, q);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) attention_dk_dv(
    const __nv_bfloat16* __restrict__ dy, const __nv_bfloat16* __restrict__ q,
    const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
    const float* __restrict__ lse, const float* __restrict__ delta,
    __nv_bfloat16* __restrict__ dk, __nv_bfloat16* __restrict__ dv,
    int T, int S, int group, int causal, float scale) {
    alignas(16) __shared__ __nv_bfloat16 tiles[2][2][QUERIES * PITCH];  // stages of q and dy
    __shared__ float sums[2][2][QUERIES];  // stages of lse and delta
    int first = BLOCK_KEYS * blockIdx.y, row = WARP % KEY_WARPS * 16 * SETS;
    int slice = WARP / KEY_WARPS * 16;   // this warp's first query in a tile
    int ahead = causal ? S - T + 1 : S;  // query i sees the keys below min(S, i + ahead)
    long long key = (long long)blockIdx.x * S + first;

    unsigned K[SETS][D / 16][4], V[SETS][D / 16][4];
    __nv_bfloat16 *k_rows = tiles[0][0], *v_rows = k_rows + BLOCK_KEYS * PITCH;
    load_rows<BLOCK_KEYS, 32 * WARPS>(k_rows, k + key * D, S - first);
    load_rows<BLOCK_KEYS, 32 * WARPS>(v_rows, v + key * D, S - first);
    wait_async();
    __syncthreads();
    left_operands(K, k_rows + row * PITCH);
    left_operands(V, v_rows + row * PITCH);
    __syncthreads();  // all have read k and v before the first q and dy overwrite them

    auto load = [&](int stage, int head, int query) {
        long long from = ((long long)blockIdx.x * group + head) * T + query;
        load_rows<QUERIES, 32 * WARPS>(tiles[stage][0], q + from * D, T - query);
        load_rows<QUERIES, 32 * WARPS>(tiles[stage][1], dy + from * D, T - query);
        int i = threadIdx.x;  // rows that do not exist add 0: their q, dy, lse and delta are 0
        if (i >= QUERIES) return;
        load_async<4>(sums[stage][0] + i, lse + from + i, query + i < T);
        load_async<4>(sums[stage][1] + i, delta + from + i, query + i < T);
    };
    float dK[SETS][D / 8][4] = {}, dV[SETS][D / 8][4] = {};
    int start = max(0, first + 1 - ahead) / QUERIES * QUERIES;  // the first tile that sees a key
    int head = 0, query = start, stage = 0;
    load(stage, head, query);
    while (head < group) {
        wait_async();
        __syncthreads();  // this tile has come, and all have read the one before
        int seen = query + slice + ahead - first - row;
        bool last = query + QUERIES >= T;
        head += last, query = last ? start : query + QUERIES;
        if (head < group) load(stage ^ 1, head, query);
        if (seen + 15 > 0)
            add_queries(dK, dV, K, V, tiles[stage][0] + slice * PITCH, sums[stage][0] + slice, seen,
                        scale);
        stage ^= 1;
    }

    add_slices(dV, reinterpret_cast<float*>(tiles));
    add_slices(dK, reinterpret_cast<float*>(tiles));
    if (slice) return;
    float one[SETS][2], scales[SETS][2];
    #pragma unroll
    for (int i = 0; i < 2 * SETS; i++) one[i / 2][i % 2] = 1.0f, scales[i / 2][i % 2] = scale;
    write_rows(dv + (key + row) * D, dV, one, S - first - row);
    write_rows(dk + (key + row) * D, dK, scales, S - first - row);
}
