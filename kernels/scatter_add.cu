// The sum of the rows with each id; the gradient of `embedding` of minilm/ops.py. Rows are added in
// their order, so the bits are the same every time. With atomicAdd they would not be.
//
//     total[id] = ((0 + dy[i0]) + dy[i1]) + ...   for ids[i0] = ids[i1] = ... = id, i0 < i1 < ...
//
// dy is (N, C), keys = sort(2^32 ids + place) is (N,), and total (V, C) is zero before. A block
// checks whether its key begins a run of one id. If so, each thread adds up a vector of columns.
// The lanes of a warp look at 32 keys at once, and then 8 rows are loaded before they are added.
//
// Launch: (N, ceil(C / (64 VECTOR))) blocks of 64 threads.
// Bytes: N C in and V C out at most, in bf16 2 N C + 4 V C.
// Floor at 4.26 TB/s: 4096 rows of 2048 in bf16, 11.3 us for 3828 ids, 3.9 us for one. Predicted:
// 15 - 30 us for random ids, 30 - 60 us for words (Zipf: one 393 times), 180 - 260 us for one id.
// Reached on an H200, 2026-11-27: 22.7, 70.8 and 601 us. Before it found a run's end by bisection
// and loaded 4 rows of one column: 154, 135 and 672 us. One id is slow because the order is a
// promise: each column is one chain of 4096 additions, so 2048 columns keep 8 warps busy, at 147 ns
// a row. 16 rows at once take 138 ns a row, so waiting for memory is not all of it; random ids then
// take 39.1 us.
// Check: python scripts/bench/check_kernels.py scatter
// Registers: at most 128
#include "hardware.cuh"
#include "vector.cuh"

constexpr int DEPTH = 8;  // rows that a thread loads at once; with 16 too few threads fit

// A thread's columns of a run's sum. `whole` means that C is a multiple of VECTOR; `left` columns
// exist from the thread's first on. All lanes come here, also those without columns.
__device__ __forceinline__ void add_run(
    const long long* keys, const REAL* dy, float* total, int N, int C, bool whole, int left) {
    int lane = threadIdx.x % 32, id = (int)(keys[0] >> 32), count = 32;
    float sum[VECTOR] = {};
    for (int i = 0; count == 32; i += 32) {
        long long key = i + lane < N ? keys[i + lane] : -1;
        count = __popc(__ballot_sync(0xffffffff, key >> 32 == id));
        for (int first = 0; first < count; first += DEPTH) {
            float x[DEPTH][VECTOR] = {};
            #pragma unroll
            for (int j = 0; j < DEPTH; j++) {
                int place = __shfl_sync(0xffffffff, (int)key, first + j);
                if (first + j < count && left > 0)
                    load_vector(x[j], dy + (long long)place * C, whole, left);
            }
            #pragma unroll
            for (int j = 0; j < DEPTH; j++)  // a zero that was not loaded changes no bit of a sum
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) sum[k] += x[j][k];
        }
    }
    float* to = total + (long long)id * C;
    #pragma unroll
    for (int k = 0; k < VECTOR; k += 4)
        if (whole && left > 0)
            *reinterpret_cast<float4*>(to + k) =
                make_float4(sum[k], sum[k + 1], sum[k + 2], sum[k + 3]);
    #pragma unroll
    for (int k = 0; k < VECTOR; k++)
        if (!whole && k < left) to[k] = sum[k];
}

extern "C" __global__ void __launch_bounds__(64) scatter_add(
    const long long* __restrict__ keys, const REAL* __restrict__ dy, float* __restrict__ total,
    int N, int C) {
    int begin = blockIdx.x, column = VECTOR * (blockIdx.y * 64 + threadIdx.x);
    if (begin > 0 && keys[begin - 1] >> 32 == keys[begin] >> 32) return;
    if (C % VECTOR == 0)
        add_run(keys + begin, dy + column, total + column, N - begin, C, true, C - column);
    else
        add_run(keys + begin, dy + column, total + column, N - begin, C, false, C - column);
}
