"""Elo, Bradley-Terry and a judge with a liking: by hand, beside choix, and made tournaments."""

from itertools import combinations, permutations

import numpy as np
import pytest
import tournament as experiment
from hypothesis import assume, given
from hypothesis import strategies as st

from minilm.data import Record
from minilm.measure import bradley_terry, elo, judge
from minilm.measure.elo import Games
from minilm.results import Result

ratings = st.floats(-3000, 3000)
seeds = st.integers(0, 2**32)


def random_games(seed: int, players: int, count: int) -> Games:
    """Games of random pairs with random ends, about 7 prompts."""
    rng = np.random.default_rng(seed)
    pairs = rng.permuted(np.tile(np.arange(players), (count, 1)), axis=1)[:, :2]
    return Games(*pairs.T, rng.choice([0, 0.5, 1], count), rng.integers(7, size=count))


def of_strengths(p, prompts: int, rng) -> Games:
    """Everybody meets everybody twice about each prompt, and wins as eq. (1) says."""
    pairs = np.array([*combinations(range(len(p)), 2)] * 2 * prompts)
    prompt = np.repeat(np.arange(prompts), len(pairs) // prompts)
    a, b = pairs.T
    return Games(a, b, (rng.random(len(a)) < p[a] / (p[a] + p[b])).astype(float), prompt)


def true_ratings(p) -> np.ndarray:
    return 400 * (np.log10(p) - np.log10(p).mean()) + 1000


# Elo


def test_elo_by_hand():
    """A with 1400 is expected to win 10 of 11 games; a loss takes 32 * 10 / 11."""
    assert abs(elo.expected(1400, 1000) - 10 / 11) < 1e-15
    a, b = elo.update(1400.0, 1000.0, 0)
    assert abs(a - (1400 - 320 / 11)) < 1e-12 and abs(b - (1000 + 320 / 11)) < 1e-12
    R = elo.ratings(Games([0, 2], [1, 0], [1, 0.5], [0, 1]), 3)
    change = 32 * (0.5 - 1 / (1 + 10 ** (16 / 400)))
    assert np.allclose(R, [1016 - change, 984, 1000 + change], atol=1e-12)


@given(ratings)
def test_a_draw_between_equals_changes_nothing(R):
    assert elo.update(R, R, 0.5) == (R, R)


@given(ratings, ratings, st.floats(0, 1))
def test_what_one_wins_the_other_loses(A, B, S):
    """And the better result is never the worse one."""
    a, b = elo.update(A, B, S)
    assert abs(a + b - A - B) < 1e-9 and abs(a - A) <= elo.K
    assert elo.update(B, A, 1 - S) == pytest.approx((b, a), abs=1e-9)
    assert a <= elo.update(A, B, 1)[0] and a >= elo.update(A, B, 0)[0]


@given(seeds, st.integers(2, 5), st.integers(0, 30), st.data())
def test_the_sum_stays_and_names_do_not_matter(seed, players, count, data):
    games, new = random_games(seed, players, count), np.array(
        data.draw(st.permutations(range(players))))
    R = elo.ratings(games, players)
    assert abs(R.sum() - players * elo.START) < 1e-8
    renamed = elo.ratings(games._replace(a=new[games.a], b=new[games.b]), players)
    assert np.array_equal(renamed[new], R)
    turned = Games(games.b, games.a, 1 - games.S, games.prompt)
    assert np.allclose(elo.ratings(turned, players), R, atol=1e-9)
    of_orders, again = (elo.over_orders(g, players, 9) for g in (
        games, games._replace(a=new[games.a], b=new[games.b])))
    assert abs(of_orders.mean.sum() - players * elo.START) < 1e-8
    assert all(np.array_equal(x[new], y) for x, y in zip(again, of_orders))


@given(seeds, st.integers(2, 4), st.integers(1, 4))
def test_every_order_is_played_and_each_as_often(seed, players, count):
    """The ratings are those of the plain loop in all orders; their mean is that of all orders."""
    games, every = random_games(seed, players, count), []
    for order in permutations(range(count)):
        every.append(elo.ratings(Games(*(x[[*order]] for x in games)), players))
    every = np.array(every)
    R = elo.over_orders(games, players, 3000, seed=1)
    assert np.allclose([R.low.min(), R.high.max()], [every.min(), every.max()], atol=1e-9)
    assert (np.abs(R.mean - every.mean(0)) <= 5 * every.std(0) / np.sqrt(3000) + 1e-9).all()


def test_orders_come_in_chunks(monkeypatch):
    games = random_games(0, 4, 30)
    whole = elo.over_orders(games, 4, 300)
    monkeypatch.setattr(elo, "CHUNK", 70)
    parts = elo.over_orders(games, 4, 300)
    assert np.array_equal(np.array(whole), np.array(parts))
    assert not np.array_equal(whole.mean, elo.over_orders(games, 4, 300, seed=1).mean)


@given(seeds, st.integers(3, 5), st.integers(1, 3))
def test_who_beats_all_is_at_the_top(seed, players, rounds):
    """Of all: in the mean of the orders, and in Bradley and Terry's strengths."""
    rng = np.random.default_rng(seed)
    a, b = np.array([*combinations(range(players), 2)] * rounds).T
    S = np.where(a == 0, 1.0, rng.choice([0, 0.5, 1], len(a)))
    games = Games(a, b, S, np.zeros_like(a))
    assert elo.over_orders(games, players, 300).mean.argmax() == 0
    w = bradley_terry.wins_by_prompt(games, players).sum(0)
    assert bradley_terry.strengths(w, drawn=1).argmax() == 0


# Bradley-Terry


def random_wins(seed: int, players: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 12, (players, players)) / 2 * (1 - np.eye(players))


@given(seeds, st.integers(2, 6), st.sampled_from([0.0, 0.2, 3.0]))
def test_bradley_terry_is_choixs(seed, players, drawn):
    choix = pytest.importorskip("choix")
    w = random_wins(seed, players)
    added = w + drawn / 2 * (1 - np.eye(players))
    assume(bradley_terry._connected(added))
    theirs = choix.ilsr_pairwise_dense(added, max_iter=10_000, tol=1e-12)
    ours = np.log(bradley_terry.strengths(w, drawn))
    assert np.abs(ours - (theirs - theirs.mean())).max() < 1e-6


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_of_two_players_the_strengths_are_as_the_wins(n, m):
    R = bradley_terry.ratings([[0, n], [m, 0]])
    assert abs(R[0] - R[1] - 400 * np.log10(n / m)) < 1e-6 and abs(R.mean() - 1000) < 1e-9


@given(seeds, st.integers(2, 5), st.sampled_from([2.0, 10.0]), st.data())
def test_names_units_and_batches_do_not_matter(seed, players, times, data):
    w = np.array([random_wins(seed + i, players) for i in range(3)])
    p = bradley_terry.strengths(w, 0.5)
    new = np.array(data.draw(st.permutations(range(players))))
    renamed = bradley_terry.strengths(w[:, new][:, :, new], 0.5)
    assert np.allclose(np.log(renamed), np.log(p[:, new]), atol=1e-7)
    assert np.allclose(np.log(bradley_terry.strengths(times * w, times / 2)), np.log(p), atol=1e-7)
    for one, of_one in zip(w, p):
        assert np.allclose(np.log(bradley_terry.strengths(one, 0.5)), np.log(of_one), atol=1e-7)
    n = (w + w.swapaxes(1, 2) + 0.5) * (1 - np.eye(players))  # games, draws included
    expected = (n * p[:, :, None] / (p[:, :, None] + p[:, None])).sum(-1)
    won = w.sum(-1) + 0.25 * (players - 1)
    assert np.allclose(expected, won, atol=1e-6)  # eq. (2): each has won what was expected


def test_wins_are_counted_by_prompt():
    w = bradley_terry.wins_by_prompt(Games([0, 1, 2], [1, 0, 1], [1, 0.5, 0], [0, 0, 2]), 3)
    assert w[0].tolist() == [[0, 1.5, 0], [0.5, 0, 0], [0, 0, 0]]
    assert not w[1].any() and w[2, 1, 2] == 1 and w.sum() == 3


def test_players_of_known_strength_lie_in_their_intervals():
    """In 95 of 100 of 200 made tournaments. The orders' intervals are of something else: they are
    so wide that they hold nearly all."""
    rng, p = np.random.default_rng(0), 10 ** (np.array([-150, -20, 30, 140]) / 400)
    true, held, orders = true_ratings(p), [], []
    for i in range(200):
        games = of_strengths(p, 40, rng)
        w = bradley_terry.wins_by_prompt(games, 4)
        low, high = bradley_terry.bootstrap(w, draws=200, seed=i)
        held.append((low < true) & (true < high))
        if i < 10:
            R = elo.over_orders(games, 4, 200)
            orders.append((R.low < true) & (true < R.high))
    assert abs(np.mean(held) - 0.95) < 0.025  # 800 of them; a standard error is .008
    assert np.mean(orders) == 1


def test_an_interval_of_one_draw_has_no_width():
    low, high = bradley_terry.bootstrap(np.full((3, 2, 2), 2.0), draws=1)
    assert np.array_equal(low, high) and np.allclose(low, 1000)


def test_more_prompts_narrow_the_bootstrap_and_not_the_orders():
    rng, p = np.random.default_rng(1), np.array([1.0, 1.5, 2.0])
    by_prompts, by_orders = [], []
    for prompts in (50, 200):
        games = of_strengths(p, prompts, rng)
        low, high = bradley_terry.bootstrap(bradley_terry.wins_by_prompt(games, 3))
        R = elo.over_orders(games, 3, 1000)
        by_prompts.append((high - low).mean())
        by_orders.append((R.high - R.low).mean())
    assert abs(by_prompts[0] / by_prompts[1] - 2) < 0.25
    assert abs(by_orders[0] / by_orders[1] - 1) < 0.1


# the judge


words = st.text("abcd", max_size=5)


@given(words.filter(bool), words, st.lists(words.filter(bool), max_size=2))
def test_only_a_right_answer_gets_ten_points(right, answer, others):
    record = Record("Do", "it", right, tuple(others))
    found = judge.points(record, answer)
    assert (found == 10) == (answer in (right, *others)) and 1 <= found <= 10
    assert judge.points(Record("Do", "it", right), answer) <= found
    assert all(judge.points(record, text) == 10 for text in (right, *others))
    assert judge.points(Record("Do", "it", right), "XYZ") == 1


bonuses = st.integers(0, 20).map(lambda n: n / 4)  # points; a tiny one is lost in rounding
points = st.lists(st.floats(1, 10), min_size=2, max_size=12)


@given(st.data(), bonuses)
def test_over_both_orders_the_bonus_cancels(data, bonus):
    """It can make a draw of a difference that is less than it, but never a winner."""
    P = data.draw(st.integers(2, 6))
    x = np.array(data.draw(st.lists(st.lists(
        st.floats(1, 10), min_size=P, max_size=P), min_size=2, max_size=4)))
    games, N = judge.tournament(x, bonus), len(x)
    assert len(games.S) == N * (N - 1) * P
    w, plain = (bradley_terry.wins_by_prompt(g, N) for g in (games, judge.tournament(x)))
    assert np.all(w + w.swapaxes(1, 2) == 2 * (1 - np.eye(N)))
    ahead, was = np.sign(w - w.swapaxes(1, 2)), np.sign(plain - plain.swapaxes(1, 2))
    assert np.all((ahead == was) | (ahead == 0))
    far = np.abs(x[:, None] - x[None]).transpose(2, 0, 1) > bonus + 1e-9
    assert np.all(ahead[far] == was[far])
    equal = judge.tournament(np.ones((N, P)), bonus)
    assert np.all(equal.S == (1 if bonus else 0.5))
    sums = bradley_terry.wins_by_prompt(equal, N)
    assert np.all(sums == 1 - np.eye(N)) and np.all(elo.over_orders(equal, N, 9).low <= 1000)


def test_a_player_that_is_always_read_first():
    x = np.array([[5.0, 5], [5, 9], [5, 1]])
    games = judge.tournament(x, 1.0, first=1)
    assert sorted({(int(a), int(b)) for a, b in zip(games.a, games.b)}) == [
        (0, 2), (1, 0), (1, 2), (2, 0)]
    one = bradley_terry.ratings(bradley_terry.wins_by_prompt(games, 3).sum(0), 1)
    both = bradley_terry.ratings(
        bradley_terry.wins_by_prompt(judge.tournament(x, 1.0), 3).sum(0), 1)
    assert one[1] > both[1]


def test_shares_by_hand():
    """x = 2, 4 and y = 4, 4, bonus 1: 6/10, 8/8, and 6/8 without."""
    found = judge.shares([2, 4], [4, 4], bonus=1)
    assert (found.reference_first.value, found.system_first.value) == pytest.approx((0.6, 1.0))
    assert (found.mean.value, found.unbiased.value) == pytest.approx((0.8, 0.75))
    half = 12.706 * np.std([0.5, 1.0], ddof=1) / np.sqrt(2)  # y is the same for both
    assert found.unbiased.high - 0.75 == pytest.approx(half)


@given(st.data(), bonuses)
def test_both_orders_tell_the_bonus(data, bonus):
    """Eqs. (3) and (4)."""
    x = data.draw(points)
    y = data.draw(st.lists(st.floats(1, 10), min_size=len(x), max_size=len(x)))
    found = judge.shares(x, y, bonus)
    r_1, r_2, r, beta = (found.reference_first.value, found.system_first.value,
                         found.unbiased.value, bonus * len(y) / sum(y))
    assert judge.without_bonus(r_1, r_2) == pytest.approx(r, abs=1e-12)
    assert r_2 - r == pytest.approx(beta, abs=1e-12)  # one order moves it by the bonus
    assert found.mean.value - r == pytest.approx(beta / 2 * (1 - r / (1 + beta)), abs=1e-12)
    for share in found:
        assert share.low - 1e-9 <= share.value <= share.high + 1e-9


def test_a_share_lies_in_its_interval_in_95_of_100():
    rng, held = np.random.default_rng(0), []
    for _ in range(500):
        y = rng.uniform(1, 10, 80)
        x = np.clip(0.7 * y + rng.normal(0, 1.5, 80), 0, None)
        share = judge.shares(x, y).unbiased
        held.append(share.low < TRUE < share.high)
    assert abs(np.mean(held) - 0.95) < 0.025


Y = np.random.default_rng(1).uniform(1, 10, 400_000)  # of far more prompts
TRUE = np.clip(0.7 * Y + np.random.default_rng(2).normal(0, 1.5, len(Y)), 0, None).sum() / Y.sum()


# errors and the experiment


@pytest.mark.parametrize("call, said", [
    (lambda: elo.ratings(Games([0], [0], [1], [0]), 2), "player 0 cannot play against itself"),
    (lambda: elo.ratings(Games([0], [2], [1], [0]), 2), "b must be players from 0 to 1, got 2 to"),
    (lambda: elo.ratings(Games([0], [1], [1], [-1]), 2), "prompt must be from 0 up, got -1"),
    (lambda: elo.ratings(Games([0], [1], [2], [0]), 2), "S must be from 0 to 1, got 2.0 to 2.0"),
    (lambda: elo.ratings(Games([0, 1], [1, 0], [1], [0]), 2), r"one number a game.*\(2,\)"),
    (lambda: elo.over_orders(Games([], [], [], []), 2, 0), "orders must be at least 1, got 0"),
    (lambda: bradley_terry.strengths([[0, 3], [0, 0]]), "add draws with `drawn`"),
    (lambda: bradley_terry.strengths([[0, -1], [1, 0]]), "numbers of games, got -1.0 to 1.0"),
    (lambda: bradley_terry.strengths([1, 2]), r"w must be \(..., N, N\).*got shape \(2,\)"),
    (lambda: bradley_terry.strengths(np.eye(2), -1), "drawn must be finite and at least 0, got -1"),
    (lambda: bradley_terry.bootstrap(np.ones((2, 2))), r"prompt or more, got shape \(2, 2\)"),
    (lambda: bradley_terry.bootstrap(np.ones((1, 2, 2)), draws=0), "draws must be at least 1"),
    (lambda: judge.tournament([[1, 2]]), r"two players or more, got shape \(1, 2\)"),
    (lambda: judge.shares([1, 2], [0, 0]), "the reference has no point"),
    (lambda: judge.shares([1], [1]), r"two prompts or more, got shapes \(1,\) and \(1,\)"),
])
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("width, apart", [(0.4, 1.0), (2.0, 0.0)])
def test_pairs_of_players_that_elo_places_otherwise(width, apart):
    """Players 1 and 2, whose intervals lie apart if they are narrow."""
    low, high = experiment.ENDS[experiment.BT]
    placed = zip(experiment.ARMS, range(6), [0, 2, 1, 3, 4, 5])
    rows = [{"arm": arm, "seed": 0, experiment.RIGHT: right, experiment.ELO: R, low: R - width,
             high: R + width} for arm, right, R in placed]
    assert experiment.out_of_order(rows) == [1.0]
    assert experiment.out_of_order(rows, apart=True) == [apart]


def test_a_tournament_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """The players of a seed are trained again, with the same numbers."""
    played, calls = experiment.played, []

    def stopped(s, run):
        calls.append(s.player)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return played(s, run)

    monkeypatch.setattr(experiment, "played", stopped)
    with pytest.raises(KeyboardInterrupt):
        experiment.main(seeds=(0,), quick=True, out=tmp_path)
    experiment.FIELDS.clear()  # as in another process
    experiment.ANSWERED.clear()
    experiment.main(seeds=(0,), quick=True, resume=tmp_path / "tournament-1")
    experiment.FIELDS.clear()
    experiment.main(seeds=(0,), quick=True, out=tmp_path)
    first, second = (Result.load(tmp_path / f"tournament-{i}" / "result.json") for i in (1, 2))
    assert first.rows == second.rows and first.arms == list(experiment.ARMS)
    assert len(experiment.ANSWERED) == len(experiment.ARMS)
