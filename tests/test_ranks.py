"""Ranks that are processes: one launch by mpiexec, whose results the tests look at."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilm.parallel.bucket import bytes_sent

pytestmark = pytest.mark.ranks
pytest.importorskip("mpi4py", reason="the extra mpi is not installed")
MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
if not MPIEXEC:
    pytest.skip("there is no mpiexec", allow_module_level=True)
TESTS = Path(__file__).parent
RUNS = pytest.mark.parametrize("n, stage", [(n, s) for n in (1, 2, 4) for s in range(4)])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of four ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [MPIEXEC, "-n", "4", sys.executable, "-W", "error", str(TESTS / "ranked.py"), str(out)],
        env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1",
                          "MPIEXEC_TIMEOUT": "240"},
        capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(4)]


@RUNS
def test_in_order_the_bits_are_those_of_one_rank(found, n, stage):
    """And the losses those of AdamW alone, whose norm is rounded, before clipping differs."""
    one = found[0][f"1 True {stage}"]
    for rank in range(n):
        mine = found[rank][f"{n} True {stage}"]
        assert [mine[key] for key in ("digest", "losses", "norms")] == [
            one[key] for key in ("digest", "losses", "norms")]
    alone = found[0]["alone 0.5"]
    assert np.allclose(one["losses"], alone["losses"], rtol=1e-6, atol=0)
    assert np.allclose(one["norms"], alone["norms"], rtol=1e-5, atol=0)
    assert np.allclose(one["embed"], alone["embed"], rtol=0, atol=1e-6)


@RUNS
def test_in_the_engines_order_it_is_close(found, n, stage):
    """Each n has its own micro-batches here, so all stages are compared with DDP in order of ranks.
    """
    runs = [found[rank][f"{n} False {stage}"] for rank in range(n)]
    assert len({run["digest"] for run in runs}) == 1
    first = found[0][f"{n} False 0"]
    assert np.allclose(runs[0]["embed"], first["embed"], rtol=0, atol=1e-4)
    assert np.allclose(runs[0]["losses"], first["losses"], rtol=1e-5, atol=0)


@RUNS
def test_bytes_travel_as_the_formulas_say(found, n, stage):
    """In stage 3 the root is gathered once a step, and at the end the test reads all of it."""
    run = found[0][f"{n} False {stage}"]
    size, root, steps = sum(run["sizes"]), run["sizes"][-1], 3
    expected = steps * size * bytes_sent(stage, n)
    if stage == 3:
        expected += (size - steps * root) * 4 * (n - 1) / n
    assert sum(run["sent"].get(what, 0) for what in ("parameters", "gradients")) == expected


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("ordered", [False, True])
def test_collectives(found, n, ordered):
    draws = [np.random.default_rng(r).standard_normal(3 * n).astype(np.float32) for r in range(n)]
    fives = [np.random.default_rng(r).standard_normal(5).astype(np.float32) for r in range(n)]
    for rank in range(n):
        mine = found[rank][f"collectives {n} {ordered}"]
        total = sum(fives[1:], fives[0])
        chain = sum([*draws[1:], *draws], draws[0])[3 * rank : 3 * rank + 3]
        if ordered:
            assert mine["all_reduce"] == total.tolist()
            assert mine["twice"] == chain.tolist()
        assert np.allclose(mine["all_reduce"], total, atol=1e-6)
        assert np.allclose(mine["twice"], chain, atol=1e-6)
        assert mine["broadcast"] == [0, n, 2 * n, 3 * n]
        assert mine["all_gather"] == mine["bfloat16"] == [x for r in range(n) for x in (r, 0.5)]
        assert mine["inside"] == [float(r) for r in range(n) for _ in "ab"]
        assert mine["numbers"] == [[r, -r] for r in range(n)]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("ordered", [False, True])
def test_large_calls_get_on_while_nobody_asks(found, n, ordered):
    for rank in range(n):
        assert found[rank][f"moved {n} {ordered}"] == [True, True, True, [True, True, True]]
