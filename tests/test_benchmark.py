"""bench/benchmark.py on a CPU: all contenders do the same work, the floor is what they multiply,
and what is printed follows from the times. Nothing here takes times that matter."""

import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import benchmark
import contenders
import floor
import growth
import jax_gpt
import numpy as np
import pytest
import torch
import torch_compiled
import turns
import which_kernels
from contenders import Shape, our_config, our_trainer, torch_gpt, torch_step
from test_flops import Counted

from minilm import ops
from minilm.extras import install
from minilm.measure.flops import pairs
from minilm.measure.step import Step
from minilm.transformer import Transformer

TINY = Shape(layers=2, heads=2, width=16, context=12, batch=2, vocab=23)


@pytest.fixture
def model():
    return Transformer(our_config(TINY))


def losses(step, steps=4):
    return [step() for _ in range(steps)]


@pytest.fixture
def ours(model):
    """(weights as they begin, the losses of some steps)."""
    weights = {name: array.copy() for name, array in model.state_dict().items()}
    with our_trainer(model, TINY, threads=True, workers=1) as trainer:
        return weights, losses(lambda: trainer.step(0, TINY.tokens()).loss)


def as_torch(weights):
    """Our weights by the names of contenders.torch_gpt."""
    p = jax_gpt.joined(TINY, weights)
    state = {"embed.weight": p["embed"], "head.weight": p["embed"],
             "position.weight": p["position"]}
    state |= dict(zip(("norm.weight", "norm.bias"), p["norm"]))
    for i, block in enumerate(p["blocks"]):
        for name, (weight, bias) in block.items():
            state |= {f"blocks.{i}.{name}.weight": weight, f"blocks.{i}.{name}.bias": bias}
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def test_pytorch_does_the_same_steps(ours):
    weights, expected = ours
    theirs = torch_gpt(TINY)
    theirs.load_state_dict(as_torch(weights))
    found = losses(torch_step(theirs, TINY)[0])
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]


def losses_in_jax(weights):
    return losses(jax_gpt.jax_step(TINY, weights))


@pytest.mark.peers
def test_jax_does_the_same_steps(ours):
    """In a process of its own, as JAX warns of every later fork of a process that it has run in."""
    pytest.importorskip("jax")
    weights, expected = ours
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        found = process.submit(losses_in_jax, weights).result()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_torch_compile_does_the_same_steps(monkeypatch):
    monkeypatch.setattr(torch_compiled, "CORES", torch.get_num_threads())
    found = losses(torch_compiled.compiled_step(TINY))
    torch.manual_seed(0)
    assert found == pytest.approx(losses(torch_step(torch_gpt(TINY), TINY)[0]), rel=1e-5)


def test_a_text_takes_an_eighth_of_the_time_of_eight(monkeypatch):
    def timed(write):
        write()
        yield 4.0

    asked = []
    def stream(model, prompts, temperature):
        asked.append(np.shape(prompts))
        yield
    monkeypatch.setattr(contenders, "timed", timed)
    monkeypatch.setattr("minilm.generate.stream", stream)
    found = [next(contenders.our_side(row, TINY, True)) for row in ("generate", "batch")]
    assert found == [4, 0.5] and asked == [(1, 1), (8, 1)]


@pytest.mark.parametrize("shape", [TINY, Shape(1, 2, 8, 70, 4, 11)])
def test_the_floor_has_the_products_that_are_multiplied(shape):
    """Counted in a step of two workers, half of the batch each. Attention's backward pass makes
    q k^T once more, to save memory."""
    model, Counted.found = Transformer(our_config(shape)), 0
    for _, t in model.named_tensors():
        t.become(t.data.view(Counted))
    tokens, targets = shape.tokens()
    for rows in np.array_split(np.arange(shape.batch), 2):
        ops.cross_entropy(model(tokens[rows]), targets[rows], total=targets.size).backward()
    step = Step(our_config(shape), "full", shape.batch, shape.context)
    again = sum(2 * shape.batch * shape.width * pairs(step, i) for i in range(shape.layers))
    assert floor.operations(shape) == Counted.found - again > 0


def made_up(products, seconds):  # not inside of the test, as it goes through a pipe by its name
    return products.operations / seconds


@pytest.mark.parametrize("threads", [True, False])
def test_the_rate_is_that_of_all_workers(monkeypatch, threads):
    """Each says its own rate."""
    monkeypatch.setattr(floor, "SECONDS", 1e-3)
    monkeypatch.setattr(floor.Products, "rate", made_up)
    found = floor.rates(threads, workers=2, size=8)
    assert next(found) == pytest.approx(2 * 2 * 8**3 / 1e-3)
    found.close()
    monkeypatch.setattr(floor, "rates", lambda threads: iter([floor.operations(TINY) / 3.0]))
    assert next(floor.floor_side(TINY, threads)) == pytest.approx(3.0)


def test_a_rate_is_operations_by_time(monkeypatch):
    now = iter([0.0, 0.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(floor.time, "perf_counter", lambda: next(now))
    assert floor.Products(8).rate(3) == 3 * 2 * 8**3 / 4


def given_times(monkeypatch, by_side):
    """in_turn gives these seconds, after two turns that warm up."""
    def in_turn(sides, rounds):
        assert rounds == len(by_side["our_side"]) + turns.WARM_UP
        return [(9.0, 9.0, *by_side[f"{side.__module__}.side" if side.__name__ == "side" else
                                    side.__name__]) for side, *_ in sides]
    monkeypatch.setattr(benchmark, "in_turn", in_turn)


def test_the_row_of_training(monkeypatch, capsys):
    """Ratios above 1 are ours, the share of the floor is below 1."""
    monkeypatch.setattr(benchmark, "beside", lambda rows: {"JAX": jax_gpt})
    given_times(monkeypatch, {"our_side": (0.02, 0.02, 0.04), "torch_side": (0.04, 0.05, 0.06),
                              "floor_side": (0.01, 0.01, 0.02), "jax_gpt.side": (0.06,) * 3})
    benchmark.main(("train",), ("S",), rounds=3)
    _, _, eager, jax, floor_line = capsys.readouterr().out.splitlines()
    ours = "20.00 ms (20.00 - 40.00)"
    assert eager == (f"| training step, S | 50.00 ms (40.00 - 60.00) | {ours} | 2.50 | "
                     "1.50 - 2.50 |")
    assert jax == (f"| training step, S, JAX | 60.00 ms (60.00 - 60.00) | {ours} | 3.00 | "
                   "1.50 - 3.00 |")
    # 4,076,863,488 operations in 10 ms
    assert floor_line == ("| the floor, S: 4.1 GFLOP at 408 GFLOP/s | 10.00 ms (10.00 - 20.00) | "
                          f"{ours} | 0.50 | 0.50 - 0.50 |")


def test_who_is_not_here_is_left_out_with_a_line(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(which_kernels, "lines", lambda sides: asked.append(sides) or ["kernels"])
    monkeypatch.setattr(jax_gpt.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch_compiled.shutil, "which", lambda name: None)
    assert benchmark.beside(["train"]) == {} and benchmark.beside(["lora"]) == {}
    assert asked == [["ours", "torch"]]
    assert capsys.readouterr().out == (
        "* kernels\n* left out: torch.compile, torch.compile needs g++ or clang++\n"
        f"* left out: JAX, JAX is not installed: {install('contenders')}\n\n")
    monkeypatch.setattr(jax_gpt.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch_compiled.shutil, "which", lambda name: "/bin/" + name)
    assert benchmark.beside(["train"]) == {"torch.compile": torch_compiled, "JAX": jax_gpt}
    assert asked[1] == ["ours", "torch", "jax"]


def test_kernels_are_named_and_a_chosen_kind_is_said(monkeypatch):
    for name in which_kernels.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    said, warning = which_kernels.lines(["ours"])
    assert f"NumPy {np.__version__}, openblas" in said and "kernels Haswell; " in said
    assert said.endswith(" GFLOP/s with all of its threads")
    assert warning == ("warning: OPENBLAS_CORETYPE=Haswell is set, so these may not be the kernels "
                       "that a user has")


def test_what_onemkl_says_is_found(monkeypatch):
    out = ("MKL_VERBOSE oneMKL 2024.0 Update 2 Product build 20240605 for Intel(R) 64 architecture "
           "Intel(R) Architecture processors, Lnx 2.60GHz lp64\nMKL_VERBOSE SGEMM(N,N)\n"
           "PyTorch 2, oneMKL, its own loops for AVX2; 9 GFLOP/s\n")
    def run(words, env, **settings):
        assert env["MKL_VERBOSE"] == "1"
        return which_kernels.subprocess.CompletedProcess(words, out == "", out, "no torch\n")
    monkeypatch.setattr(which_kernels.subprocess, "run", run)
    assert which_kernels.lines(["torch"])[0] == (
        "PyTorch 2, oneMKL 2024.0 Update 2 for Intel(R) Architecture processors, its own loops for "
        "AVX2; 9 GFLOP/s")
    out = ""
    assert which_kernels.lines(["torch"])[0] == "torch: no torch"


@pytest.fixture
def power_laws(monkeypatch):
    """Sides whose time and memory are power laws; they warm up in the first turn."""
    def in_turn(sides, rounds):
        shape = sides[0][2]
        assert [s[:3] for s in sides] == [(side, "memory", shape) for side in (
            contenders.torch_side, contenders.our_side)] and rounds == 3
        x = shape.context if shape in growth.LENGTHS else size(shape)
        return [(a * x**0.5, *[a * 1e-3 * x**(1 + a / 10) * part for part in (1, 1.1)])
                for a in (1, 2)]
    monkeypatch.setattr(growth, "in_turn", in_turn)


def size(shape):
    """Parameters of a GPT-2: four matrices C x C and two C x 4 C a layer, and what goes with them.
    """
    C = shape.width
    return shape.layers * (12 * C**2 + 13 * C) + (shape.vocab + shape.context + 2) * C


def test_growth_finds_the_exponents(monkeypatch, tmp_path, capsys, power_laws):
    monkeypatch.setattr(growth, "SIZES", growth.SIZES[:4])
    growth.measure(2, threads=False, picture=tmp_path / "growth.svg")
    out = capsys.readouterr().out
    for x in ("parameters", "tokens of a text"):
        for largest in ("", ", the three largest"):
            assert f"| time by {x}{largest} | 1.10 ± 0.00 | 1.20 ± 0.00 |" in out
            assert f"| memory by {x}{largest} | 0.50 ± 0.00 | 0.50 ± 0.00 |" in out
    # 64^1.1 ms and 2 x 64^1.2 ms, half of the times longer by a tenth; 8 and 16 MiB
    assert ("| 64 | 101.9 ms (97.01 - 106.7) | 308.8 ms (294.1 - 323.5) | 0.33 | 8 MiB | 16 MiB | "
            "2.00 |") in out
    picture = (tmp_path / "growth.svg").read_text()
    assert "PyTorch" in picture and "minilm" in picture and "tokens of a text" in picture


def test_growth_leaves_out_what_does_not_fit(monkeypatch, tmp_path, capsys, power_laws):
    fit = importlib.import_module("minilm.measure.fit")
    room = max(map(growth.needs, growth.LENGTHS[:3]))
    monkeypatch.setattr(fit, "available", lambda: room)
    monkeypatch.setattr(growth, "SIZES", growth.SIZES[:1])
    growth.measure(2, threads=False, picture=tmp_path / "growth.svg")
    out = capsys.readouterr().out
    for shape in growth.LENGTHS:
        fits = growth.needs(shape) <= room
        assert (f"| {shape.context:,} | left out: it needs " in out) is not fits
    assert "| time by tokens of a text | 1.10 ± 0.00" in out
    assert "time by parameters" not in out  # of one point there is no exponent


def test_an_exponent_has_the_standard_error_of_the_line():
    """Of four points off a line by known amounts, as numpy.polyfit's covariance says."""
    x, y = np.array([1.0, 10.0, 100.0, 1000.0]), np.array([2.0, 19.0, 230.0, 1900.0])
    slope, error = growth.exponent(x, y)
    (expected, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert slope == pytest.approx(expected)
    assert error == pytest.approx(np.sqrt(covariance[0, 0]))


def test_growth_goes_from_a_tenth_to_a_hundred_million():
    assert [size(growth.SIZES[i]) / 1e6 for i in (0, -1)] == pytest.approx([0.1, 100], rel=0.01)
    assert [s.context for s in growth.LENGTHS] == [64 * 2**i for i in range(7)]
    assert {s.context * s.batch for s in growth.LENGTHS} == {8192}


def test_the_others_processes_load_nothing_of_ours_that_they_do_not_use():
    """PyTorch's process imports benchmark.py anew."""
    program = ("import sys, benchmark; print(*[m for m in sys.modules if m.startswith(('minilm.', "
               "'torch.', 'jax.'))])")
    done = which_kernels.subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert sorted(done.stdout.split()) == ["minilm.extras", "minilm.shell"]
