// Instructions that CUDA C has no functions for, and one set of functions for the three dtypes.
//
// REAL is the dtype of activations and weights. A file that uses it is compiled once for each
// dtype, with -DREAL=float, __half or __nv_bfloat16. Arithmetic is always in float.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef MLM_EMULATED  // the tests run kernels on a CPU and bring their own

// d += a b on the tensor cores: a is 16 x 16 by rows, b is 16 x 8 by columns, d is 16 x 8 in float.
// Lane l, with g = l / 4 and t = l % 4, holds two neighbours in each register:
//   a[0], a[1]: rows g and g + 8, columns 2t, 2t + 1;  a[2], a[3]: the same rows, columns + 8
//   b[0], b[1]: column g, rows 2t, 2t + 1 and the same + 8
//   d[0], d[1]: row g, columns 2t, 2t + 1;             d[2], d[3]: row g + 8
__device__ __forceinline__ void mma_m16n8k16_bf16(
    float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(__half* out, float x) { *out = __float2half_rn(x); }
__device__ __forceinline__ void put(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

// Two neighbours at once: one instruction converts both.
__device__ __forceinline__ void put2(float* out, float x, float y) {
    out[0] = x;
    out[1] = y;
}
__device__ __forceinline__ void put2(__half* out, float x, float y) {
    *reinterpret_cast<__half2*>(out) = __floats2half2_rn(x, y);
}
__device__ __forceinline__ void put2(__nv_bfloat16* out, float x, float y) {
    *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(x, y);
}

#ifndef MLM_EMULATED

// Starts a copy of BYTES bytes, 4 or 16, to shared memory, or writes zeros if `exists` is false.
// Both addresses are multiples of BYTES. The bytes are undefined until wait_async. Other threads
// see them after a barrier that follows it. The copy takes no register.
template <int BYTES>
__device__ __forceinline__ void load_async(void* shared, const void* global, bool exists) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared), bytes = exists ? BYTES : 0;
    if constexpr (BYTES == 16)  // bypasses the L1 cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;"
                     :: "r"(to), "l"(global), "r"(bytes), "n"(BYTES) : "memory");
}

// Waits for all copies that this thread has started.
__device__ __forceinline__ void wait_async() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Loads four 8 x 8 matrices of 16-bit numbers from shared memory at once. Lane l gives the address
// of row l % 8 of matrix l / 8, a multiple of 16 bytes. With g = l / 4 and t = l % 4, r[i] gets two
// numbers of matrix i: row g, columns 2t and 2t + 1; with trans column g, rows 2t and 2t + 1.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}
#endif
