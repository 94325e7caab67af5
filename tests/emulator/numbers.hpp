// CUDA's number types and arithmetic: vectors, __nv_bfloat16, __half, intrinsics.
#pragma once
#include <atomic>
#include <bit>
#include <cstdint>
#include <math.h>
#include <type_traits>

#define VECTORS(T, name, size)                                 \
    struct alignas(2 * size) name##2 { T x, y; };              \
    struct alignas(4 * size) name##4 { T x, y, z, w; };        \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(unsigned char, uchar, 1)
VECTORS(int, int, 4)
VECTORS(unsigned, uint, 4)
VECTORS(float, float, 4)
#undef VECTORS

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

// Single operations, rounded to nearest: g++ runs with -ffp-contract=off and fuses none of them.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// Less exact on a GPU than here.
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }

// As in CUDA: of two floats, the one that is a number; otherwise the usual conversions.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) {
    std::common_type_t<A, B> x = a, y = b;
    return y < x ? y : x;
}
template <class A, class B> std::common_type_t<A, B> max(A a, B b) {
    std::common_type_t<A, B> x = a, y = b;
    return x < y ? y : x;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Four bytes chosen from the eight of b and a; bit 3 of a selector spreads the byte's sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selectors) {
    uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned selector = selectors >> 4 * i & 15;
        unsigned byte = bytes >> 8 * (selector & 7) & 255;
        if (selector & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T value) { *p = value; }

// Atomic, and no more: it orders no other access.
template <class T> T atomicAdd(T* p, std::type_identity_t<T> value) {
    return std::atomic_ref<T>(*p).fetch_add(value, std::memory_order_relaxed);
}

// The upper half of a float32.
struct __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        unsigned u = __float_as_uint(x);
        bits = x != x ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16;  // to nearest, ties to even
    }
    operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

// 1 sign, 5 exponent and 10 fraction bits.
struct __half {
    uint16_t bits;

    __half() = default;
    __half(float x) {
        unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000, size = u & 0x7FFFFFFF;
        if (x != x) {
            bits = 0x7FFF;
        } else if (size >= 0x47800000) {  // 2^16; what rounds up to it carries into infinity below
            bits = sign | 0x7C00;
        } else if (size >= 0x38800000) {  // 2^-14, the least normal half
            unsigned odd = size >> 13 & 1;
            bits = sign | (size + 0xFFF + odd - 0x38000000) >> 13;  // exponent bias 127 becomes 15
        } else {
            bits = sign | unsigned(lrintf(fabsf(x) * 0x1p24f));  // denormals are multiples of 2^-24
        }
    }
    operator float() const {
        unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
        if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | fraction << 13);
        if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
        return (sign ? -0x1p-24f : 0x1p-24f) * fraction;
    }
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }

inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
