// A vector is as many numbers as 16 bytes hold. A thread loads or stores one at once, and computes
// in float.

constexpr int VECTOR = 16 / sizeof(REAL);
struct alignas(16) Vector { REAL at[VECTOR]; };

// Loads a vector. If `whole`, it begins at a multiple of 16 bytes. If not, only `left` numbers are
// loaded, from any address, and zeros follow. Callers give `whole` as a constant: if each load had
// a branch, it would wait for the load before.
__device__ __forceinline__ void load_vector(
    float (&x)[VECTOR], const REAL* from, bool whole, long long left) {
    Vector loaded;
    if (whole) loaded = *reinterpret_cast<const Vector*>(from);
    #pragma unroll
    for (int i = 0; i < VECTOR; i++)
        x[i] = whole ? widen(loaded.at[i]) : i < left ? widen(from[i]) : 0.0f;
}

__device__ __forceinline__ void store_vector(
    REAL* to, const float (&x)[VECTOR], bool whole, long long left) {
    Vector stored;
    #pragma unroll
    for (int i = 0; i < VECTOR; i += 2) put2(stored.at + i, x[i], x[i + 1]);
    if (whole) *reinterpret_cast<Vector*>(to) = stored;
    #pragma unroll
    for (int i = 0; i < VECTOR; i++)
        if (!whole && i < left) to[i] = stored.at[i];
}
