"""The training programs as mpiexec starts them: the same bits, one voice, one end for all."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_rank_faults import nothing_is_left, without_owner

from minilm import data
from minilm.interop import huggingface
from minilm.run import RunDirectory
from minilm.transformer import Config, Transformer

pytestmark = pytest.mark.ranks
pytest.importorskip("mpi4py", reason="the extra mpi is not installed")
MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
if not MPIEXEC:
    pytest.skip("there is no mpiexec", allow_module_level=True)
ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = os.environ | {"PYTHONPATH": PATHS, "OPENBLAS_NUM_THREADS": "1", "MPIEXEC_TIMEOUT": "240"}


def started(n, program, *words):
    """A program that runs on n ranks; without mpiexec if n is 0."""
    launcher = [MPIEXEC, "-n", str(n)] * bool(n)
    return subprocess.Popen([*launcher, sys.executable, ROOT / "scripts" / program,
                             *map(str, words)],
                            env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def said(n, program, *words):
    """(exit code, stdout, stderr) of it."""
    process = started(n, program, *words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def kept(run):
    """All that a run leaves, but for times, and the picture."""
    files = {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for name in ("metrics.jsonl", "loss.png"):
        files.pop(name, None)
    records = RunDirectory(run).records()
    return files, [{k: v for k, v in r.items() if k != "seconds"} for r in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, and the folder of an untrained model."""
    folder = tmp_path_factory.mktemp("programs")
    words = np.random.default_rng(0).choice(["The", "cat", "sat", "on", "a", "mat.\n"], 300)
    (folder / "text.txt").write_text(" ".join(words))
    model = Transformer(Config.gpt2(258, 26, layers=2, heads=2, width=16), seed=1)
    huggingface.save_model(model, folder / "base", data.ByteTokenizer())
    return folder


def pretrained(folder, out, *more):
    return ["--corpus", folder / "text.txt", "--layers", 2, "--heads", 2, "--width", 8,
            "--context", 8, "--batch", 8, "--steps", 40, "--warmup", 2, "--eval-every", 20,
            "--save-every", 4, "--sample", 9, "--dropout", 0.1, "--out", folder / out, *more]


@pytest.fixture(scope="module")
def straight(folder):
    """What a run of pretrain.py on one rank leaves, of four micro-batches a step."""
    code, _, err = said(0, "pretrain.py", *pretrained(folder, "one", "--accumulate", 4,
                                                      "--stage", 0))
    assert (code, err) == (0, "")
    return kept(folder / "one" / "pretrain-1")


def test_a_run_that_is_killed_goes_on_with_more_ranks_in_another_stage(folder, straight):
    process = started(2, "pretrain.py", *pretrained(folder, "two", "--accumulate", 4,
                                                    "--stage", 2))
    run = folder / "two" / "pretrain-1"
    while not (run / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert len(RunDirectory(run).records()) < 40 and not (run / "model").exists()
    code, out, err = said(4, "pretrain.py", "--resume", run, "--stage", 3)
    assert (code, err) == (0, "")
    assert out.count("4 ranks in stage 3, from step ") == out.count("step 40: held out") == 1
    assert kept(run) == straight


def test_a_step_has_a_micro_batch_for_each_rank(folder, straight):
    code, _, err = said(4, "pretrain.py", *pretrained(folder, "four", "--stage", 1))
    assert (code, err) == (0, "")
    assert kept(folder / "four" / "pretrain-1") == straight


def test_a_first_ctrl_c_stops_all_ranks_and_saves(folder, straight):
    process = started(2, "pretrain.py", *pretrained(folder, "stop", "--accumulate", 4,
                                                    "--stage", 3))
    run = folder / "stop" / "pretrain-1"
    while not (run / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    (line,) = [line for line in out.splitlines() if line.startswith("stopped after step ")]
    assert re.search(r"; go on with: mpiexec -n 2 \S*python\S* \S*pretrain\.py ", line), line
    assert line.endswith(f"pretrain.py --resume {run} --stage 3")
    code, _, err = said(2, "pretrain.py", "--resume", run, "--stage", 3)
    assert (code, err) == (0, "")
    files, records = kept(run)
    assert records == straight[1]
    assert files["model/model.safetensors"] == straight[0]["model/model.safetensors"]


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_finetune_leaves_the_same(folder, method):
    words = ["--model", folder / "base", "--known", folder / "text.txt", "--method", method,
             "--data", "upper", "--train", 20, "--test", 2, "--batch", 8, "--steps", 6,
             "--warmup", 1, "--eval-every", 3, "--save-every", 3, "--accumulate", 2]
    found = []
    for n, stage in ((0, 0), (2, 3)):
        out = folder / f"{method}-{n}"
        code, _, err = said(n, "finetune.py", *words, "--out", out, "--stage", stage)
        assert (code, err) == (0, "")
        found.append(kept(out / f"finetune-{method}-1"))
    assert found[0] == found[1]


@pytest.mark.parametrize("n, words, code, message", [
    (2, [], 1, "pretrain.py: mpiexec has started 2 of this program, and each would work by itself: "
               "give --stage 0, 1, 2 or 3, and they train together"),
    (2, ["--stage", 4], 1, "pretrain.py: stage must be 0 to 3, got 4"),
    (3, ["--stage", 1, "--accumulate", 4], 1,
     "pretrain.py: 4 micro-batches a step cannot be shared evenly by 3 ranks: accumulate must be a "
     "multiple of 3"),
    (2, ["--stage", 1, "--workers", 2], 1,
     "pretrain.py: workers is given, but with --stage each rank is one worker")])
def test_what_is_wrong_is_said_once(folder, n, words, code, message):
    before = without_owner()
    found = said(n, "pretrain.py", *pretrained(folder, "wrong", *words))
    assert found == (code, "", f"{message}\n")
    assert nothing_is_left("", before)
    assert not (folder / "wrong").exists()


def test_a_program_that_knows_no_ranks_is_refused():
    assert said(2, "evaluate.py") == (1, "", "evaluate.py: mpiexec has started 2 of this program, "
                                      "and each would work by itself: start it without mpiexec\n")


def test_what_rank_0_cannot_write_ends_all(folder):
    code, _, err = said(2, "pretrain.py", *pretrained(folder, "text.txt/here", "--stage", 1))
    assert code == 1 and err == (f"pretrain.py: {folder}/text.txt/here: cannot be a folder for "
                                 "runs: Not a directory\n")


@pytest.mark.parametrize("rank, error, begins", [
    (1, "RuntimeError('no more')", "rank 1: pretrain.py: no more\non rank 1 of 3, in step 6\n"),
    (0, "RuntimeError('no more')", "pretrain.py: no more\non rank 0 of 3, in step 6\n"),
    (2, "KeyError('no more')", "rank 2: Traceback")])
def test_a_rank_that_fails_ends_all_and_says_where(folder, rank, error, begins, tmp_path):
    program = tmp_path / "failing.py"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import pretrain
from minilm.command import command
from minilm.ranks import RankTrainer

backward = RankTrainer._backward
def fail(trainer, rows, totals, scale, seed):
    if trainer.comm.rank == {rank} and seed[1] == 5:
        raise {error}
    return backward(trainer, rows, totals, scale, seed)
RankTrainer._backward = fail
command(pretrain.main, name="pretrain.py")
""")
    code, _, err = said(3, program, *pretrained(folder, "failing", "--stage", 2))
    assert code == 1 and err.startswith(begins) and err.count("no more") == 1 + ("Key" in error)
    assert "on rank" in err and "in step 6\n" in err
