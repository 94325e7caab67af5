// What attention.cu and attention_backward.cu share: tiles of rows in shared memory and products of
// them on tensor cores. D, which is HEAD_WIDTH, is a multiple of 16 up to 128. Each D is compiled
// by itself.
//
// A warp owns 16 SETS rows of each product, so no sum crosses a warp. Each 16 x 16 numbers that it
// loads from shared memory serve all its sets. With one set, shared memory would be the limit and
// not the tensor cores. Wider heads leave registers for one set only.
//
// mma_m16n8k16_bf16 and ldmatrix_x4 in hardware.cuh tell how 16 rows lie in registers. One
// ldmatrix_x4 brings 16 x 16 numbers, as quarters of 8 x 8: a left operand, or two right operands.
// The order of the quarters is the order of the addresses that the lanes give:
//
//   left operand X                        rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
//   right operands Y, by trans            the same; two quarters for each 8 columns of Y
//   right operands Y^T                    columns 0-7 and 8-15 of rows 0-7, then of rows 8-15; two
//                                         quarters for each 8 rows of Y
//
// P V needs P, made from S = Q K^T, as a left operand. Two neighbouring 16 x 8 results, rounded,
// are one already: the same rows and columns lie in the same lanes. So P never leaves its
// registers.
#ifndef HEAD_WIDTH
#define HEAD_WIDTH 128
#endif

constexpr int D = HEAD_WIDTH;
constexpr int SETS = D <= 64 ? 2 : 1;
constexpr int PITCH = D + 8;  // an odd multiple of 16 bytes: the 8 rows of a matrix share no bank
constexpr float LOG2_E = 1.44269504f;  // exp(x) = exp2(x log2(e)), and the card has only exp2

#define MINUS_INFINITY __int_as_float(0xff800000)
#define WARP ((int)(threadIdx.x / 32))
#define LANE_G ((int)(threadIdx.x % 32 / 4))
#define LANE_T ((int)(threadIdx.x % 4))

// The sum of x over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Starts copies of N rows into a tile, by THREADS threads. `left` rows exist; the others become
// zero.
template <int N, int THREADS>
__device__ __forceinline__ void load_rows(
    __nv_bfloat16* tile, const __nv_bfloat16* from, int left) {
    #pragma unroll
    for (int i = 0; i < N * D / 8; i += THREADS) {
        unsigned chunk = i + threadIdx.x, row = chunk / (D / 8), column = chunk % (D / 8) * 8;
        if (N * D / 8 % THREADS && row >= N) break;
        load_async<16>(tile + row * PITCH + column, from + 8 * chunk, (int)row < left);
    }
}

// The address that this lane gives for X, and for Y by trans.
__device__ __forceinline__ const __nv_bfloat16* lane_address(const __nv_bfloat16* numbers) {
    return numbers + threadIdx.x % 16 * PITCH + threadIdx.x % 32 / 16 * 8;
}

// Loads 16 SETS rows as left operands.
__device__ __forceinline__ void left_operands(
    unsigned (&a)[SETS][D / 16][4], const __nv_bfloat16* rows) {
    rows = lane_address(rows);
    #pragma unroll
    for (int set = 0; set < SETS; set++)
        #pragma unroll
        for (int d = 0; d < D / 16; d++) ldmatrix_x4(a[set][d], rows + 16 * set * PITCH + 16 * d);
}

__device__ __forceinline__ unsigned two(float x, float y) {
    __nv_bfloat162 rounded = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const unsigned&>(rounded);
}

// x += A Y^T for N rows of Y.
template <int N>
__device__ __forceinline__ void add_turned(
    float (&x)[SETS][N / 8][4], const unsigned (&a)[SETS][D / 16][4], const __nv_bfloat16* y) {
    y += (threadIdx.x % 32 / 16 * 8 + threadIdx.x % 8) * PITCH + threadIdx.x / 8 % 2 * 8;
    #pragma unroll
    for (int d = 0; d < D / 16; d++)
        #pragma unroll
        for (int n = 0; n < N / 16; n++) {
            unsigned r[4];
            ldmatrix_x4(r, y + 16 * n * PITCH + 16 * d);
            unsigned first[2] = {r[0], r[1]}, other[2] = {r[2], r[3]};
            #pragma unroll
            for (int set = 0; set < SETS; set++) {
                mma_m16n8k16_bf16(x[set][2 * n], a[set][d], first);
                mma_m16n8k16_bf16(x[set][2 * n + 1], a[set][d], other);
            }
        }
}

// d += X Y for N rows of Y and N columns of X, which is rounded to bf16.
template <int N>
__device__ __forceinline__ void add_product(
    float (&d)[SETS][D / 8][4], const float (&x)[SETS][N / 8][4], const __nv_bfloat16* y) {
    y = lane_address(y);
    #pragma unroll
    for (int n = 0; n < N / 16; n++) {
        unsigned a[SETS][4];
        #pragma unroll
        for (int set = 0; set < SETS; set++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = x[set][2 * n + i / 2] + 2 * (i % 2);
                a[set][i] = two(pair[0], pair[1]);
            }
        #pragma unroll
        for (int c = 0; c < D / 16; c++) {
            unsigned r[4];
            ldmatrix_x4_trans(r, y + 16 * n * PITCH + 16 * c);
            unsigned first[2] = {r[0], r[1]}, other[2] = {r[2], r[3]};
            #pragma unroll
            for (int set = 0; set < SETS; set++) {
                mma_m16n8k16_bf16(d[set][2 * c], a[set], first);
                mma_m16n8k16_bf16(d[set][2 * c + 1], a[set], other);
            }
        }
    }
}

// Makes scores minus infinity if the query does not see the key: key >= min(S, query + ahead).
// The columns of x begin at `key`, its rows at `query`.
template <int N>
__device__ __forceinline__ void hide_unseen(
    float (&x)[SETS][N / 8][4], int key, int query, int ahead, int S) {
    #pragma unroll
    for (int set = 0; set < SETS; set++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int seen = min(S, query + 16 * set + 8 * half + LANE_G + ahead) - key - 2 * LANE_T;
            #pragma unroll
            for (int n = 0; n < N / 8; n++) {
                if (8 * n >= seen) x[set][n][2 * half] = MINUS_INFINITY;
                if (8 * n + 1 >= seen) x[set][n][2 * half + 1] = MINUS_INFINITY;
            }
        }
}

// Writes 16 SETS rows, each times its factor; `left` of them exist.
__device__ __forceinline__ void write_rows(
    __nv_bfloat16* to, const float (&d)[SETS][D / 8][4], const float (&factor)[SETS][2], int left) {
    #pragma unroll
    for (int set = 0; set < SETS; set++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = 16 * set + 8 * half + LANE_G;
            if (row >= left) continue;
            float f = factor[set][half];
            unsigned* out = reinterpret_cast<unsigned*>(to + row * D) + LANE_T;
            #pragma unroll
            for (int n = 0; n < D / 8; n++)
                out[4 * n] = two(f * d[set][n][2 * half], f * d[set][n][2 * half + 1]);
        }
}
