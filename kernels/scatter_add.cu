// The sum of the rows with each id; the gradient of `embedding` of minilm/ops.py. Rows are added in
// their order, so the bits are the same every time. With atomicAdd they would not be.
//
//     total[id] = ((0 + dy[i0]) + dy[i1]) + ...   for ids[i0] = ids[i1] = ... = id, i0 < i1 < ...
//
// dy is (N, C), keys = sort(ids N + place) is (N,), and total (V, C) is zero before. A block checks
// whether its key begins a run of one id. If so, it finds the end of the run by bisection, and then
// each thread adds up a column.
//
// Launch: (N, ceil(C / 128)) blocks of 128 threads.
// Bytes: N C in and V C out at most, in bf16 2 N C + 4 V C.
// Floor at 4.26 TB/s: 4096 rows of 2048 in bf16, 3.9 us in, and out 8 us for 4096 ids. Expected:
// 20 - 40 us, because the rows of a frequent id are loaded only a few at a time.
// Reached: not yet measured.
// Check: python scripts/bench/check_kernels.py scatter
// Registers: at most 40
#include "hardware.cuh"

extern "C" __global__ void __launch_bounds__(128) scatter_add(
    const long long* __restrict__ keys, const REAL* __restrict__ dy, float* __restrict__ total,
    int N, int C) {
    int begin = blockIdx.x, column = blockIdx.y * 128 + threadIdx.x;
    long long id = keys[begin] / N;
    if (begin > 0 && keys[begin - 1] / N == id) return;
    int end = begin + 1, past = N;  // the run ends in end .. past
    while (end < past) {
        int middle = end + (past - end) / 2;
        if (keys[middle] / N == id)
            end = middle + 1;
        else
            past = middle;
    }
    if (column >= C) return;
    float sum = 0.0f;
    #pragma unroll 4
    for (int i = begin; i < end; i++) sum += widen(dy[(keys[i] - id * N) * C + column]);
    total[id * C + column] = sum;
}
