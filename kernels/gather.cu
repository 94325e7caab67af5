// Copies many small 16-bit arrays to their places in one float32 buffer, in one launch. They are
// the gradients for FlatParameters of minilm/optim/flat.py.
//
//     flat[place : place + size] = x               for each (x's address, place, size) of the table
//
// Launch: (blocks, pieces) blocks of 256 threads. `blocks` is enough for the largest piece, at most
// 64.
// Bytes per number: 2 in and 4 out.
// Floor at 4.26 TB/s: adapters of 12.6 M numbers, 17.8 us. Predicted: 25 - 35 us. It replaces 308
// launches of CuPy's copy, which would take the card 2 us each and the host 5 - 40 us each.
// Reached on an H200, 2026-11-27: 29.5 us; 37.8 us when each load waited for the store before.
// Check: python scripts/bench/check_kernels.py gather
// Registers: at most 40
#include "hardware.cuh"

extern "C" __global__ void __launch_bounds__(256) gather(
    const long long* __restrict__ table, float* __restrict__ flat) {
    const long long* piece = table + 3 * blockIdx.y;
    const REAL* x = reinterpret_cast<const REAL*>(piece[0]);
    float* y = flat + piece[1];
    long long i = blockIdx.x * 256LL + threadIdx.x, step = 256LL * gridDim.x, n = piece[2];
    for (; i + 3 * step < n; i += 4 * step) {  // four loads first: x and y might overlap, for all
        float a = widen(x[i]), b = widen(x[i + step]), c = widen(x[i + 2 * step]);  // it knows
        float d = widen(x[i + 3 * step]);
        y[i] = a, y[i + step] = b, y[i + 2 * step] = c, y[i + 3 * step] = d;
    }
    for (; i < n; i += step) y[i] = widen(x[i]);
}
