"""The nearest matrix of low rank: what is left of a weight, or of an update, at rank r.

Eckart & Young 1936, The approximation of one matrix by another of lower rank. For W (O, I) with
singular values s_1 >= s_2 >= ... and singular vectors u_i, v_i:

    W_r = sum_{i <= r} s_i u_i v_i^T            no matrix of rank r is nearer to W   (1)
    ||W - W_r||_F^2 = sum_{i > r} s_i^2                                               (2)

As two factors B (O, r) and A (r, I), as LoRA's, it takes r (O + I) numbers in the place of O I. So
it saves something if r < O I / (O + I), which is half of a square matrix's rank.
"""

from minilm.arrays import wide
from minilm.backend import array_module
from minilm.ranges import check, whole


def truncate(W, r: int):  # (O, I) -> (O, r), (r, I)
    """B and A, whose product is the matrix of rank r that is nearest to W (O, I).

    Each takes the root of the singular values, so that their numbers have one size. They have W's
    dtype if it is float32 or float64, and float32 otherwise. r = 0 gives empty factors; with an r
    above W's full rank there are only as many as that. ValueError if W is no finite matrix, and for
    a negative r.

    >>> import numpy as np
    >>> B, A = truncate(np.array([[3.0, 0.0], [0.0, 2.0]]), 1)
    >>> (abs(B @ A).round(9) + 0.0).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    check({"r": whole(0)}, r=r)
    xp = array_module(W)
    if W.ndim != 2 or not xp.isfinite(wide(W)).all():
        raise ValueError(f"W must be a matrix (O, I) of finite numbers, got shape {W.shape}"
                         f"{'' if W.ndim != 2 else ' with others'}")
    U, s, Vt = xp.linalg.svd(wide(W), full_matrices=False)
    root = xp.sqrt(s[:r])
    return U[:, :r] * root, root[:, None] * Vt[:r]  # eq. (1)
