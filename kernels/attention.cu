// softmax(q k^T / sqrt(D)) v without its T x S scores in memory: FlashAttention-2 (Dao 2023,
// arXiv:2307.08691), algorithm 1, on the online softmax of Milakov & Gimelshein 2018
// (arXiv:1805.02867). As minilm/attention.py has it, for q (B, H, T, D), k and v (B, K, S, D):
//
//     S   = scale q @ k^T                  -inf where a key may not be seen
//     lse = log(exp(S).sum(-1))            (B, H, T), what the backward pass wants
//     P   = exp(S - lse)
//     y   = P @ v                          head h of q reads head h // group of k and v
//
// causal: the last query sees every key, each earlier query one fewer.
//
// Launch: (B H, ceil(T / 64)) blocks of 128 threads, 64 queries each, the longest loops first.
// The keys come in tiles of 64. Of the tiles so far a row knows m, its largest score, l, its sum of
// exp(S - m), and O, its sum of exp(S - m) v; a larger m shrinks l and O by exp(m - larger m).
//
// Accuracy: products of bf16 summed in float. P is rounded to bf16, by 2^-8 of it at most, before
// it meets v; l is not. exp2f has 2 ulp of float on the card.
// Flops: 4 B H T S D, half of it causal. Bytes: those of q, k, v, y and lse once; each block reads
// its k and v again, from the L2 cache.
// Floor for B = 4, H = 32, K = 4, T = S = 1024, D = 64 at 790 TFLOP/s: 43.5 us, causal 21.8 us; the
// bytes, 38.3 MB at 4.3 TB/s, take 8.9 us. A warp's 16 rows use what they load from shared memory
// once, 256 bytes for each mma: at 128 bytes a clock of 1.8 GHz about 70 us, causal 35 us.
// Reached: not yet measured.
// Registers: at most 168
#include "hardware.cuh"
#include "attention.cuh"

// The larger of x over the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

extern "C" __global__ void __launch_bounds__(128) attention_forward(
    const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k,
    const __nv_bfloat16* __restrict__ v, __nv_bfloat16* __restrict__ y, float* __restrict__ lse,
    int T, int S, int group, int causal, float scale) {
    alignas(16) __shared__ __nv_bfloat16 k_tile[ROWS * PITCH], v_tile[ROWS * PITCH];
    const float minus_infinity = __int_as_float(0xff800000), log2_scale = scale * LOG2_E;
    int first = (gridDim.y - 1 - blockIdx.y) * ROWS, row = WARP_ROW + LANE_G;
    long long query = (long long)blockIdx.x * T + first;
    k += (long long)(blockIdx.x / group) * S * D;
    v += (long long)(blockIdx.x / group) * S * D;

    unsigned Q[D / 16][4];
    load_tile(k_tile, q + query * D, ROWS, T - first);
    __syncthreads();
    #pragma unroll
    for (int d = 0; d < D / 16; d++) left_operand(Q[d], k_tile + WARP_ROW * PITCH + 16 * d);
    __syncthreads();  // all have read q before the first k overwrites it

    float O[D / 8][4] = {}, m[2] = {minus_infinity, minus_infinity}, l[2] = {0.0f, 0.0f};
    int keys = causal ? min(S, S - T + first + ROWS) : S;
    for (int key = 0; key < keys; key += ROWS) {
        load_tile(k_tile, k + (long long)key * D, ROWS, S - key);
        load_tile(v_tile, v + (long long)key * D, ROWS, S - key);
        __syncthreads();

        float P[ROWS / 8][4] = {};  // the scores, before scale, until they are exponentials
        #pragma unroll
        for (int d = 0; d < D / 16; d++)
            #pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
                add_turned(P[n], Q[d], k_tile + 8 * n * PITCH + 16 * d);

        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int seen = causal ? min(S, S - T + first + row + 8 * half + 1) : S;
            float larger = m[half];
            #pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
                #pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    if (key + 8 * n + 2 * LANE_T + i % 2 >= seen) P[n][i] = minus_infinity;
                    larger = fmaxf(larger, P[n][i]);
                }
            larger = row_max(larger);  // finite: every query sees the first key
            float shrink = exp2f((m[half] - larger) * log2_scale), top = larger * log2_scale;
            m[half] = larger;
            l[half] *= shrink;
            #pragma unroll
            for (int n = 0; n < D / 8; n++) O[n][2 * half] *= shrink, O[n][2 * half + 1] *= shrink;
            #pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
                #pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    P[n][i] = exp2f(fmaf(P[n][i], log2_scale, -top));
                    l[half] += P[n][i];  // of this lane's keys; row_sum comes last
                }
        }
        #pragma unroll
        for (int n = 0; n < ROWS / 8; n += 2) {
            unsigned a[4];
            left_operand(a, P[n], P[n + 1]);
            add_product(O, a, v_tile + 8 * n * PITCH);
        }
        __syncthreads();  // all have read both tiles before the next come
    }

    float over_l[2];
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        l[half] = row_sum(l[half]);
        over_l[half] = 1.0f / l[half];
        if (LANE_T == 0 && first + row + 8 * half < T)
            lse[query + row + 8 * half] = m[half] * scale + logf(l[half]);
    }
    write_rows(y + query * D, O, over_l, T - first);
}
