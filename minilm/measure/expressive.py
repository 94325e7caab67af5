"""What rank is enough: adapters in closed form that turn frozen layers into other ones.

Zeng & Lee 2023, arXiv:2310.17513, The Expressive Power of Low-Rank Adaptation. For frozen weights
W_1 .. W_L and a target W, all (D, D), let

    E = W - W_L .. W_1 = U S V^T

and V_l be the columns R (l - 1) + 1 .. R l of V, the right singular vectors. The adapters

    B_l = (W_L .. W_{l+1})^-1 E V_l        A_l = V_l^T ((W_{l-1} + B_{l-1} A_{l-1}) .. )^-1    (*)

have rank R, and W_l + B_l A_l have the product W_L .. W_1 + E V_1 V_1^T + .. + E V_L V_L^T. So the
product's error in the 2-norm is sigma_{R L + 1}(E), the next singular value, and 0 from R >= D / L
on (lemma 1). Adapters of rank R change a product by a matrix of rank R L or less, so no others do
better, in the 2-norm and in Frobenius' alike (Eckart & Young 1936). With L = 1 this is the best
approximation of W - W_1 by B A.

ReLU nets, x -> ReLU(W_l x + b_l) in each layer (theorem 3): a target of Lt layers of the same width
is reached exactly, on a bounded set of inputs, if

    R >= D / floor(L / Lt),    the abstract's (width of f) (depth of target) / (depth of f)

Then floor(L / Lt) frozen layers, or more at the end, make one layer of the target: biases keep all
their ReLUs but the last one open, and what is open is linear. The biases are trained, too.

The conditions are that W_l and W_L .. W_1 + (best approximation of E of rank r), r <= R (L - 1),
are invertible, which random matrices are. Enough does not mean needed: for nets it is an upper
bound.

Transformers, by the same abstract: a target of the same size is reached at rank D / 2. Its heads
have W_q, W_k, W_v, W_o of (D, D) each, and there are no residual branches and no norms. Then
attention knows only W_k^T W_q and W_o W_v, which are products with L = 2. The models of this
package have heads of D / H, residual branches and norms, so this theorem says nothing about them.

The numbering (*) is ours. Everything is float64.
"""

import math
from functools import reduce

import numpy as np

from minilm.ranges import check, whole


def product(Ws, D: int | None = None) -> np.ndarray:
    """W_L .. W_1 of [W_1, .., W_L], each (D, D); the identity of size D if there is none."""
    return reduce(lambda below, W: W @ below, Ws, np.eye(D or len(Ws[0])))


def adapted(Ws, adapters) -> list[np.ndarray]:
    """[W_l + B_l A_l]."""
    return [W + B @ A for W, (B, A) in zip(Ws, adapters, strict=True)]


def closed_form(Ws, W, R: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(B_l (D, R), A_l (R, D)) for each of Ws, so that the adapted product is as near W as can be.

    Ws: [W_1, .., W_L], frozen, and W, the target: all (D, D). The last adapters have a smaller rank
    if R L > D. ValueError for other shapes, R below 1, and if a matrix that must be invertible is
    not.
    """
    Ws, W = [np.asarray(w, np.float64) for w in Ws], np.asarray(W, np.float64)
    D = len(W)
    if not Ws or any(w.shape != (D, D) for w in (*Ws, W)):
        raise ValueError(f"frozen and target weights must be square and of one size, got "
                         f"{[w.shape for w in Ws]} and {W.shape}")
    check({"R": whole(1)}, R=R)
    E = W - product(Ws)
    V = np.linalg.svd(E)[2].T
    below, adapters = np.eye(D), []
    for i, w in enumerate(Ws):
        V_l = V[:, R * i : R * (i + 1)]  # (D, R)
        B = solved(product(Ws[i + 1 :], D), E @ V_l)
        A = solved(below.T, V_l).T  # eq. (*)
        below = (w + B @ A) @ below
        adapters.append((B, A))
    return adapters


def solved(M, Y):
    """M^-1 Y. ValueError if M is singular, or so nearly that float64 cannot tell."""
    if np.linalg.cond(M) > 1e12:
        raise ValueError("the frozen layers, or the adapted ones, have a singular product: the "
                         "theorem does not cover them")
    return np.linalg.solve(M, Y)


def relu_net(Ws, bs, x) -> np.ndarray:
    """x (D,) or (D, N), through layers ReLU(W_l x + b_l)."""
    for W, b in zip(Ws, bs, strict=True):
        x = np.maximum(W @ x + b.reshape(-1, *[1] * (np.ndim(x) - 1)), 0)
    return x


def closed_form_of_nets(Ws, targets, R: int, radius: float):
    """(adapters, biases) that make the frozen layers compute a smaller ReLU net.

    Ws: L frozen weights (D, D). targets: Lt pairs of a weight (D, D) and a bias (D,). The adapted
    net is the target for all |x| <= radius if R >= least_rank(D, L, Lt); for smaller R its layers
    are as near as products can be. ValueError as in closed_form, and if Lt > L.
    """
    share = len(Ws) // len(targets)
    if not share:
        raise ValueError(f"{len(Ws)} layers cannot be {len(targets)}: a target must be no deeper")
    adapters, biases = [], []
    for i, (W, b) in enumerate(targets):
        last = i == len(targets) - 1
        part = Ws[share * i : None if last else share * (i + 1)]
        found = closed_form(part, W, R)
        so_far, shift = np.eye(len(W)), np.zeros(len(W))
        for w in (layers := adapted(part, found))[:-1]:
            so_far = w @ so_far
            open_ = np.full(len(W), radius * np.linalg.norm(so_far, axis=1).max())
            biases.append(open_ - w @ shift)  # so the layer gives so_far x + open_, which is >= 0
            shift = open_
        biases.append(b - layers[-1] @ shift)
        adapters += found
        radius = radius * np.linalg.norm(layers[-1] @ so_far, 2) + np.linalg.norm(b)
    return adapters, biases


def least_rank(width: int, depth: int, target_depth: int) -> int:
    """The rank that is enough for a ReLU net of this width and depth to become any target of the
    same width and target_depth: width x target_depth / depth, if that is whole.

    >>> least_rank(16, 4, 1), least_rank(16, 4, 2), least_rank(16, 4, 4)
    (4, 8, 16)
    """
    check({"width": whole(1), "depth": whole(1), "target_depth": whole(1, depth)},
          width=width, depth=depth, target_depth=target_depth)
    return math.ceil(width / (depth // target_depth))


def independent_columns(M, tolerance: float = 1e-9) -> list[int]:
    """The columns of M (O, I) that no combination of those before them gives: rank many.

    By Gram and Schmidt: what is left of a column without its part along those before must be larger
    than tolerance times the largest column.
    """
    M = np.asarray(M, np.float64)
    basis, found = np.zeros((0, len(M))), []
    least = tolerance * np.linalg.norm(M, axis=0).max()
    for i, column in enumerate(M.T):
        rest = column - basis.T @ (basis @ column)
        rest -= basis.T @ (basis @ rest)  # once more, for what rounding has left
        if (size := np.linalg.norm(rest)) > least:
            basis, found = np.vstack([basis, rest / size]), [*found, i]
    return found
