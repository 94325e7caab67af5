// 4-bit codes and their constants -> numbers; FourBit.dequantize in minilm/quantize/fourbit.py.
//
//     codes = stack([packed >> 4, packed & 15], -1).ravel()
//     c2    = map[c2_codes] * repeat(c1, 256) + offset       where the constants are in 8 bits
//     out   = (levels[codes] * repeat(c2, block_size)).astype(REAL)
//
// Launch: ceil(n / 8192) blocks of 256 threads. A thread turns 4 words of 8 codes into 16 bytes
// each of 16-bit numbers (32 of float); neighbours in a warp load and store neighbours in memory.
// Bytes a weight: 0.5 in, 4/64 or 1/64 + 4/16384 for constants, 2 out (4 for float).
// Floor at 4.3 TB/s: 11008 x 4096 to bf16 26.9 us, double quantized 26.4 us; 4096 x 4096 10.0 us.
// Reached: not yet measured.
// Registers: at most 32
#include "fourbit.cuh"
#include "hardware.cuh"

// Eight codes of one word: byte by byte from the lowest, the high half of a byte first.
__device__ __forceinline__ void write_eight(
    REAL* out, unsigned word, float c2, const float* table) {
    alignas(16) REAL y[8];
    #pragma unroll
    for (int b = 0; b < 4; b++) {
        unsigned byte = word >> 8 * b & 255;
        put2(y + 2 * b, table[byte >> 4] * c2, table[byte & 15] * c2);
    }
    #pragma unroll
    for (int i = 0; i < (int)sizeof y / 16; i++)
        reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(y)[i];
}

extern "C" __global__ void __launch_bounds__(256) nf4_dequantize(
    const unsigned char* __restrict__ packed, const float* __restrict__ levels,
    const float* __restrict__ c2, const unsigned char* __restrict__ c2_codes,
    const float* __restrict__ c1, const float* __restrict__ c2_map,
    const float* __restrict__ offset, REAL* __restrict__ out,
    long long n, int block_shift, int doubled) {
    __shared__ float table[16];  // 16 banks: lanes that read different levels do not collide
    __shared__ float map[256];
    if (threadIdx.x < 16) table[threadIdx.x] = levels[threadIdx.x];
    if (doubled) map[threadIdx.x] = c2_map[threadIdx.x];
    __syncthreads();

    const unsigned* words = reinterpret_cast<const unsigned*>(packed);
    long long whole = n / 8, first = blockIdx.x * 1024LL + threadIdx.x;
    unsigned word[4];
    float c[4];
    #pragma unroll
    for (int j = 0; j < 4; j++) {  // all loads are under way before the first is used
        long long w = first + 256 * j;
        if (w >= whole) break;
        word[j] = __ldg(words + w);
        c[j] = constant_of(8 * w >> block_shift, c2, c2_codes, c1, map, offset, doubled);
    }
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        long long w = first + 256 * j;
        if (w >= whole) break;
        write_eight(out + 8 * w, word[j], c[j], table);
    }
    if (first == 0)  // up to seven codes that fill no word
        for (long long i = 8 * whole; i < n; i++) {
            float c = constant_of(i >> block_shift, c2, c2_codes, c1, map, offset, doubled);
            put(out + i, table[i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4] * c);
        }
}
