"""The law of scaling fitted to losses (approach 3), and intervals for what is fitted.

With a = ln A, b = ln B and e = ln E, eq. (1) of scaling.py is

    ln L(N, D) = LSE(a - alpha ln N, b - beta ln D, e),   LSE(x) = ln sum exp x              (1)

and the constants are those with the least sum over all models i of

    Huber_delta(r_i),   r_i = LSE(...) - ln L_i,   delta = 10^-3                             (2)

Huber_delta(r) is r^2 / 2 up to |r| = delta, and delta (|r| - delta / 2) beyond. So a model whose
loss is far off counts little. L-BFGS goes down from points of a grid (Hoffmann et al. 2022,
arXiv:2203.15556, section 3.3).

The sum is small: a loss that is 0.1 % off adds 5 10^-7. An optimizer that stops when steps gain
less than 10^-8 stops much too early, and the published constants look like that (Besiroglu et al.
2024, arXiv:2404.10102). Here (2) is divided by delta^2, and ln N and ln D are counted from their
means, so that a and alpha do not pull at each other. Neither moves the minimum.

L-BFGS is scipy's (extra `scaling`).
"""

from collections.abc import Callable, Iterable
from itertools import product

import numpy as np

from minilm.extras import install
from minilm.measure.scaling import Law

DELTA = 1e-3
SLOPES = (0.0, 0.5, 1.0, 1.5, 2.0)  # the grid: alpha and beta,
HEIGHTS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # e,
SCALES = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)  # a and b


def minimizer():
    """scipy.optimize.minimize. ImportError that says how to get it."""
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise ImportError(f"fitting a law needs scipy: {install('scaling')}") from error
    return minimize


def predicted(theta, u, v):
    """(ln L of eq. (1) (n,), the share of each of its three terms in L (n, 3)).

    theta = (a, b, e, alpha, beta); u = ln N (n,), v = ln D (n,).
    """
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * u, b - beta * v, np.full_like(u, e)], axis=1)
    largest = terms.max(1, keepdims=True)
    shares = np.exp(terms - largest)
    total = shares.sum(1, keepdims=True)
    return (largest + np.log(total))[:, 0], shares / total


def objective(theta, u, v, w, delta: float = DELTA):
    """(the sum of eq. (2), divided by delta^2, its gradient (5,)). w = ln L (n,)."""
    found, shares = predicted(theta, u, v)
    r = (found - w) / delta
    near = np.abs(r) <= 1
    height = np.where(near, r * r / 2, np.abs(r) - 0.5).sum()
    slope = np.where(near, r, np.sign(r)) / delta  # dHuber / d found
    A, B, E = (slope[:, None] * shares).T
    return height, np.array([A.sum(), B.sum(), E.sum(), -(A * u).sum(), -(B * v).sum()])


def sums(thetas, u, v, w, delta: float = DELTA):
    """The sum that `objective` gives, of many thetas (G, 5): (G,)."""
    a, b, e, alpha, beta = np.asarray(thetas).T[..., None]
    r = np.logaddexp(np.logaddexp(a - alpha * u, b - beta * v), e) - w
    r = np.abs(r) / delta
    return np.where(r <= 1, r * r / 2, r - 0.5).sum(1)


def fit(N, D, L, delta: float = DELTA, starts: int | None = 20, near: Law | None = None) -> Law:
    """The law with the least sum of eq. (2) over models of N (n,), D (n,), L (n,).

    starts: L-BFGS goes down from so many points of the grid, those where the sum is least; None:
    from all 4500. near: go down from this law alone. ValueError for fewer than five models or
    numbers that are not positive; ImportError without scipy.
    """
    N, D, L = (np.asarray(x, float) for x in (N, D, L))
    if not N.shape == D.shape == L.shape or N.ndim != 1 or len(N) < 5:
        raise ValueError("a law has five constants: it needs as many N, D and L, five or more, got "
                         f"{N.shape}, {D.shape}, {L.shape}")
    if not all(((0 < x) & (x < np.inf)).all() for x in (N, D, L)):
        raise ValueError("N, D and L must be positive and finite")
    u, v, w = np.log(N), np.log(D), np.log(L)
    u0, v0 = u.mean(), v.mean()
    points = (u - u0, v - v0, w, delta)
    grid = np.array(list(product(SCALES, SCALES, HEIGHTS, SLOPES, SLOPES)) if near is None else
                    [(*np.log([near.A, near.B, near.E]), near.alpha, near.beta)])
    grid[:, :2] -= grid[:, 3:] * [u0, v0]
    order, minimize = np.argsort(sums(grid, *points), kind="stable")[:starts], minimizer()
    found = [minimize(objective, grid[i], points, method="L-BFGS-B", jac=True,
                      options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-8})
             for i in order]
    a, b, e, alpha, beta = min(found, key=lambda one: one.fun).x
    A, B, E = np.exp([a + alpha * u0, b + beta * v0, e])
    return Law(float(E), float(A), float(B), float(alpha), float(beta))


def bootstrap(fitted, values, estimate: Callable[[np.ndarray], float], constants: int,
              times: int = 200, seed: int = 0) -> np.ndarray:
    """What `estimate` gives for other values that could have been measured, (times,).

    Each set is `fitted` and residuals, values - fitted, that are drawn again with replacement
    (Efron & Tibshirani 1993, An introduction to the bootstrap, section 9.4). Residuals are smaller
    than errors, as `constants` numbers were fitted to them: for n values they are multiplied by
    sqrt(n / (n - constants)). N and D, which were chosen, stay. ValueError if n <= constants.
    """
    fitted, values = np.asarray(fitted, float), np.asarray(values, float)
    if (n := len(values)) <= constants:
        raise ValueError(f"{n} values leave no residuals if {constants} constants are fitted")
    residuals = (values - fitted) * np.sqrt(n / (n - constants))
    rng = np.random.default_rng(seed)
    return np.array([estimate(fitted + residuals[rng.integers(n, size=n)]) for _ in range(times)])


def percentiles(estimates: Iterable[float], level: float = 0.95) -> tuple[float, float]:
    """The interval with this share of the estimates; those that are NaN count as both ends.

    >>> percentiles([1.0, 2.0, 3.0, 4.0, 5.0], 0.5)
    (2.0, 4.0)
    """
    x, tail = np.asarray(list(estimates), float), (1 - level) / 2
    low, high = (np.where(np.isnan(x), end, x) for end in (-np.inf, np.inf))
    return (float(np.quantile(low, tail, method="lower")),
            float(np.quantile(high, 1 - tail, method="higher")))
