// Numbers -> 4-bit codes and their constants; quantize_4bit in minilm/quantize/fourbit.py.
//
//     c2     = abs(x).max(-1)                        x: (blocks, block_size)
//     s      = x * (1 / maximum(c2, 1e-38))          in a short last block x / maximum(c2, 1e-38)
//     codes  = order[searchsorted(middles, s)]       the number of middles below s: 0 .. 15
//     packed = codes[0::2] << 4 | codes[1::2]        of all blocks, with a zero after an odd n
//
// A card takes float32 below 1.18e-38 for zero. So codes differ from NumPy's in blocks with such an
// absmax, and in fp4, which has two zeros, if s is that small. If absmax is over 2^126, its
// reciprocal is that small too. Such a block divides instead, and a number beside a middle may get
// the other level.
//
// Launch: ceil(n / 4096) blocks of 256 threads. A thread takes 8 neighbours at each of 2 places, so
// a warp loads 1024 bytes in a row and stores 128. 4096 is a multiple of every block size, so each
// number is read once. A code takes 4 comparisons, two of them with middles in registers.
// Bytes per weight: 4 in, 0.5 + 4/64 out. Instructions: about 31 per number, 44 us for 11008 x 4096
// if each cycle issues one.
// Floor at 4.26 TB/s: 4096 x 4096 18.0 us, 11008 x 4096 48.3 us. Expected: 24 and 60 us.
// Reached on an H200, 2026-11-27: 23.7 and 55.4 us. The version before (4 neighbours at 4
// places, 52 instructions a number): 36.3 and 86.9 us.
// Check: python scripts/bench/check_kernels.py quantize
// Registers: at most 48

// The largest v of the `width` neighbouring lanes that this lane belongs to.
__device__ __forceinline__ float largest_of(float v, int width) {
    #pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        float other = __shfl_xor_sync(0xffffffff, v, d);
        if (d < width) v = fmaxf(v, other);
    }
    return v;
}

struct Levels { float middle[16]; unsigned code[16]; };  // 15 middles

// The code of s, by bisection: the first i middles are less than s. i counts bytes, which saves the
// multiplications by 4: a third of the work here is to compute addresses. (An earlier version moved
// a pointer into `middle` instead. NVRTC 13.0 compiled it wrongly: the last step compared with the
// middle of the step before. A CPU cannot show that; check_gpu.py did.)
__device__ __forceinline__ unsigned code_of(
    float s, float middle3, float middle7, float middle11, const Levels& levels) {
    const char *middle = reinterpret_cast<const char*>(levels.middle),
               *code = reinterpret_cast<const char*>(levels.code);
    bool upper = s > middle7;
    int i = upper ? 32 : 0;
    if (s > (upper ? middle11 : middle3)) i += 16;
    if (s > *reinterpret_cast<const float*>(middle + i + 4)) i += 8;
    if (s > *reinterpret_cast<const float*>(middle + i)) i += 4;
    return *reinterpret_cast<const unsigned*>(code + i);
}

extern "C" __global__ void __launch_bounds__(256) nf4_quantize(
    const float* __restrict__ x, const float* __restrict__ middles,
    const unsigned char* __restrict__ order, unsigned char* __restrict__ packed,
    float* __restrict__ c2, long long n, int block_shift) {
    __shared__ Levels levels;
    __shared__ float largest[16];  // of each of 16 runs of 256 numbers, in memory's order
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block_size = 1 << block_shift;
    long long base = blockIdx.x * 4096LL;
    int left = min(n - base, 4096LL);
    x += base, packed += base / 2, c2 += base >> block_shift;

    float v[2][8], absmax[2];
    #pragma unroll
    for (int j = 0; j < 2; j++) {  // all loads are under way before the first is used
        int at = 8 * threadIdx.x + 2048 * j;
        if (at + 8 <= left) {
            float4 a = __ldg(reinterpret_cast<const float4*>(x + at));
            float4 b = __ldg(reinterpret_cast<const float4*>(x + at + 4));
            v[j][0] = a.x, v[j][1] = a.y, v[j][2] = a.z, v[j][3] = a.w;
            v[j][4] = b.x, v[j][5] = b.y, v[j][6] = b.z, v[j][7] = b.w;
        } else {
            #pragma unroll
            for (int i = 0; i < 8; i++) v[j][i] = at + i < left ? x[at + i] : 0;
        }
    }
    if (threadIdx.x < 15) levels.middle[threadIdx.x] = middles[threadIdx.x];
    if (threadIdx.x < 16) levels.code[threadIdx.x] = order[threadIdx.x];
    #pragma unroll
    for (int j = 0; j < 2; j++) {
        absmax[j] = 0;
        #pragma unroll
        for (int i = 0; i < 8; i++) absmax[j] = fmaxf(absmax[j], fabsf(v[j][i]));
        absmax[j] = largest_of(absmax[j], block_size / 8);
        if (lane == 0) largest[8 * j + warp] = absmax[j];
    }
    __syncthreads();
    if (block_size > 256) {  // a block is several runs
        if (warp == 0) {
            float all = largest_of(largest[lane % 16], block_size / 256);
            __syncwarp();
            if (lane < 16) largest[lane] = all;
        }
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < 2; j++) absmax[j] = largest[8 * j + warp];
    }

    const float* m = levels.middle;
    float middle3 = m[3], middle7 = m[7], middle11 = m[11];
    #pragma unroll
    for (int j = 0; j < 2; j++) {
        int at = 8 * threadIdx.x + 2048 * j, block = at >> block_shift;
        if (at >= left) break;
        bool is_short = (block + 1) << block_shift > left;
        float c = absmax[j] > 0 ? absmax[j] : 1, factor = __frcp_rn(c);
        if (is_short || c > 0x1p126f) {
            #pragma unroll
            for (int i = 0; i < 8; i++) v[j][i] = __fdiv_rn(v[j][i], c);
            factor = 1;
        }
        unsigned codes = 0;  // the first byte in the lowest bits, its first code in the upper half
        #pragma unroll
        for (int i = 0; i < 8; i++)
            codes |= code_of(__fmul_rn(v[j][i], factor), middle3, middle7, middle11, levels)
                << (4 * i ^ 4);
        if (at == block << block_shift)
            c2[block] = is_short && absmax[j] == 0 ? 1e-38f : absmax[j];
        if (at + 8 <= left)
            reinterpret_cast<unsigned*>(packed)[at / 8] = codes;
        else
            for (int i = 0; at + 2 * i < left; i++) packed[at / 2 + i] = codes >> 8 * i;
    }
}
