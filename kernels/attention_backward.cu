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

constexpr int STEP = D <= 64 ? 32 : 16;  // rows of the tiles that change: four tiles fit 48 KB

// sum plus the products of two neighbours.
__device__ __forceinline__ float add_two(
    float sum, const __nv_bfloat16* a, const __nv_bfloat16* b) {
    __nv_bfloat162 x = *reinterpret_cast<const __nv_bfloat162*>(a);
    __nv_bfloat162 y = *reinterpret_cast<const __nv_bfloat162*>(b);
    return fmaf(widen(x.y), widen(y.y), fmaf(widen(x.x), widen(y.x), sum));
}

// X1 Y1^T and X2 Y2^T: 16 rows of this warp from tiles of ROWS rows, against tiles of STEP rows.
// S and dP with x queries and y keys; S^T and dP^T with x keys and y queries.
__device__ __forceinline__ void two_products(
    float (&xy1)[STEP / 8][4], float (&xy2)[STEP / 8][4],
    const __nv_bfloat16* x1, const __nv_bfloat16* y1,
    const __nv_bfloat16* x2, const __nv_bfloat16* y2) {
    #pragma unroll
    for (int d = 0; d < D; d += 16) {
        unsigned a1[4], a2[4];
        left_operand(a1, x1 + WARP_ROW * PITCH + d);
        left_operand(a2, x2 + WARP_ROW * PITCH + d);
        #pragma unroll
        for (int n = 0; n < STEP / 8; n++) {
            add_turned(xy1[n], a1, y1 + 8 * n * PITCH + d);
            add_turned(xy2[n], a2, y2 + 8 * n * PITCH + d);
        }
    }
}

extern "C" __global__ void __launch_bounds__(128) attention_dq(
    const __nv_bfloat16* __restrict__ dy, const __nv_bfloat16* __restrict__ q,
    const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
    const __nv_bfloat16* __restrict__ y, const float* __restrict__ lse,
    float* __restrict__ delta, __nv_bfloat16* __restrict__ dq,
    int T, int S, int group, int causal, float scale) {
    alignas(16) __shared__ __nv_bfloat16 q_tile[ROWS * PITCH], dy_tile[ROWS * PITCH];
    alignas(16) __shared__ __nv_bfloat16 k_tile[STEP * PITCH], v_tile[STEP * PITCH];
    int first = (gridDim.y - 1 - blockIdx.y) * ROWS, row = WARP_ROW + LANE_G;
    long long query = (long long)blockIdx.x * T + first;
    k += (long long)(blockIdx.x / group) * S * D;
    v += (long long)(blockIdx.x / group) * S * D;
    load_tile(q_tile, q + query * D, ROWS, T - first);
    load_tile(dy_tile, dy + query * D, ROWS, T - first);

    __syncthreads();

    float dQ[D / 8][4] = {}, row_lse[2], row_delta[2];
    int seen[2];  // the keys that a row may see are those below
    #pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        bool exists = first + row < T;  // dq of other rows is not written
        float sum = 0.0f;
        for (int column = 2 * LANE_T; exists && column < D; column += 8)
            sum = add_two(sum, dy_tile + row * PITCH + column, y + (query + row) * D + column);
        row_delta[half] = row_sum(sum);
        row_lse[half] = exists ? lse[query + row] * LOG2_E : 0.0f;
        seen[half] = causal ? min(S, S - T + first + row + 1) : S;
        if (exists && LANE_T == 0) delta[query + row] = row_delta[half];
    }
    int keys = causal ? min(S, S - T + first + ROWS) : S;
    for (int key = 0; key < keys; key += STEP) {
        load_tile(k_tile, k + (long long)key * D, STEP, S - key);
        load_tile(v_tile, v + (long long)key * D, STEP, S - key);
        __syncthreads();

        float P[STEP / 8][4] = {}, dS[STEP / 8][4] = {};  // S and dP at first
        two_products(P, dS, q_tile, k_tile, dy_tile, v_tile);
        #pragma unroll
        for (int n = 0; n < STEP / 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float p = exp2f(fmaf(P[n][i], scale * LOG2_E, -row_lse[i / 2]));
                if (key + 8 * n + 2 * LANE_T + i % 2 >= seen[i / 2]) p = 0.0f;
                dS[n][i] = p * (dS[n][i] - row_delta[i / 2]);
            }
        #pragma unroll
        for (int n = 0; n < STEP / 8; n += 2) {
            unsigned a[4];
            left_operand(a, dS[n], dS[n + 1]);
            add_product(dQ, a, k_tile + 8 * n * PITCH);
        }
        __syncthreads();  // all have read the tiles before the next come
    }
    const float scales[2] = {scale, scale};
    write_rows(dq + query * D, dQ, scales, T - first);
}

extern "C" __global__ void __launch_bounds__(128, 3) attention_dk_dv(
    const __nv_bfloat16* __restrict__ dy, const __nv_bfloat16* __restrict__ q,
    const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
    const float* __restrict__ lse, const float* __restrict__ delta,
    __nv_bfloat16* __restrict__ dk, __nv_bfloat16* __restrict__ dv,
    int T, int S, int group, int causal, float scale) {
    alignas(16) __shared__ __nv_bfloat16 k_tile[ROWS * PITCH], v_tile[ROWS * PITCH];
    alignas(16) __shared__ __nv_bfloat16 q_tile[STEP * PITCH], dy_tile[STEP * PITCH];
    __shared__ float lse_tile[STEP], delta_tile[STEP];
    int first = blockIdx.y * ROWS, ahead = S - T;  // query i sees the keys up to ahead + i
    long long key = (long long)blockIdx.x * S + first;
    load_tile(k_tile, k + key * D, ROWS, S - first);
    load_tile(v_tile, v + key * D, ROWS, S - first);

    float dK[D / 8][4] = {}, dV[D / 8][4] = {};
    int start = causal ? max(0, first - ahead) / STEP * STEP : 0;
    for (int h = 0; h < group; h++)
        for (int query = start; query < T; query += STEP) {
            long long from = ((long long)blockIdx.x * group + h) * T + query;
            load_tile(q_tile, q + from * D, STEP, T - query);
            load_tile(dy_tile, dy + from * D, STEP, T - query);
            if (threadIdx.x < STEP) {
                bool exists = query + (int)threadIdx.x < T;  // others add 0: their q and dy are 0
                lse_tile[threadIdx.x] = exists ? lse[from + threadIdx.x] * LOG2_E : 0.0f;
                delta_tile[threadIdx.x] = exists ? delta[from + threadIdx.x] : 0.0f;
            }
            __syncthreads();

            float P[STEP / 8][4] = {}, dS[STEP / 8][4] = {};  // S^T and dP^T at first
            two_products(P, dS, k_tile, q_tile, v_tile, dy_tile);
            #pragma unroll
            for (int n = 0; n < STEP / 8; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    int column = 8 * n + 2 * LANE_T + i % 2, row = WARP_ROW + LANE_G + i / 2 * 8;
                    bool seen = !causal || first + row <= ahead + query + column;
                    float p = exp2f(fmaf(P[n][i], scale * LOG2_E, -lse_tile[column]));
                    P[n][i] = seen ? p : 0.0f;
                    dS[n][i] = P[n][i] * (dS[n][i] - delta_tile[column]);
                }
            #pragma unroll
            for (int n = 0; n < STEP / 8; n += 2) {
                unsigned a[4];
                left_operand(a, P[n], P[n + 1]);
                add_product(dV, a, dy_tile + 8 * n * PITCH);
                left_operand(a, dS[n], dS[n + 1]);
                add_product(dK, a, q_tile + 8 * n * PITCH);
            }
            __syncthreads();  // all have read the tiles before the next come
        }
    const float one[2] = {1.0f, 1.0f}, scales[2] = {scale, scale};
    write_rows(dv + key * D, dV, one, S - first);
    write_rows(dk + key * D, dK, scales, S - first);
}
