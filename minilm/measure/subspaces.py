"""The directions in which matrices act: how many two of them share, how much an update amplifies.

Hu et al. 2021, arXiv:2106.09685, section 7. Let U_A^i hold the first i right singular vectors of
A (r, I) as columns, those of the largest singular values. The similarity of the subspaces that
they span (section 7.2) is

    phi(A, A', i, j) = ||(U_A^i)^T U_A'^j||_F^2 / min(i, j)                              (4)

0: the subspaces are orthogonal; 1: one holds the other. Random subspaces of R^I have the mean
max(i, j) / I.

Let U (O, r) and V (I, r) be the first r left and right singular vectors of an update dW (O, I) of
rank r. W has ||U^T W V||_F along them, and the amplification factor (section 7.3, table 7) is

    ||dW||_F / ||U^T W V||_F

Here dW may have a higher rank than r. Then its part along these directions, ||U^T dW V||_F, stands
for ||dW||_F. Everything is computed in float64.
"""

import numpy as np

from minilm.ranges import check, whole


def directions(A, i: int) -> np.ndarray:
    """The first i right singular vectors of A (r, I), as columns: (I, i).

    ValueError if A has fewer than i rows or columns, or is no finite matrix.
    """
    return singular(A, i)[2]


def singular(A, i: int):
    """(U (O, i), S (i,), V (I, i)): the first i singular values of A (O, I) and their vectors."""
    A = np.asarray(A, np.float64)
    if A.ndim != 2 or not np.isfinite(A).all():
        raise ValueError(f"expected a matrix of finite numbers, got the shape {A.shape}")
    check({"i": whole(1, min(A.shape))}, i=i)
    U, S, Vt = np.linalg.svd(A, full_matrices=False)
    return U[:, :i], S[:i], Vt[:i].T


def overlap(U, V) -> float:
    """||U^T V||_F^2 / min(i, j) of orthonormal columns U (I, i) and V (I, j): from 0 to 1."""
    return float(((U.T @ V) ** 2).sum() / min(U.shape[1], V.shape[1]))  # eq. (4)


def phi(A, other, i: int, j: int) -> float:
    """The similarity of the first i directions of A (r, I) and the first j of other (r', I), (4).

    ValueError as in `directions`, and if the two have rows of different lengths.

    >>> round(phi([[1.0, 0.0]], [[1.0, 1.0]], 1, 1), 9)  # 45 degrees
    0.5
    """
    U, V = directions(A, i), directions(other, j)
    if len(U) != len(V):
        raise ValueError(f"rows of {len(U)} and of {len(V)} numbers have no directions in common")
    return overlap(U, V)


def similarities(A, other, n: int) -> np.ndarray:
    """phi(A, other, i, j) for i, j = 1 .. n: (n, n)."""
    squares = (directions(A, n).T @ directions(other, n)) ** 2
    sizes = np.arange(1, n + 1)
    return squares.cumsum(0).cumsum(1) / np.minimum(sizes[:, None], sizes)  # eq. (4)


def along(W, update, r: int) -> float:
    """||U^T W V||_F for the first r singular vectors of update: both are (O, I)."""
    U, _, V = singular(update, r)
    if np.shape(W) != (len(U), len(V)):
        raise ValueError(f"the update is {(len(U), len(V))}, but W is {np.shape(W)}")
    return float(np.linalg.norm(U.T @ np.asarray(W, np.float64) @ V))


def amplification(update, W, r: int) -> float:
    """How much larger an update (O, I) is than W (O, I) along the update's first r directions.

    It is 1 if the update is W, or the best approximation of W by a matrix of rank r. ValueError if
    W has nothing along these directions.
    """
    there = along(W, update, r)
    if not there:
        raise ValueError(f"W has nothing along the first {r} directions of the update")
    return along(update, update, r) / there
