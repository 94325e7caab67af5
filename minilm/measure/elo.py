"""Elo's ratings: who is how strong, from games between two players at a time.

Elo 1978, The rating of chessplayers, past and present. With models as players, and a judge that
says which of two answers is better: QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 5 and
table 7. Everybody begins with 1000. After each game of A and B

    E_A = 1 / (1 + 10^((R_B - R_A) / 400))                                                       (1)
    R_A <- R_A + K (S_A - E_A),   R_B <- R_B + K (S_B - E_B)                                     (2)

    R           rating                          S_A         1 if A won, 0.5 for a draw, 0
    E_A         what is expected of A           S_B, E_B    1 - S_A, 1 - E_A
    K           32: how much a game counts

So the sum of the ratings stays. The last games count most, hence the same games in another order
give other ratings. QLoRA takes 10,000 random orders. Here are their mean, and what the middle 95 of
100 of them lie between. That interval says what the *same* games might have given. Other questions
to the players are not in it, and more games make it no narrower, as K stays. For these see
bradley_terry.py, which knows no order. (The interval of the *mean* of 10,000 orders is a hundred
times narrower, and says nothing about the players.)
"""

from typing import NamedTuple

import numpy as np

from minilm.ranges import check, whole

K, START = 32.0, 1000.0
CHUNK = 1000  # orders at a time: their ratings and orders fit into a cache


class Games(NamedTuple):
    """G games."""

    a: np.ndarray  # (G,) a player, from 0
    b: np.ndarray  # (G,) the other one
    S: np.ndarray  # (G,) S_A
    prompt: np.ndarray  # (G,) the question that it was about, from 0


class Ratings(NamedTuple):
    """Ratings over the orders of the games, (N,) each."""

    mean: np.ndarray
    low: np.ndarray  # 2.5 % of the orders give less
    high: np.ndarray  # 2.5 % give more


def expected(R_A, R_B):
    """Eq. (1): the share of the games that A is expected to win.

    >>> round(expected(1400, 1000), 4)
    0.9091
    """
    return 1 / (1 + 10 ** ((R_B - R_A) / 400))  # eq. (1)


def update(R_A, R_B, S_A):
    """Eq. (2): the ratings after a game.

    >>> update(1000.0, 1000.0, 1)
    (1016.0, 984.0)
    """
    change = K * (S_A - expected(R_A, R_B))
    return R_A + change, R_B - change  # eq. (2)


def ratings(games: Games, players: int) -> np.ndarray:
    """The ratings (N,) after the games in the order that they have."""
    R = np.full(players, START)
    for a, b, S in zip(*checked(games, players)[:3]):
        R[a], R[b] = update(R[a], R[b], S)
    return R


def over_orders(games: Games, players: int, orders: int = 10_000, seed: int = 0) -> Ratings:
    """The same over random orders, each as likely as any other.

    All orders of a chunk play their first game at once, then their second, and so on: 10,000
    orders of 3,000 games take about three seconds. ValueError for games that nobody can play.
    """
    check({"orders": whole(1), "seed": whole(0)}, orders=orders, seed=seed)
    games, rng = checked(games, players), np.random.default_rng(seed)
    found = np.concatenate([_chunk(games, players, min(CHUNK, orders - done), rng)
                            for done in range(0, orders, CHUNK)])
    low, high = np.quantile(found, (0.025, 0.975), axis=0)
    return Ratings(found.mean(axis=0), low, high)


def _chunk(games: Games, players: int, orders: int, rng) -> np.ndarray:
    """(orders, N)"""
    count, row = len(games.S), players * np.arange(orders)  # where each order's ratings begin
    order = rng.permuted(np.tile(np.arange(count), (orders, 1)), axis=1).T  # (G, orders)
    R = np.full(orders * players, START)
    for game in order:
        a, b = row + games.a[game], row + games.b[game]
        R[a], R[b] = update(R[a], R[b], games.S[game])
    return R.reshape(orders, players)


def checked(games: Games, players: int) -> Games:
    """The games as arrays. ValueError unless two different players play each and share a point."""
    a, b, prompt = (np.asarray(x, np.int64) for x in (games.a, games.b, games.prompt))
    S = np.asarray(games.S, np.float64)
    if not a.shape == b.shape == S.shape == prompt.shape == (a.size,):
        raise ValueError("a, b, S and prompt must have one number a game, got the shapes "
                         f"{a.shape}, {b.shape}, {S.shape} and {prompt.shape}")
    for name, x in (("a", a), ("b", b)):
        if x.size and not (0 <= x.min() and x.max() < players):
            raise ValueError(f"{name} must be players from 0 to {players - 1}, "
                             f"got {x.min()} to {x.max()}")
    if prompt.min(initial=0) < 0:
        raise ValueError(f"prompt must be from 0 up, got {prompt.min()}")
    if (a == b).any():
        raise ValueError(f"player {a[a == b][0]} cannot play against itself")
    if not ((S >= 0) & (S <= 1)).all():
        raise ValueError(f"S must be from 0 to 1, got {S.min()} to {S.max()}")
    return Games(a, b, S, prompt)
