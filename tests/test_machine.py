"""measure/machine.py: what `python -m minilm` measures, and what it says to set. Times are made up,
but each measurement runs once."""

import io
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import __main__ as program
from minilm.measure import machine
from minilm.measure.machine import Machine, advice, alternatives, told

NOTHING = "to set: nothing; nothing that was tried is 1.1 times as fast"
BITS = "(other bits: a run that goes on under another setting gives other bits)"
AT_REST = Machine(
    cores=2, features=("X86_V3", "X86_V4"), threads_now=2, threads={1: 80e9, 2: 150e9},
    kernels={"no OPENBLAS_CORETYPE": ("SkylakeX", 80e9), "OPENBLAS_CORETYPE=Haswell": (
        "Haswell", 85e9)}, steps={"": 0.030, "--threads": 0.032, "--workers 1": 0.055})


def kernels(**rates):
    return replace(AT_REST, kernels=dict(zip(AT_REST.kernels, rates.items())))


def test_where_all_is_well_nothing_is_to_set():
    assert advice(AT_REST) == [NOTHING]


@pytest.mark.parametrize("found, said", [
    (kernels(SkylakeX=80e9, Haswell=100e9),
     ["to set: OPENBLAS_CORETYPE=Haswell, products are 1.25 times as fast; other bits", BITS]),
    (replace(AT_REST, threads={1: 80e9, 2: 60e9}),
     ["to set: OPENBLAS_NUM_THREADS=1, with one worker and in generation products are 1.33 times "
      "as fast; other bits", BITS]),
    (replace(AT_REST, threads_now=1),  # OMP_NUM_THREADS=1 is set
     ["to set: OPENBLAS_NUM_THREADS=2, with one worker and in generation products are 1.88 times "
      "as fast; other bits", BITS]),
    (replace(AT_REST, steps={"": 0.050, "--threads": 0.040, "--workers 1": 0.055}),
     ["to set: --threads, for training, a step of a small model is 1.25 times as fast"]),
    (replace(AT_REST, load=1.5),
     [NOTHING, "but the machine is busy (load 1.5 on 2): look again when it is quiet"]),
    (replace(AT_REST, kernels={}, steps={}), [NOTHING]),
])
def test_what_is_faster_by_more_than_a_tenth_is_to_set(found, said):
    assert advice(found) == said


@given(*[st.floats(1e9, 1e12)] * 2)
def test_the_kernels_that_are_said_are_the_faster_ones(now, other):
    lines = advice(kernels(now=now, other=other))
    assert (lines == [NOTHING]) == (other / now <= 1.1)


def test_kernels_that_somebody_chose_may_be_the_slower_ones():
    found = replace(AT_REST, kernels={"OPENBLAS_CORETYPE=Haswell": ("Haswell", 50e9),
                                      "no OPENBLAS_CORETYPE": ("SkylakeX", 100e9)})
    assert advice(found)[0] == (
        "to set: no OPENBLAS_CORETYPE, products are 2.00 times as fast; other bits")


def test_all_that_was_measured_is_said(monkeypatch):
    monkeypatch.setattr(machine, "cpu", lambda: "A processor")
    assert told(AT_REST) == [
        "CPU: A processor, 2 cores, X86_V3 X86_V4",
        "products on one thread, by kernels: SkylakeX 80 GFLOP/s, Haswell 85 GFLOP/s",
        "products by BLAS's threads: 1 thread 80 GFLOP/s, 2 threads 150 GFLOP/s",
        "a step of a small model, by options of a program: as they are 30.0 ms, --threads 32.0 ms, "
        "--workers 1 55.0 ms", NOTHING]


def test_the_cpu_has_a_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A processor\n")
    assert machine.cpu(tmp_path / "cpuinfo") == "A processor"
    assert machine.cpu(tmp_path / "nowhere") != ""


@pytest.mark.parametrize("now, features, others", [
    ("SkylakeX", ("X86_V4",), ["Haswell"]), ("Cooperlake", (), ["Haswell"]),
    ("Haswell", ("X86_V3", "X86_V4"), ["SkylakeX"]), ("Zen", ("AVX512F",), ["SkylakeX"]),
    ("Zen", ("X86_V3",), []), ("neoversen1", ("NEON",), []), (None, (), [])])
def test_kernels_are_tried_only_where_the_cpu_has_their_instructions(now, features, others):
    assert alternatives(now, features) == others


class Process:
    """One that multiplies, or dies at once."""

    def __init__(self, *lines):
        self.stdout, self.stdin = io.StringIO("".join(f"{line}\n" for line in lines)), io.StringIO()

    def __enter__(self): return self
    def __exit__(self, *_): pass


def test_kernels_that_do_not_run_are_left_out(monkeypatch):
    """And those that turn out to be the same ones. A process that dies later has its last word."""
    given = {None: Process("SkylakeX", 0.02, 0.01), "Haswell": Process("Haswell", 0.04),
             "Zen": Process("Haswell", 0.01), "Atom": Process(), "Dead": Process("Dead")}
    monkeypatch.setattr(machine, "products", given.get)
    turns = iter([0.0, 0.1, 0.2, 9.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(turns))
    monkeypatch.setattr(machine, "PRODUCTS_FOR", 0.15)
    assert machine.by_kernels(given) == {
        "no OPENBLAS_CORETYPE": ("SkylakeX", 2 * machine.SIZE**3 / 0.01),
        "OPENBLAS_CORETYPE=Haswell": ("Haswell", 2 * machine.SIZE**3 / 0.04)}


def test_jobs_take_turns_and_the_fastest_counts(monkeypatch):
    calls, times = [], iter([0.0, 0.5, 1.5, 2.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times))
    def job(name, *seconds):
        left = iter(seconds)
        return lambda: calls.append(name) or next(left)
    assert machine.in_turn({"a": job("a", 3, 2), "b": job("b", 1, 4)}, 1.0) == {"a": 2, "b": 1}
    assert calls == ["a", "b", "a", "b"]
    assert machine.in_turn({}, 1.0) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="the wheel of NumPy has OpenBLAS there")
def test_each_measurement_runs(monkeypatch):
    """Small products, one turn each; a chosen kind is said, and the one without it is tried."""
    for name, value in (("SIZE", 32), ("PRODUCTS_FOR", 0), ("STEPS_FOR", 0)):
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    found = machine.measured(1, {"": lambda: program.step(1, False, steps=1)})
    assert next(iter(found.kernels)) == "OPENBLAS_CORETYPE=Haswell"
    assert next(iter(found.kernels.values()))[0] == "Haswell"
    assert all(rate > 0 for _, rate in found.kernels.values())
    assert set(found.threads) == {1, found.threads_now} and min(found.threads.values()) > 0
    assert 0 < found.steps[""] < 600 and found.features == machine.simd() != ()


def test_the_program_measures_the_default_first(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(program, "default_workers", lambda: (2, True))
    monkeypatch.setattr(program, "step", lambda *team: asked.append(team) or len(asked))
    def measured(cores, steps):
        assert cores == 2
        return replace(AT_REST, steps={options: step() for options, step in steps.items()})
    monkeypatch.setattr(program, "measured", measured)
    program.main()
    assert asked == [(2, True), (2, False), (1, False)]
    assert capsys.readouterr().out.endswith(
        f"as they are 1000.0 ms, --threads 2000.0 ms, --workers 1 3000.0 ms\n{NOTHING}\n")
    asked.clear()
    monkeypatch.setattr(program, "default_workers", lambda: (1, False))
    monkeypatch.setattr(program, "measured", lambda cores, steps: [run() for run in steps.values()])
    program.machine()
    assert asked == [(1, False)]
