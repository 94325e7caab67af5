// Gradients of attention.cu, which saved y and lse: FlashAttention-2 (Dao 2023, arXiv:2307.08691),
// algorithm 2. With S and P = exp(S - lse) as there, computed again, and heads of a group summed:
//
//     delta = (dy * y).sum(-1)             (B, H, T)
//     dv    = P^T @ dy
//     dP    = dy @ v^T
//     dS    = P * (dP - delta)
//     dq    = scale dS @ k
//     dk    = scale dS^T @ q
//
// attention_dq: (B H, ceil(T / 64)) blocks of 128 threads, each 64 queries; it writes their delta
// and goes through the keys. attention_dk_dv, after it: (B K, ceil(S / 64)) blocks of 128 threads,
// each 64 keys; it goes through the queries of all heads of its group, and works on S^T, P^T, dP^T,
// dS^T: keys are rows there.
// S and dP are thus computed twice, and in return each gradient is a sum of one warp in one order:
// no atomics, always the same bits. Causal tiles that nobody sees are left out.
//
// Accuracy: as attention.cu; P and dS are rounded to bf16, by 2^-8 at most, before their products.
// Flops: 6 B H T S D for dq, 8 B H T S D for dk and dv, half of it causal.
// Floor for B = 4, H = 32, K = 4, T = S = 1024, D = 64 at 790 TFLOP/s: 152 us, causal 76 us, two
// sevenths of it for the second S and dP; the bytes, 115 MB at 4.3 TB/s, take 27 us. Loads from
// shared memory, 2.5 of 128 bytes for each mma, take about 320 us at 1.8 GHz, causal 160 us.
// Reached: not yet measured.
// Registers: at most 168
#include "hardware.cuh"
#include "attention.cuh"

constexpr int ROWS = 64 * SETS;  // queries of a block of attention_dq
constexpr int TILE = 32 * SETS;  // rows of the tiles that change: two stages of two fit 48 KB
constexpr int STEP = 32;         // keys of attention_dq's S and dP at a time

// sum plus the products of two neighbours.
__device__ __forceinline__ float add_two(float sum, unsigned a, const __nv_bfloat16* b) {
    __nv_bfloat162 x = reinterpret_cast<const __nv_bfloat162&>(a);
    __nv_bfloat162 y = *reinterpret_cast<const __nv_bfloat162*>(b);
    return fmaf(widen(x.y), widen(y.y), fmaf(widen(x.x), widen(y.x), sum));
}

// delta of this lane's rows: dy lies in its left operands, y in memory. `left` rows exist.
__device__ __forceinline__ void sum_delta(
    float (&delta)[SETS][2], const unsigned (&dY)[SETS][D / 16][4], const __nv_bfloat16* y,
    int left) {
    #pragma unroll
    for (int set = 0; set < SETS; set++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = 16 * set + 8 * half + LANE_G;
            float sum = 0.0f;
            if (row < left) {
                #pragma unroll
                for (int d = 0; d < D / 8; d++)
                    sum = add_two(sum, dY[set][d / 2][half + d % 2 * 2],
                                  y + row * D + 8 * d + 2 * LANE_T);
            }
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
    load_rows<ROWS, 128>(tiles[0][0], q + query * D, T - first);  // as long as the stage
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
        for (int step = 0; step < TILE; step += STEP) {
            int key = tile + step;
            if (key >= most) break;
            float P[SETS][STEP / 8][4] = {}, dS[SETS][STEP / 8][4] = {};  // S and dP at first
            add_turned<STEP>(P, Q, tiles[stage][0] + step * PITCH);
            add_turned<STEP>(dS, dY, tiles[stage][1] + step * PITCH);
            if (key + STEP > fewest) hide_unseen<STEP>(P, key, first + row, ahead, S);
            #pragma unroll
            for (int set = 0; set < SETS; set++)
                #pragma unroll
                for (int n = 0; n < STEP / 8; n++)
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float p = exp2f(fmaf(P[set][n][i], scale * LOG2_E, -row_lse[set][i / 2]));
                        dS[set][n][i] = p * (dS[set][n][i] - row_delta[set][i / 2]);
                    }
            add_product<STEP>(dQ, dS, tiles[stage][0] + step * PITCH);
        }
    }
    float scales[SETS][2];
    #pragma unroll
    for (int set = 0; set < SETS; set++) scales[set][0] = scales[set][1] = scale;
    write_rows(dq + (query + row) * D, dQ, scales, left);
}

constexpr int KEY_WARPS = 4 / SETS, SLICES = 8 / KEY_WARPS;  // of the 64 keys, of a tile's queries

// Adds d of the warps of the other slices, in their order, to that of slice 0.
__device__ __forceinline__ void add_slices(float (&d)[SETS][D / 8][4], float* sums) {
    int slice = WARP / KEY_WARPS, place = threadIdx.x % (32 * KEY_WARPS);
    for (int s = 1; s < SLICES; s++) {
        __syncthreads();  // all have read what lay there
        #pragma unroll
        for (int i = 0; i < SETS * D / 2; i++)
            if (slice == s) sums[i * 32 * KEY_WARPS + place] = d[i / (D / 2)][i / 4 % (D / 8)][i % 4];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < SETS * D / 2; i++)
            if (slice == 0) d[i / (D / 2)][i / 4 % (D / 8)][i % 4] += sums[i * 32 * KEY_WARPS + place];
    }
}

extern "C" __global__ void __launch_bounds__(256, 1) attention_dk_dv(
    const __nv_bfloat16* __restrict__ dy, const __nv_bfloat16* __restrict__ q,
    const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
    const float* __restrict__ lse, const float* __restrict__ delta,
    __nv_bfloat16* __restrict__ dk, __nv_bfloat16* __restrict__ dv,
    int T, int S, int group, int causal, float scale) {
    alignas(16) __shared__ __nv_bfloat16 tiles[2][2][TILE * PITCH];  // stages of q and dy
    __shared__ float lse_tile[2][TILE], delta_tile[2][TILE];
    int first = 64 * blockIdx.y, row = WARP % KEY_WARPS * 16 * SETS, ahead = causal ? S - T + 1 : S;
    int slice = WARP / KEY_WARPS * 16;  // of the queries of a tile, this warp's first
    long long key = (long long)blockIdx.x * S + first;

    unsigned K[SETS][D / 16][4], V[SETS][D / 16][4];
    __nv_bfloat16 *k_rows = tiles[0][0], *v_rows = k_rows + 64 * PITCH;
    load_rows<64, 256>(k_rows, k + key * D, S - first);
    load_rows<64, 256>(v_rows, v + key * D, S - first);
    wait_async();
    __syncthreads();
    left_operands(K, k_rows + row * PITCH);
    left_operands(V, v_rows + row * PITCH);
    __syncthreads();  // all have read k and v before the first q and dy overwrite them

    auto load = [&](int stage, int head, int query) {
        long long from = ((long long)blockIdx.x * group + head) * T + query;
        load_rows<TILE, 256>(tiles[stage][0], q + from * D, T - query);
        load_rows<TILE, 256>(tiles[stage][1], dy + from * D, T - query);
        int i = threadIdx.x;  // rows that do not exist add 0: their q, dy, lse and delta are 0
        if (i < TILE) {
            bool exists = query + i < T;
            load_async<4>(lse_tile[stage] + i, lse + from + i, exists);
            load_async<4>(delta_tile[stage] + i, delta + from + i, exists);
        }
    };
    float dK[SETS][D / 8][4] = {}, dV[SETS][D / 8][4] = {};
    int start = max(0, first + 1 - ahead) / TILE * TILE, stage = 0;  // first query that sees a key
    int head = 0, query = start;
    load(0, head, query);
    while (head < group) {
        wait_async();
        __syncthreads();  // this tile has come, and all have read the one before
        int next_head = head, next = query + TILE;
        if (next >= T) next = start, next_head++;
        if (next_head < group) load(stage ^ 1, next_head, next);

        float P[SETS][2][4] = {}, dS[SETS][2][4] = {};  // S^T and dP^T at first
        const __nv_bfloat16* q_rows = tiles[stage][0] + slice * PITCH;
        const __nv_bfloat16* dy_rows = tiles[stage][1] + slice * PITCH;
        add_turned<16>(P, K, q_rows);
        add_turned<16>(dS, V, dy_rows);
        #pragma unroll
        for (int n = 0; n < 2; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = slice + 8 * n + 2 * LANE_T + i % 2;
                float log2_sum = lse_tile[stage][column] * LOG2_E;
                #pragma unroll
                for (int set = 0; set < SETS; set++) {
                    float p = exp2f(fmaf(P[set][n][i], scale * LOG2_E, -log2_sum));
                    int key_row = first + row + 16 * set + 8 * (i / 2) + LANE_G;
                    if (key_row >= query + column + ahead) p = 0.0f;
                    P[set][n][i] = p;
                    dS[set][n][i] = p * (dS[set][n][i] - delta_tile[stage][column]);
                }
            }
        add_product<16>(dV, P, dy_rows);
        add_product<16>(dK, dS, q_rows);
        stage ^= 1, head = next_head, query = next;
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
