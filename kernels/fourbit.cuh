// How the kernels read a FourBit of minilm/quantize/fourbit.py.

// The constant of a block: stored in float, or in 8 bits and then by eq. (6) of arXiv:2305.14314,
// in NumPy's order of operations.
__device__ __forceinline__ float constant_of(
    long long block, const float* c2, const unsigned char* c2_codes, const float* c1,
    const float* map, const float* offset, int doubled) {
    if (!doubled) return __ldg(c2 + block);
    return __fadd_rn(__fmul_rn(map[c2_codes[block]], __ldg(c1 + (block >> 8))), __ldg(offset));
}
