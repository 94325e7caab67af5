"""Bradley and Terry's strengths: who is how strong, from all games at once, in no order.

Bradley & Terry 1952, Rank analysis of incomplete block designs: the method of paired comparisons.
Player i has a strength p_i, and wins against j with probability

    p_i / (p_i + p_j)                                                                            (1)

The likeliest strengths solve, with w_ij games that i won against j (a draw is half a game for each)
and W_i = sum_j w_ij,

    p_i = W_i / sum_{j != i} (w_ij + w_ji) / (p_i + p_j)                                         (2)

Put in on the right, the last p gives the next one on the left, and none is less likely than the one
before: the MM algorithm of Hunter 2004, MM algorithms for generalized Bradley-Terry models, section
3. The strengths are known up to a common factor; here the mean of log p is 0. As ratings,

    R = 400 log10(p) + 1000                                                                      (3)

makes (1) the expectation of Elo's formula. The solution is finite only if, however the players are
split into two groups, somebody of each wins or draws against somebody of the other (Hunter's
assumption 1). A player that lost all its games has no strength above 0. `drawn` games between any
two players, which are added as draws, make every solution finite and move the ratings a little
towards 1000.

The interval is of the bootstrap over prompts (text/bootstrap.py): what other questions of the same
kind would have given. All games about a prompt are drawn together, since they share its answers.
"""

import numpy as np

from minilm.measure.elo import Games, checked
from minilm.ranges import AT_LEAST_0, check, whole

ROUNDS, ENOUGH = 100_000, 1e-10  # of (2) at most; the largest change of log p that ends them


def wins_by_prompt(games: Games, players: int) -> np.ndarray:
    """w, (P, N, N): what i won against j about each prompt."""
    a, b, S, prompt = checked(games, players)
    w = np.zeros((prompt.max(initial=-1) + 1, players, players))
    np.add.at(w, (prompt, a, b), S)
    np.add.at(w, (prompt, b, a), 1 - S)
    return w


def strengths(w, drawn: float = 0.0) -> np.ndarray:
    """p of eq. (2), (..., N), for w (..., N, N). The mean of log p is 0.

    ValueError for games that have no finite solution, and for what cannot be numbers of games.

    >>> strengths([[0, 3], [1, 0]]).round(6).tolist()  # p_1 / p_2 is 3
    [1.732051, 0.57735]
    """
    w = _with_draws(w, drawn)
    W, n = w.sum(axis=-1), w + w.swapaxes(-1, -2)  # (..., N), (..., N, N)
    p = np.ones(W.shape)
    for _ in range(ROUNDS):
        new = W / (n / (p[..., :, None] + p[..., None, :])).sum(axis=-1)  # eq. (2)
        new /= np.exp(np.log(new).mean(axis=-1, keepdims=True))
        change, p = np.abs(np.log(new / p)).max(initial=0.0), new
        if change < ENOUGH:
            return p
    raise ValueError(f"the strengths still change by {change:.1e} after {ROUNDS:,} rounds: the "
                     "players are too far apart; add draws with `drawn`")


def ratings(w, drawn: float = 0.0) -> np.ndarray:
    """Eq. (3), (..., N), with a mean of 1000."""
    return 400 * np.log10(strengths(w, drawn)) + 1000  # eq. (3)


def bootstrap(w, drawn: float = 0.0, draws: int = 1000, seed: int = 0
              ) -> tuple[np.ndarray, np.ndarray]:
    """The ends (low, high) of the 95 % intervals of the ratings, (N,) each, over prompts.

    w: (P, N, N), of wins_by_prompt. ValueError without a prompt, and if what was drawn has no
    finite solution.
    """
    check({"draws": whole(1), "seed": whole(0)}, draws=draws, seed=seed)
    w = np.asarray(w, np.float64)
    if w.ndim != 3 or not len(w):
        raise ValueError(f"w must have games for each of one prompt or more, got shape {w.shape}")
    P, N, _ = w.shape
    times = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), draws)  # (draws, P)
    found = ratings((times @ w.reshape(P, N * N)).reshape(draws, N, N), drawn)
    low, high = np.quantile(found, (0.025, 0.975), axis=0)
    return low, high


def _with_draws(w, drawn: float) -> np.ndarray:
    """w with nobody against itself and with the draws."""
    check({"drawn": AT_LEAST_0}, drawn=drawn)
    w = np.asarray(w, np.float64)
    if w.ndim < 2 or w.shape[-1] != w.shape[-2] or w.shape[-1] < 2:
        raise ValueError(f"w must be (..., N, N) for N >= 2 players, got shape {w.shape}")
    if not (np.isfinite(w).all() and (w >= 0).all()):
        raise ValueError(f"w must be numbers of games, got {w.min()} to {w.max()}")
    w = (w + drawn / 2) * (1 - np.eye(w.shape[-1]))
    if not _connected(w).all():
        raise ValueError("some players never won or drew against the others, so no finite "
                         "strengths fit: add draws with `drawn`")
    return w


def _connected(w: np.ndarray) -> np.ndarray:
    """(...): does a chain of wins lead from everybody to everybody else?"""
    N = w.shape[-1]
    reached = (w > 0) | np.eye(N, dtype=bool)  # in one step
    for _ in range(int(np.ceil(np.log2(N)))):
        reached = (reached.astype(np.float32) @ reached.astype(np.float32)) > 0  # in twice as many
    return reached.all(axis=(-1, -2))
