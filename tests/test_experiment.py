"""Experiments: verdicts by interval, results as JSON and tables, runs that go on, each quickly."""

import importlib
import inspect
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import report
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from minilm import data, loop, trial
from minilm import experiment as module
from minilm.command import typed
from minilm.experiment import QUICK, Experiment, conduct
from minilm.extras import install
from minilm.files import FormatError
from minilm.interop import huggingface
from minilm.measure.verdict import (
    FAILS,
    HOLDS,
    OPEN,
    T975,
    Verdict,
    by_seed,
    compared,
    compared_best,
    difference,
    each_seed,
    interval,
    single,
    verdict,
)
from minilm.picture import draw_svg
from minilm.results import Result, number, table, verdicts
from minilm.train import Diverged
from minilm.transformer import Config, Transformer

FOLDER = Path(__file__).parents[1] / "scripts" / "experiments"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.py"))
numbers = st.integers(-1000, 1000).map(lambda n: n / 7)
differences = st.lists(numbers, min_size=2, max_size=30)


@pytest.mark.parametrize("df", range(1, len(T975) + 1))
def test_the_quantiles_are_students(df):
    """95 % of the density of t lie between them, by the trapezoidal rule in angles."""
    # With t = sqrt(df) tan(u) the density is c cos(u)^(df - 1).
    c = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    u = np.linspace(0, math.atan(T975[df - 1] / math.sqrt(df)), 10001)
    assert abs(2 * c * np.trapezoid(np.cos(u) ** (df - 1), u) - 0.95) < 6e-5  # three decimals


def test_the_interval_covers_the_mean_in_95_of_100():
    rng = np.random.default_rng(0)
    ends = [interval(list(d)) for d in rng.normal(3, 2, (4000, 3))]
    assert abs(np.mean([low < 3 < high for low, high in ends]) - 0.95) < 0.01


def test_an_interval_by_hand():
    """d = 1, 2, 3: mean 2, s = 1, t = 4.303."""
    low, high = interval([3.0, 1.0, 2.0])
    assert abs(low - (2 - 4.303 / math.sqrt(3))) < 1e-12 and abs(low + high - 4) < 1e-12


@given(differences, st.floats(1, 100))
def test_shifted_by_more_than_the_interval_a_claim_holds_or_does_not(d, more):
    low, high = interval(d)
    assert verdict([x - low + more for x in d], "d", at_least=0).verdict == HOLDS
    assert verdict([x - high - more for x in d], "d", at_least=0).verdict == FAILS
    assert verdict([x - high - more for x in d], "d", at_most=0).verdict == HOLDS
    assert verdict([x - low + more for x in d], "d", at_most=0).verdict == FAILS
    middle, width = (low + high) / 2, high - low
    centred, half = [x - middle for x in d], width / 2 + more
    assert verdict(centred, "d", -half, half).verdict == HOLDS
    if width > 1:  # the border lies inside the interval
        assert verdict(centred, "d", at_least=0).verdict == OPEN


@given(st.data(), differences, st.sampled_from([{"at_least": -3}, {"at_most": 2.5}]))
def test_the_order_of_the_seeds_does_not_matter(data, d, bounds):
    rows = [{"arm": arm, "seed": seed, "x": x if arm == "a" else 7.0}
            for seed, x in enumerate(d) for arm in "ab"]
    shuffled = data.draw(st.permutations(rows))
    assert compared(rows, "x", "a", "b", **bounds) == compared(shuffled, "x", "a", "b", **bounds)
    assert verdict(d, "d", **bounds) == verdict(data.draw(st.permutations(d)), "d", **bounds)


@given(differences, st.sampled_from([0.25, 2.0, 1024.0]), numbers)
def test_other_units_give_the_same_verdict(d, scale, bound):
    scaled = verdict([scale * x for x in d], "d", at_least=scale * bound)
    assert scaled.verdict == verdict(d, "d", at_least=bound).verdict


def test_what_cannot_be_told():
    assert verdict([], "d", at_least=0).verdict == OPEN
    one = verdict([5.0], "d", at_least=0)
    assert (one.verdict, one.mean, one.low) == (OPEN, 5.0, None)
    for bound in ("at_least", "at_most"):
        assert verdict([0.0, 0.0], "d", **{bound: 0}).verdict == OPEN  # neither less nor more
    with pytest.raises(ValueError, match="needs at_least, at_most or both"):
        verdict([1.0, 2.0], "d")
    with pytest.raises(ValueError, match="at least two numbers, got 1"):
        interval([1.0])


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nothing_can_be_told_of_what_is_not_finite(x, place):
    """Wherever it stands: Python's max and min see NaN in some places only."""
    d = [1.0, 2.0, 3.0]
    d[place] = x
    assert verdict(d, "d", at_least=0) == Verdict(OPEN, "d", 0, None, 3)
    assert verdict([x], "d", at_least=0) == Verdict(OPEN, "d", 0, None, 1)
    rows = [{"arm": "abc"[i], "seed": seed, "x": 0.0 if seed else d[i]}
            for seed in (0, 1) for i in range(3)]
    for best in (min, max):
        if math.isnan(x):
            assert math.isnan(each_seed(rows, lambda row: row["x"], best)[0])
            said = compared_best(rows, "x", "ab", "c", "ab - c", at_least=-9, best=best)
            assert said.verdict == OPEN and said.low is None


def test_differences_are_of_seeds_that_both_have():
    rows = [{"arm": "a", "seed": 8, "x": 5}, {"arm": "b", "seed": 1, "x": 1},
            {"arm": "b", "seed": 8, "x": 3}, {"arm": "a", "seed": 1, "x": 10},
            {"arm": "a", "seed": 2, "x": 99}]
    assert difference(rows, "x", "a", "b") == [9, 2]
    assert compared(rows, "x", "a", "b", at_least=0).about == "a - b: x"


def test_one_number_a_seed():
    """Rows of one seed are not independent; one arm has one row of each."""
    rows = [{"arm": arm, "seed": seed, "x": x} for arm, seed, x in
            [("a", 7, 1.0), ("b", 7, 4.0), ("b", 2, 3.0), ("a", 2, 6.0)]]
    assert each_seed(rows, lambda row: row["x"] + 1) == [7, 5]
    assert each_seed(rows, lambda row: row["x"], min) == [3, 1]
    assert single(rows, "x", "b", at_most=99) == verdict([3, 4], "b: x", at_most=99)
    assert single(rows, "x", "c", at_least=0).seeds == 0


def test_the_best_of_some_arms_against_the_best_of_others():
    """Each seed has its own best arms; a seed that lacks one of them does not count."""
    of = {0: (5, 3, 4, 9), 1: (1, 8, 7, 2), 2: (0, 0, 0, None)}
    rows = [{"arm": arm, "seed": seed, "x": x} for seed, numbers in of.items()
            for arm, x in zip("abcd", numbers) if x is not None]
    assert by_seed(rows, "x", "dab") == [[9, 5, 3], [2, 1, 8]]
    low = compared_best(rows, "x", "ab", "cd", "ab - cd", at_most=0)
    assert (low.seeds, low.mean, low.about) == (2, -1, "ab - cd: x")  # 3 - 4 and 1 - 2
    assert low.verdict == HOLDS
    high = compared_best(rows, "x", "ab", "cd", "ab - cd", at_least=0, best=max)
    assert (high.mean, high.verdict) == (-1.5, OPEN)  # 5 - 9 and 8 - 7
    assert compared_best(rows, "x", "ab", "e", "nobody", at_least=0).seeds == 0


# A small experiment: what it measures is a + seed / 10.

ARMS = {"low": 1.0, "high": 5.0}
CLAIMS = {"high is above low": lambda rows: compared(rows, "height, m", "high", "low", at_least=0),
          "high is near low": lambda rows: compared(rows, "height, m", "high", "low", at_most=1)}
SLIDE = {"lecture 000: towers, m": {"low": 3.0, "high": 812.25}}


def small(tmp_path, arms=ARMS, claims=CLAIMS, draw=None):
    return Experiment(str(tmp_path / "towers.py"), "Which is higher?", SLIDE, arms,
                      {"height, m": 2, "width, m": 0}, claims, draw)


def heights(arm, seed, run, calls=None):
    if calls is not None:
        calls.append((arm, seed))
    return {"height, m": {**ARMS, "new": 3.0}[arm] + seed / 10, "width, m": 12345}


def test_table_and_verdicts(tmp_path, capsys):
    options = ["--model", "a b"]
    result = conduct(small(tmp_path), heights, (0, 1), {"steps": 3}, options, out=tmp_path)
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "height, m width, m lecture 000: towers, m" in lines
    assert "low 1.05 (1.00 - 1.10) 12,345 3.0" in lines
    assert "high 5.05 (5.00 - 5.10) 12,345 812.25" in lines
    assert "high is above low: holds\n    high - low: height, m: 4, 95 % interval 4 to 4; " \
           "claimed: above 0\n" in said
    assert "high is near low: does not hold\n" in said and QUICK not in said
    assert result.command == "python scripts/experiments/towers.py --seeds 0 1 --model 'a b'"
    assert [claim["verdict"] for claim in result.claims] == [HOLDS, FAILS]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", result.date) and "cores" in result.machine
    assert Result.load(tmp_path / "towers-1" / "result.json") == result
    assert result.spread("high", "height, m") == (5.05, 5.0, 5.1)


def test_why_a_claim_may_fail_is_said_if_it_does(tmp_path, capsys):
    towers = replace(small(tmp_path), likely=dict.fromkeys(CLAIMS, "they grew"))
    result = conduct(towers, heights, (0, 1), {}, out=tmp_path)
    assert [claim.get("likely") for claim in result.claims] == [None, "they grew"]
    assert capsys.readouterr().out.count("\n    likely: they grew\n") == 1
    assert Result.load(tmp_path / "towers-1" / "result.json") == result
    quick = conduct(towers, heights, (0, 1), {}, quick=True, out=tmp_path)
    assert not any("likely" in claim for claim in quick.claims)
    wrong = vars(result) | {"claims": (result.claims[1] | {"likely": 3},)}
    Result(**wrong).save(tmp_path / "wrong.json")
    with pytest.raises(FormatError, match=r"claims\[0\]: likely is 3, expected str"):
        Result.load(tmp_path / "wrong.json")


names = st.text("abc %-,", min_size=1, max_size=30)


@given(st.dictionaries(names, st.integers(0, 3), min_size=1, max_size=9),
       st.lists(names, max_size=6), st.floats(-1e6, 1e6), st.integers(60, 120))
def test_a_table_fits_and_holds_every_number(measures, arms, x, width):
    rows = tuple({**{m: x for m in measures}, "arm": arm, "seed": 0} for arm in arms)
    result = Result("n", "q", "c", False, {}, measures, rows=rows)
    lines = table(result, width).splitlines()
    widest = 2 + max(map(len, [*measures, f"{x:,.3f}"])) + max(map(len, ["", *arms]))
    assert max(map(len, lines)) <= max(width, widest)
    for decimals in measures.values():
        assert not arms or f"{x:,.{decimals}f}" in table(result)


def test_a_table_has_the_slides_numbers_as_they_stand_there():
    slide = {"tokens": {"a": 1e12, "b": 62.0}, "hours": {"b": 1_022_362}}
    rows = ({"arm": "a", "seed": 0, "m": 1.0}, {"arm": "b", "seed": 0, "m": 2.0})
    *_, a, b = table(Result("n", "q", "c", False, slide, {"m": 0}, rows=rows)).splitlines()
    assert (a.split(), b.split()) == (["a", "1", "1,000,000,000,000"],
                                      ["b", "2", "62.0", "1,022,362"])


@pytest.mark.parametrize("x, said", [
    (1234.56, "1,234.6"), (1e15 - 1, "999,999,999,999,999.0"), (-3.4028234e38, "-3.4028e+38"),
    (1e15, "1e+15")])
def test_numbers_are_written_as_they_are_read(x, said):
    assert number(x, 1) == said


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
def test_a_result_goes_through_json_unchanged(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("result") / "result.json"
    rows = tuple({"arm": "a", "seed": s, "x": v} for s, v in enumerate(values))
    result = Result("name", "Ü?", "c", True, SLIDE, {"x": 1}, "d", "c", "m", rows)
    result.save(path)
    assert Result.load(path) == result


@pytest.mark.parametrize("text, complaint", [
    ("[]", "is [], expected an object"),
    ('{"name": "x"}', "'question', 'quick', 'rows', 'slide'] missing"),
    ("{", "not valid JSON"),
])
def test_what_is_no_result_is_refused(tmp_path, text, complaint):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(FormatError, match=re.escape(complaint)):
        Result.load(tmp_path / "result.json")


def test_a_row_without_a_measure_is_refused(tmp_path):
    Result("n", "q", "c", False, {}, {"x": 1}, rows=({"arm": "a", "seed": 0},)).save(tmp_path / "r")
    with pytest.raises(FormatError, match=r"rows\[0\]: x is None, expected float"):
        Result.load(tmp_path / "r")


@given(st.lists(st.floats(), min_size=1, max_size=4))
@example([math.nan])
@example([1.0, math.inf])
@example([sys.float_info.max] * 3)
def test_what_is_not_finite_comes_back_as_nan(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("result") / "result.json"
    rows = tuple({"arm": "a", "seed": s, "x": v, "other": v} for s, v in enumerate(values))
    Result("name", "q", "c", False, {}, {"x": 1}, rows=rows).save(path)
    back = Result.load(path)
    for row, v in zip(back.rows, values, strict=True):
        assert row["x"] == row["other"] == v if math.isfinite(v) else (
            math.isnan(row["x"]) and math.isnan(row["other"]))
    assert ("nan" in table(back)) == (not all(map(math.isfinite, values)))


@pytest.mark.parametrize("name", ["arm", "seed"])
def test_null_is_no_arm_and_no_seed(tmp_path, name):
    row = {"arm": "a", "seed": 0, "x": 1.0, name: None}
    Result("n", "q", "c", False, {}, {"x": 1}, rows=(row,)).save(tmp_path / "r")
    with pytest.raises(FormatError, match=rf"rows\[0\]: {name} is None"):
        Result.load(tmp_path / "r")


@pytest.mark.parametrize("how", ["raises", "gives"])
def test_an_arm_that_diverges_keeps_its_row(tmp_path, capsys, how):
    """The other arms run, the claims about it cannot be told, and the picture leaves it out."""
    drawn, calls = [], []

    def measured(arm, seed, run):
        row = heights(arm, seed, run, calls) | {"depth, m": 1.0}
        if (arm, seed) != ("low", 1):
            return row
        if how == "raises":
            raise Diverged("step 3: loss nan")
        return row | {"height, m": math.nan}

    deep = {"high is deep": lambda rows: compared(rows, "depth, m", "high", "low", at_least=-1)}
    experiment = small(tmp_path, claims=CLAIMS | deep,
                       draw=lambda figure, rows: drawn.extend((r["arm"], r["seed"]) for r in rows))
    conduct(experiment, measured, (0, 1, 2), {}, out=tmp_path)
    said = capsys.readouterr().out
    assert "low, seed 1: height, m nan; width, m " in said
    assert ("low, seed 1: step 3: loss nan" in said) == (how == "raises")
    assert f"high is above low: {OPEN}" in said and f"high is near low: {OPEN}" in said
    assert f"high is deep: {OPEN if how == 'raises' else HOLDS}" in said
    assert set(drawn) == {(arm, seed) for arm in ARMS for seed in (0, 1, 2)} - {("low", 1)}
    folder = tmp_path / "towers-1"
    (row,) = (r for r in Result.load(folder / "result.json").rows if math.isnan(r["height, m"]))
    assert (row["arm"], row["seed"]) == ("low", 1)
    conduct(experiment, measured, (0, 1, 2), {}, resume=folder)
    assert len(calls) == 6  # it is done


def test_a_best_rate_is_not_told_if_a_rate_diverged():
    rates = importlib.import_module("learning_rates")
    rows = [{"arm": arm, "seed": seed, rates.LOSS: abs(i - 3.0)} for seed in (0, 1)
            for i, arm in enumerate(rates.ARMS)]
    assert all(judge(rows).low is not None for judge in rates.CLAIMS.values())
    rows[3][rates.LOSS] = math.nan
    assert {judge(rows).verdict for judge in rates.CLAIMS.values()} == {OPEN}


def test_a_stopped_run_goes_on_where_it_was(tmp_path, capsys):
    calls = []

    def stopped(arm, seed, run):
        (run.path / "checkpoint").touch()
        if len(calls) == 3:
            raise KeyboardInterrupt
        return heights(arm, seed, run, calls)

    with pytest.raises(KeyboardInterrupt):
        conduct(small(tmp_path), stopped, (0, 1, 2), {"steps": 3}, out=tmp_path, keep=True)
    folder = tmp_path / "towers-1"
    words = "--seeds", 0, 1, 2, "--keep"
    assert capsys.readouterr().out.endswith(
        f"go on with: {typed(tmp_path / 'towers.py', *words, resume=folder)}\n")
    assert calls == [("low", 0), ("high", 0), ("low", 1)]  # all arms of a seed, then the next
    before = Result.load(folder / "result.json")
    assert len(before.rows) == 3 and before.claims == ()
    assert [path.parent.name for path in folder.glob("*/checkpoint")] == ["high-1"]
    calls.clear()
    after = conduct(small(tmp_path), lambda *which: heights(*which, calls), (0, 1, 2),
                    {"steps": 3}, resume=folder)
    assert calls == [("high", 1), ("low", 2), ("high", 2)]
    whole = conduct(small(tmp_path), heights, (0, 1, 2), {"steps": 3}, out=tmp_path)
    assert (after.rows, after.claims) == (whole.rows, whole.claims)
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_new_arms_and_seeds_join_a_run(tmp_path):
    conduct(small(tmp_path), heights, (0,), {"steps": 3}, out=tmp_path)
    calls, arms = [], {**ARMS, "new": 3.0}
    result = conduct(small(tmp_path, arms), lambda *which: heights(*which, calls), (0, 4),
                     {"steps": 3}, resume=tmp_path / "towers-1")
    assert calls == [("new", 0), ("low", 4), ("high", 4), ("new", 4)]
    assert result.arms == ["low", "high", "new"] and result.seeds == [0, 4]


def test_a_run_with_other_settings_is_refused(tmp_path):
    conduct(small(tmp_path), heights, (0,), {"steps": 3}, out=tmp_path)
    before = (tmp_path / "towers-1" / "result.json").read_bytes()
    with pytest.raises(ValueError, match=r"settings {'steps': 3}, but {'steps': 4} are"):
        conduct(small(tmp_path), heights, (0, 1), {"steps": 4}, resume=tmp_path / "towers-1")
    with pytest.raises(ValueError, match="has the settings"):
        conduct(small(tmp_path), heights, (1,), {"steps": 3}, quick=True,
                resume=tmp_path / "towers-1")
    assert (tmp_path / "towers-1" / "result.json").read_bytes() == before


def test_commits_of_all_rows_are_told(tmp_path, monkeypatch):
    for seed, commit in [(0, "aaa"), (1, "bbb"), (2, "bbb")]:
        monkeypatch.setattr(module, "commit_of", lambda folder: commit)
        resume = tmp_path / "towers-1" if seed else None
        result = conduct(small(tmp_path), heights, (seed,), {}, out=tmp_path, resume=resume)
    assert result.commit == "aaa, bbb"
    assert module.commit_of(tmp_path) == "bbb"
    monkeypatch.undo()
    assert module.commit_of(tmp_path) == "unknown"


def test_what_is_kept_and_what_cannot_be(tmp_path, capsys):
    def draw(figure, rows): figure.subplots().plot([row["height, m"] for row in rows])
    towers = small(tmp_path, draw=draw)
    with pytest.raises(ValueError, match="a quick run cannot be kept"):
        conduct(towers, heights, (0,), {}, quick=True, out=tmp_path, keep=True)
    with pytest.raises(ValueError, match="at least one seed"):
        conduct(towers, heights, (), {}, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    conduct(towers, heights, (0, 1), {}, quick=True, out=tmp_path)
    assert capsys.readouterr().out.count(QUICK) == 2 and not (tmp_path / "towers.json").exists()
    result = conduct(towers, heights, (0, 1), {}, out=tmp_path)
    assert not (tmp_path / "towers.json").exists()
    conduct(towers, None, (0, 1), {}, resume=tmp_path / "towers-2", keep=True)  # nothing is run
    assert Result.load(tmp_path / "towers.json") == result
    drawn = (tmp_path / "towers-2" / "result.svg").read_bytes()
    assert (tmp_path / "towers.svg").read_bytes() == drawn


def test_a_picture_takes_the_pages_colours_and_is_the_same_every_time(tmp_path):
    def draw(figure):
        axes = figure.subplots()
        axes.plot([1, 2], color="#2f7fc1")
        axes.set(title="a < b")
    first, second = (draw_svg(tmp_path / name, draw).read_text() for name in ("a.svg", "b.svg"))
    assert first == second and first.startswith("<svg ")
    assert "currentColor" in first and "a &lt; b" in first and "#2f7fc1" in first
    for word in ("#010203", "<style", "<metadata", "<!DOCTYPE", "DejaVu", "#000000", "white"):
        assert word not in first


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    conduct(small(tmp_path, draw=lambda figure, rows: None), heights, (0,), {}, out=tmp_path)
    said, folder = capsys.readouterr().out, tmp_path / "towers-1"
    assert f"for a picture: {install('plots')}" in said
    assert said.endswith(f"result: {folder / 'result.json'}\n")
    assert {path.name for path in folder.iterdir()} == {"run.json", "result.json"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_runs_quickly(name, tmp_path, capsys):
    experiment = importlib.import_module(name)
    beside = sorted(FOLDER.iterdir())
    experiment.main(seeds=(0, 1), quick=True, out=tmp_path)
    assert capsys.readouterr().out.count(QUICK) == 2
    result = Result.load(tmp_path / f"{name}-1" / "result.json")
    assert result.quick and result.seeds == [0, 1] and result.arms == list(experiment.ARMS)
    assert len(result.rows) == 2 * len(experiment.ARMS)
    report.picture(tmp_path / f"{name}-1" / "result.svg", "picture-")  # the page takes it
    assert [claim["claim"] for claim in result.claims] == list(experiment.CLAIMS)
    for claim in result.claims:
        assert claim["seeds"] in (1, 2), f"{claim['claim']}: judged of no pair"  # 1: of one base
    if "arms" in inspect.signature(experiment.main).parameters:  # some of them give a picture, too
        for arm in result.arms:
            experiment.draw(Figure(), [row for row in result.rows if row["arm"] == arm])
    for source, numbers in experiment.SLIDE.items():
        assert re.match(r"lecture 00[0-4]: ", source) and set(numbers) <= set(experiment.ARMS)
    with pytest.raises(ValueError, match="cannot be kept"):
        experiment.main(seeds=(0,), quick=True, out=tmp_path, keep=True)
    assert sorted(FOLDER.iterdir()) == beside
    assert verdicts(result).count("\n") >= len(result.claims)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_arm_takes_a_base_as_pretrain_makes_it(name, tmp_path, monkeypatch):
    """A quick run makes a tiny base of its own, so it does not show that."""
    experiment = importlib.import_module(name)
    if "model" not in inspect.signature(experiment.main).parameters:
        return
    config = {"vocab_size": 258, "context": 192, "layers": 6, "heads": 2, "width": 128}
    if name == "understanding":
        model = Transformer(Config.bert(**config, hidden=128))
    else:
        model = Transformer(Config.llama(**config, hidden=128, bias=True))
    huggingface.save_model(model, tmp_path / "base", data.ByteTokenizer())
    monkeypatch.setattr(trial, "conduct", lambda *args: args)
    experiment.main(model=(tmp_path / "base",), out=tmp_path / "runs")


def test_an_arm_that_was_killed_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    methods = importlib.import_module("adaptation_methods")
    monkeypatch.setattr(trial, "QUICK", trial.QUICK | {"save_every": 2})
    begun, arms = [], ("full", "LoRA, 9k", "QLoRA, 74k")

    def fit(run, *args, kill=False, title, **settings):
        for trainer, done in loop.fit(run, *args, title=title, **settings):
            if not done.targets:
                begun.append((title, done.step))
            if kill and title == "LoRA, 9k, seed 0" and done.step == 3:
                raise SystemExit("killed")
            yield trainer, done

    monkeypatch.setattr(trial, "fit", partial(fit, kill=True))
    with pytest.raises(SystemExit):
        methods.main(seeds=(0,), quick=True, out=tmp_path, arms=arms)
    monkeypatch.setattr(trial, "fit", fit)
    methods.main(seeds=(0,), quick=True, resume=tmp_path / "adaptation_methods-1", arms=arms)
    assert begun == [("full, seed 0", 0), ("LoRA, 9k, seed 0", 0), ("LoRA, 9k, seed 0", 2),
                     ("QLoRA, 74k, seed 0", 0)]
    methods.main(seeds=(0,), quick=True, out=tmp_path, arms=arms)
    first, second = (Result.load(tmp_path / f"adaptation_methods-{i}" / "result.json")
                     for i in (1, 2))
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one | {trial.MS: 0} == other | {trial.MS: 0}  # all but the clock's


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_index_has_each_experiment(name):
    question = importlib.import_module(name).QUESTION
    line = f"| {question} | `.venv/bin/python scripts/experiments/{name}.py` |"
    assert line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()


def test_a_base_that_gives_no_answers_is_refused_before_the_run(tmp_path):
    methods, folder = importlib.import_module("adaptation_methods"), tmp_path / "bert"
    bert = Transformer(Config.bert(258, 48, layers=1, heads=2, width=8, hidden=8))
    huggingface.save_model(bert, folder, data.ByteTokenizer())
    with pytest.raises(ValueError, match="bert fills in masked tokens; only a causal model"):
        methods.main(seeds=(0,), model=(folder,), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
