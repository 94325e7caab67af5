// Rows added up by their id, in their order: the same bits every time, which atomicAdd does not
// give; the gradient of `embedding` of minilm/ops.py.
//
//     total[id] = ((0 + dy[i0]) + dy[i1]) + ...   for ids[i0] = ids[i1] = ... = id, i0 < i1 < ...
//
// dy (N, C), total (V, C) comes as zeros, keys = sort(ids N + place). A block finds out whether its
// key begins a run of one id, and if so where the run ends, by halving; then a thread adds up a
// column.
//
// Launch: (N, C / 128) blocks of 128 threads.
// Bytes: N C in and V C out at most, in bf16 2 N C + 4 V C.
// Floor at 4.26 TB/s: 4096 rows of 2048 in bf16, 3.9 us in, and out 8 us for 4096 ids. Expected:
// 20 - 40 us: an id that comes often takes a few loads at a time.
// Reached: not yet measured.
// Check: python scripts/bench/gpu_cases.py scatter
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
