// Copies many small 16-bit arrays to their places in one float32 buffer, in one launch. They are
// the gradients for FlatParameters of minilm/optim/flat.py.
//
//     flat[place : place + size] = x               for each (x's address, place, size) of the table
//
// Launch: (blocks, pieces) blocks of 256 threads. `blocks` is enough for the largest piece, at most
// 64.
// Bytes per number: 2 in and 4 out.
// Floor at 4.26 TB/s: adapters of 12.6 M numbers, 17.7 us. Expected: 25 - 35 us. It replaces 308
// launches of CuPy's copy, which would take the card 2 us each and the host 5 - 40 us each.
// Reached: not yet measured.
// Check: python scripts/bench/check_kernels.py gather
// Registers: at most 40
#include "hardware.cuh"

extern "C" __global__ void __launch_bounds__(256) gather(
    const long long* __restrict__ table, float* __restrict__ flat) {
    const long long* piece = table + 3 * blockIdx.y;
    const REAL* x = reinterpret_cast<const REAL*>(piece[0]);
    float* y = flat + piece[1];
    #pragma unroll 4
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < piece[2]; i += 256LL * gridDim.x)
        y[i] = widen(x[i]);
}
