// softmax(q k^T / sqrt(D)) v without its T x S scores in memory: FlashAttention-2 (Dao 2023,
// arXiv:2307.08691), algorithm 1, on the online softmax of Milakov & Gimelshein 2018
// (arXiv:1805.02867). The formula of minilm/attention.py, for q (B, H, T, D), k and v (B, K, S, D):
//
//     S   = scale q @ k^T                  -inf if the key may not be seen
//     lse = log(exp(S).sum(-1))            (B, H, T), which the backward pass needs
//     P   = exp(S - lse)
//     y   = P @ v                          head h of q reads head h // group of k and v
//
// causal: the last query sees every key, each earlier query one key fewer.
//
// Launch: (B H, ceil(T / ROWS)) blocks of 128 threads. A block has ROWS queries: 128 if D <= 64,
// else 64. The blocks with the longest loops come first. Asynchronous copies bring each tile of k
// and v while the tile before it is used. A row keeps three things of the keys so far: its largest
// score m, its sum l of exp(S - m), and its sum O of exp(S - m) v. A larger m shrinks l and O by
// exp(m - larger m). A warp skips steps whose keys none of its queries sees. It looks at single
// keys only in steps that some query sees in part.
//
// Accuracy: products of bf16 are summed in float. P is rounded to bf16, by 2^-8 of it at most,
// before it multiplies v; l is not rounded. The card's exp2f errs by up to 2 ulp of float.
// Flops: 4 B H T S D, or half of that if causal. Bytes: those of q, k, v, y and lse once. Each
// block reads its k and v again, from the L2 cache.
// Floor for B = 4, H = 32, K = 4, T = S = 1024, D = 64 at 791 TFLOP/s: 43.4 us, causal 21.7 us. The
// bytes, 38.3 MB at 4.26 TB/s, take 9.0 us.
// Predicted, causal: a warp's 32 x 64 scores take 128 mma, 64 exponentials per lane (512 cycles)
// and 570 instructions in all. mma.sync, slower than wgmma, is said to take 6.4 cycles on this
// card. So the mma take 820 cycles, or 31 us for all scores. Two warps per scheduler overlap them
// with the rest in part: 45 to 60 us.
// Reached on an H200, 2026-11-27: 72.7 - 78.1 us. The version before, of 16 rows a warp and loads
// of 32 bits from shared memory, took 111.9 us, PyTorch's attention 59.9 us.
// Check: python scripts/bench/check_kernels.py attention
// Registers: at most 255
#include "hardware.cuh"
#include "attention.cuh"

constexpr int ROWS = 64 * SETS;  // queries of a block
constexpr int TILE = 32 * SETS;  // keys of a tile: two stages of k and v fit 48 KB
constexpr int KEYS = TILE;       // keys of a step: their scores are in registers

// The largest x of the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Turns the scores P of KEYS more keys into exp(scale (P - m)) and updates m, l and O. m is kept
// without scale. l counts only this lane's keys: row_sum adds up the lanes at the end.
__device__ __forceinline__ void soften(
    float (&P)[SETS][KEYS / 8][4], float (&O)[SETS][D / 8][4], float (&m)[SETS][2],
    float (&l)[SETS][2], float log2_scale) {
    #pragma unroll
    for (int set = 0; set < SETS; set++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float larger = m[set][half];
            #pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                larger = fmaxf(larger, fmaxf(P[set][n][2 * half], P[set][n][2 * half + 1]));
            larger = row_max(larger);  // finite: every query sees the first key
            float shrink = exp2f((m[set][half] - larger) * log2_scale), top = larger * log2_scale;
            m[set][half] = larger;
            l[set][half] *= shrink;
            #pragma unroll
            for (int n = 0; n < D / 8; n++)
                #pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) O[set][n][i] *= shrink;
            #pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                #pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    P[set][n][i] = exp2f(fmaf(P[set][n][i], log2_scale, -top));
                    l[set][half] += P[set][n][i];
                }
        }
}

extern "C" __global__ void __launch_bounds__(128, 2) attention_forward(
    const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k,
    const __nv_bfloat16* __restrict__ v, __nv_bfloat16* __restrict__ y, float* __restrict__ lse,
    int T, int S, int group, int causal, float scale) {
    alignas(16) __shared__ __nv_bfloat16 tiles[2][2][TILE * PITCH];  // stages of k and v
    int first = (gridDim.y - 1 - blockIdx.y) * ROWS, row = 16 * SETS * WARP;
    int ahead = causal ? S - T + 1 : S;  // query i sees the keys below min(S, i + ahead)
    long long query = (long long)blockIdx.x * T + first;
    k += (long long)(blockIdx.x / group) * S * D;
    v += (long long)(blockIdx.x / group) * S * D;

    load_rows<TILE, 128>(tiles[0][0], k, S);
    load_rows<TILE, 128>(tiles[0][1], v, S);
    load_rows<ROWS, 128>(tiles[1][0], q + query * D, T - first);  // fills the stage: ROWS is 2 TILE
    wait_async();
    __syncthreads();
    unsigned Q[SETS][D / 16][4];
    left_operands(Q, tiles[1][0] + row * PITCH);

    float O[SETS][D / 8][4] = {}, m[SETS][2], l[SETS][2] = {};
    #pragma unroll
    for (int set = 0; set < SETS; set++) m[set][0] = m[set][1] = MINUS_INFINITY;
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
            float P[SETS][KEYS / 8][4] = {};  // scores without scale, then exponentials
            add_turned<KEYS>(P, Q, tiles[stage][0] + step * PITCH);
            if (key + KEYS > fewest) hide_unseen<KEYS>(P, key, first + row, ahead, S);
            soften(P, O, m, l, scale * LOG2_E);
            add_product<KEYS>(O, P, tiles[stage][1] + step * PITCH);
        }
    }

    #pragma unroll
    for (int set = 0; set < SETS; set++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = row + 16 * set + 8 * half + LANE_G;
            float sum = row_sum(l[set][half]);
            if (LANE_T == 0 && first + i < T)
                lse[query + i] = m[set][half] * scale + logf(sum);
            l[set][half] = 1.0f / sum;
        }
    write_rows(y + (query + row) * D, O, l, T - first - row);
}
