// Numbers -> 4-bit codes and their constants; quantize_4bit in minilm/quantize/fourbit.py.
//
//     c2     = abs(x).max(-1)                        x: (blocks, block_size)
//     s      = x * (1 / maximum(c2, 1e-38))          in a short last block x / maximum(c2, 1e-38)
//     codes  = order[searchsorted(middles, s)]       the number of middles below s: 0 .. 15
//     packed = codes[0::2] << 4 | codes[1::2]        of all blocks, with a zero after an odd n
//
// A card takes float32 below 1.18e-38 for zero. So codes are not NumPy's in blocks with such an
// absmax, nor for fp4, which has two zeros, where s is so small. A block with an absmax over 2^126,
// whose reciprocal is that small, divides: a number beside a middle may get the other level.
//
// Launch: ceil(n / 4096) blocks of 256 threads. A thread takes 4 neighbours at 4 places, so that
// a warp loads 512 bytes at once and stores 64. 4096 is a multiple of every block size, so each
// number is read once. A code takes 4 comparisons; all 15 would take longer than the memory.
// Bytes a weight: 4 in, 0.5 + 4/64 out.
// Floor at 4.3 TB/s: 4096 x 4096 17.8 us, 11008 x 4096 47.8 us.
// Reached: not yet measured.
// Registers: at most 48

// The largest v of each `width` neighbouring lanes.
__device__ __forceinline__ float largest_of(float v, int width) {
    #pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        float other = __shfl_xor_sync(0xffffffff, v, d);
        if (d < width) v = fmaxf(v, other);
    }
    return v;
}

// The code of s, by bisection: the first i middles are less than s. (A pointer into `middle` that
// moves along instead of i was compiled wrongly by NVRTC 13.0: the last step compared with the
// middle of the step before. A CPU cannot show that; check_gpu.py did.)
__device__ __forceinline__ unsigned code_of(float s, const float* middle, const unsigned* code) {
    int i = 0;
    #pragma unroll
    for (int step = 8; step > 0; step /= 2)
        if (s > middle[i + step - 1]) i += step;
    return code[i];
}

extern "C" __global__ void __launch_bounds__(256) nf4_quantize(
    const float* __restrict__ x, const float* __restrict__ middles,
    const unsigned char* __restrict__ order, unsigned char* __restrict__ packed,
    float* __restrict__ c2, long long n, int block_shift) {
    __shared__ float middle[15], largest[32];  // of 32 runs of 128 numbers, in memory's order
    __shared__ unsigned code[16];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block_size = 1 << block_shift;
    if (threadIdx.x < 15) middle[threadIdx.x] = middles[threadIdx.x];
    if (threadIdx.x < 16) code[threadIdx.x] = order[threadIdx.x];

    long long first = blockIdx.x * 4096LL + 4 * threadIdx.x;
    float v[4][4], absmax[4];
    #pragma unroll
    for (int j = 0; j < 4; j++) {  // all loads are under way before the first is used
        long long at = first + 1024 * j;
        if (at + 4 <= n) {
            float4 four = __ldg(reinterpret_cast<const float4*>(x + at));
            v[j][0] = four.x, v[j][1] = four.y, v[j][2] = four.z, v[j][3] = four.w;
        } else {
            #pragma unroll
            for (int i = 0; i < 4; i++) v[j][i] = at + i < n ? x[at + i] : 0;
        }
    }
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        float four = fmaxf(fmaxf(fabsf(v[j][0]), fabsf(v[j][1])),
                           fmaxf(fabsf(v[j][2]), fabsf(v[j][3])));
        absmax[j] = largest_of(four, block_size / 4);
        if (lane == 0) largest[8 * j + warp] = absmax[j];
    }
    __syncthreads();
    if (block_size > 128) {  // a block is several runs
        if (warp == 0) largest[lane] = largest_of(largest[lane], block_size / 128);
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < 4; j++) absmax[j] = largest[8 * j + warp];
    }

    #pragma unroll
    for (int j = 0; j < 4; j++) {
        long long at = first + 1024 * j, block = at >> block_shift, start = block << block_shift;
        if (at >= n) break;
        bool is_short = start + block_size > n;
        float c = absmax[j] > 0 ? absmax[j] : 1, factor = __frcp_rn(c);
        if (is_short || c > 0x1p126f) {
            #pragma unroll
            for (int i = 0; i < 4; i++) v[j][i] = __fdiv_rn(v[j][i], c);
            factor = 1;
        }
        unsigned codes = 0;  // the first in the highest bits
        #pragma unroll
        for (int i = 0; i < 4; i++)
            codes = codes << 4 | code_of(__fmul_rn(v[j][i], factor), middle, code);
        if (at == start) c2[block] = is_short && absmax[j] == 0 ? 1e-38f : absmax[j];
        if (at + 2 < n)
            reinterpret_cast<unsigned short*>(packed)[at / 4] = codes >> 8 | (codes & 255) << 8;
        else
            packed[at / 2] = codes >> 8;
    }
}
