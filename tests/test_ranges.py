"""minilm.ranges: what a setting may be, and what is said of another. Then every program's settings:
each number is refused out of its range, by its name, before anything is made."""

import dataclasses
import math
from math import inf, nan

import distill
import finetune
import numpy as np
import pretrain
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.loop import Training
from minilm.ranges import (
    AT_LEAST_0,
    BELOW_1,
    FINITE,
    LIMIT,
    POSITIVE,
    check,
    check_stored,
    each,
    one_of,
    optional,
    power_of_two,
    whole,
)


def holds(wanted, value) -> bool:
    try:
        check({"x": wanted}, x=value)
    except ValueError as error:
        assert str(error) == f"x must be {wanted.words}, got {value}"
        return False
    return True


@given(st.floats() | st.sampled_from([0.0, -0.0, 1.0, inf, -inf, nan]))
def test_ranges_of_numbers(x):
    finite = math.isfinite(x)
    assert holds(FINITE, x) == finite
    assert holds(AT_LEAST_0, x) == (finite and x >= 0)
    assert holds(POSITIVE, x) == (finite and x > 0)
    assert holds(LIMIT, x) == (x > 0)
    assert holds(BELOW_1, x) == (0 <= x < 1)


@given(st.integers(-9, 99), st.integers(-5, 5), st.integers(0, 50))
def test_ranges_of_whole_numbers(n, least, more):
    assert holds(whole(least), n) == holds(whole(least), np.int32(n)) == (n >= least)
    assert holds(whole(least, least + more), n) == (least <= n <= least + more)
    assert holds(power_of_two(2), n) == (n in (2, 4, 8, 16, 32, 64))


def test_a_whole_number_that_is_stored_fits_64_bits():
    """A larger one would be refused as the run is read. Others may have any size."""
    assert check_stored({"x": whole(0)}, x=2**63 - 1) is None
    for x in (2**63, 10**30):
        assert check({"x": whole(0)}, x=x) is None
        with pytest.raises(ValueError, match=f"^x must fit 64 bits, got {x}$"):
            check_stored({"x": whole(0)}, x=x)
        with pytest.raises(ValueError, match=f"^x must fit 64 bits, got {x}$"):
            check_stored({"x": each(whole(0))}, x=(1, x))


def test_other_types_are_said_to_be_what_they_are():
    for wanted, value, said in [
            (AT_LEAST_0, "1", "a number, finite and at least 0; got '1'"),
            (whole(1), 2.0, "a whole number, at least 1; got 2.0"),
            (whole(1), True, "a whole number, at least 1; got True"),
            (whole(1), None, "a whole number, at least 1; got None"),
            (one_of("a", "b"), 3, r"a word, one of \('a', 'b'\); got 3"),
            (AT_LEAST_0, np.ones(1), r"a number, finite and at least 0; got array\(\[1\.\]\)")]:
        with pytest.raises(TypeError, match=f"^x must be {said}$"):
            check({"x": wanted}, x=value)
    assert holds(optional(whole(1)), None) and not holds(optional(whole(1)), 0)
    assert holds(one_of("a", "b"), "b") and not holds(one_of("a", "b"), "c")


def test_each_item_of_a_tuple_is_checked():
    check({"x": each(BELOW_1)}, x=(0.0, 0.5), y=7)
    with pytest.raises(ValueError, match=r"^x must be at least 0 and below 1, got 1\.5$"):
        check({"x": each(BELOW_1)}, x=(0.0, 1.5))
    with pytest.raises(TypeError, match=r"^x must be several, each at least 0 and below"):
        check({"x": each(BELOW_1)}, x=0.5)


@pytest.mark.parametrize("several", [(0.5,), [0.5, 0.5], ()])
def test_several_numbers_are_no_number(several):
    with pytest.raises(TypeError, match=r"^x must be a number, at least 0 and below 1; got "):
        check({"x": BELOW_1}, x=several)


OUTSIDE = {  # of each program's settings, what they may not be
    Training: dict(batch=0, steps=-3, lr=nan, warmup=-5, clip=0.0, dtype="float8", eval_every=0,
                   save_every=0, seed=-1, workers=-1),
    pretrain.Settings: dict(batch=0, steps=0, lr=-1.0, warmup=-1, clip=-1.0, seed=-1, workers=-1,
                            min_lr=-1.0, beta2=1.0, weight_decay=inf, dropout=nan, sample=-1,
                            weights=(1.0, -1.0), family="t5"),
    finetune.Settings: dict(batch=0, steps=0, lr=inf, warmup=-1, clip=nan, train=0, test=0, r=0,
                            alpha=nan, dropout=1.0, method="postfix", last=0, k=0, m=0, form="Q",
                            skip=-1, length=0, hidden=0),
    distill.Settings: dict(batch=0, steps=0, teacher_steps=0, lr=-1.0, context=1, keep=(-1,),
                           student_width=-1, top_k=0, sweep=(0.0,), seed=-1, workers=-1,
                           objective="both"),
}
CASES = [(settings, name, value) for settings, bad in OUTSIDE.items()
         for name, value in bad.items()]


@pytest.mark.parametrize("settings, name, value", CASES)
def test_every_setting_is_refused_by_its_name(settings, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        settings(**{name: value})


@pytest.mark.parametrize("settings", OUTSIDE)
def test_every_number_among_the_settings_has_a_range(settings):
    """Or is checked by what it is for, before a folder is made: see the programs' own tests."""
    elsewhere = {"layers", "heads", "width", "context", "validation", "accumulate",  # Config, split
                 "temperature", "weights"}  # Distillation
    numbers = {f.name for f in dataclasses.fields(settings)
               if type(f.default) in (int, float) or f.name in ("weights", "sweep", "top_k")}
    assert numbers <= settings.RANGES.keys() | elsewhere
    assert all(hasattr(settings(), name) for name in settings.RANGES)


def test_no_limit_is_a_limit_too():
    assert Training(clip=inf).clip == inf
