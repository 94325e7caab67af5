"""The experiment on ranks: what its launcher starts, and what it makes of what ranks have found."""

import numpy as np
import parallel_training as experiment
import pytest


@pytest.mark.ranks
def test_processes_find_the_bytes_that_threads_find():
    pytest.importorskip("mpi4py", reason="the extra mpi is not installed")
    if not experiment.launcher():
        pytest.skip("there is no mpiexec beside this python")
    processes, threads = (run(2, 3, True) for run in (experiment.launched, experiment.found))
    for mine, other in zip(processes["stages"], threads["stages"]):
        for key in ("held", "sent", "sizes"):
            assert mine[key] == other[key]
    assert len(processes["sweep"]) == len(threads["sweep"]) == 6


@pytest.mark.ranks
def test_ranks_that_fail_say_so(monkeypatch):
    pytest.importorskip("mpi4py", reason="the extra mpi is not installed")
    if not experiment.launcher():
        pytest.skip("there is no mpiexec beside this python")
    with pytest.raises(RuntimeError, match=r"2 ranks ended with \d+: (?s:.)*invalid literal"):
        experiment.launched(2, "no seed", True)


@pytest.mark.parametrize("stage, moved", [(0, 2 * 3), (1, 2 * 3), (2, 2 * 3), (3, 3 * 3 - 1)])
def test_a_prediction_by_hand(stage, moved):
    """Two units and a root of 4e8 bytes each, on 2 ranks: half a second a unit and part at 4e8 B/s;
    stage 3 gathers the root once."""
    ran = {"alone": [9.0, 2.0], "sweep": [(1, 0.0, 1e-12), (1, 4e8, 1.0)],
           "stages": [{"sizes": [10**8] * 3}] * 4}
    serial = experiment.predict(ran, stage, 2, overlap=False)
    assert serial == pytest.approx(9 + (1 if stage else 2) + moved / 2, rel=1e-6)
    assert experiment.predict(ran, stage, 2, overlap=True) < serial


def test_without_mpi_times_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(experiment, "launcher", lambda: None)
    monkeypatch.setattr(experiment, "shape", lambda quick, small=experiment.shape: small(True))
    monkeypatch.setattr(experiment, "found", experiment.found.__wrapped__)
    row = experiment.measured("1 rank, stage 0", 0, quick=False)
    assert 'pip install "minilm[mpi]"' in capsys.readouterr().out
    assert (row[experiment.HELD], row[experiment.SENT], row[experiment.OFF]) == (16, 0, 0)
    assert all(np.isnan(row[name]) for name in experiment.TIMES)
