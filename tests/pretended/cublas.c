// cuBLAS by its names. Products and inner products call back; what else is called is noted.
#include <stddef.h>

typedef long long stride;
typedef struct {  // a product, column-major: C = alpha op(A) op(B) + beta C
    int turn_a, turn_b, m, n, k, count, type_a, type_b, type_c, lda, ldb, ldc;
    stride step_a, step_b, step_c;
    const void *alpha, *a, *b, *beta;
    void *c;
    int in_doubles;
} product;

static int (*on_product)(const product *);
static int (*on_dot)(int is_double, int n, const void *x, int dx, const void *y, int dy, void *out);
static void (*on_other)(const char *name);

void set_callbacks(int (*multiply)(const product *),
                   int (*dot)(int, int, const void *, int, const void *, int, void *),
                   void (*other)(const char *)) {
    on_product = multiply, on_dot = dot, on_other = other;
}

enum { FLOAT = 0, DOUBLE = 1, COMPUTE_DOUBLE = 70 };  // cudaDataType, cublasComputeType_t

int cublasCreate_v2(void **handle) { *handle = (void *)1; return 0; }
int cublasDestroy_v2(void *handle) { return 0; }
int cublasGetVersion_v2(void *handle, int *version) { *version = 130000; return 0; }
int cublasSetStream_v2(void *handle, void *stream) { return 0; }
int cublasGetStream_v2(void *handle, void **stream) { *stream = NULL; return 0; }
int cublasSetMathMode(void *handle, int mode) { return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasSetPointerMode_v2(void *handle, int mode) { return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }

int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha,
                               const void *a, int type_a, int lda, stride step_a, const void *b,
                               int type_b, int ldb, stride step_b, const void *beta, void *c,
                               int type_c, int ldc, stride step_c, int count, int compute,
                               int algorithm) {
    product p = {ta, tb, m, n, k, count, type_a, type_b, type_c, lda, ldb, ldc, step_a, step_b,
                 step_c, alpha, a, b, beta, c, compute == COMPUTE_DOUBLE};
    return on_product(&p);
}
int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha,
                 const void *a, int type_a, int lda, const void *b, int type_b, int ldb,
                 const void *beta, void *c, int type_c, int ldc, int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, type_a, lda, 0, b, type_b,
                                      ldb, 0, beta, c, type_c, ldc, 0, 1, compute, algorithm);
}

#define TYPED(letter, number, type, compute)                                                       \
    int cublas##letter##gemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k,      \
                                           const number *alpha, const number *a, int lda,          \
                                           stride step_a, const number *b, int ldb, stride step_b, \
                                           const number *beta, number *c, int ldc, stride step_c,  \
                                           int count) {                                            \
        return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, type, lda, step_a, b, \
                                          type, ldb, step_b, beta, c, type, ldc, step_c, count,    \
                                          compute, 0);                                             \
    }                                                                                              \
    int cublas##letter##gemmBatched(void *handle, int ta, int tb, int m, int n, int k,             \
                                    const number *alpha, const number *const a[], int lda,         \
                                    const number *const b[], int ldb, const number *beta,          \
                                    number *const c[], int ldc, int count) {                       \
        int status = 0;                                                                            \
        for (int i = 0; i < count && !status; i++)                                                 \
            status = cublas##letter##gemmStridedBatched(handle, ta, tb, m, n, k, alpha, a[i], lda, \
                                                        0, b[i], ldb, 0, beta, c[i], ldc, 0, 1);   \
        return status;                                                                             \
    }                                                                                              \
    int cublas##letter##gemm_v2(void *handle, int ta, int tb, int m, int n, int k,                 \
                                const number *alpha, const number *a, int lda, const number *b,    \
                                int ldb, const number *beta, number *c, int ldc) {                 \
        return cublas##letter##gemmStridedBatched(handle, ta, tb, m, n, k, alpha, a, lda, 0, b,    \
                                                  ldb, 0, beta, c, ldc, 0, 1);                     \
    }                                                                                              \
    int cublas##letter##gemv_v2(void *handle, int ta, int m, int n, const number *alpha,           \
                                const number *a, int lda, const number *x, int dx,                 \
                                const number *beta, number *y, int dy) {                           \
        return cublas##letter##gemmStridedBatched(handle, 0, !ta, 1, ta ? n : m, ta ? m : n,       \
                                                  alpha, x, dx, 0, a, lda, 0, beta, y, dy, 0, 1);  \
    }                                                                                              \
    int cublas##letter##dot_v2(void *handle, int n, const number *x, int dx, const number *y,      \
                               int dy, number *out) {                                              \
        return on_dot(type, n, x, dx, y, dy, out);                                                 \
    }
TYPED(S, float, FLOAT, 68)
TYPED(D, double, DOUBLE, COMPUTE_DOUBLE)

#define NOTED(name) int name(void) { on_other(#name); return 0; }
#include "noted.h"
