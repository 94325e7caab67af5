"""The programs are killed at any file operation and go on, and end with the straight run's bits.

    KILLS=300 python -m pytest tests/test_kills.py -n 2     # some minutes; without KILLS 10 kills

A program runs in a forked process and ends with os._exit at its n-th operation on a file: before it
opens one to write, renames, removes, makes a folder or forces something to the disk. Then it goes
on with --resume, or is run again if there is no run yet, and may be killed again. In the end every
file is the straight run's, but for the seconds in the metrics, and none is left over.
"""

import os
import random
import sys
import traceback
import warnings
from pathlib import Path

import align
import distill
import finetune
import numpy as np
import pretrain
import pytest
import quantize

from minilm import data
from minilm.files import read_json_lines
from minilm.interop import huggingface
from minilm.transformer import Config, Transformer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

KILLS = int(os.environ.get("KILLS", 10))
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
          "shutil.rmtree"}
KILLED = 77

SMALL = dict(batch=2, workers=1)
JOBS = {  # name: (the run's folder, run it from the folder or go on)
    "pretrain": ("pretrain-1", lambda resume: pretrain.main(pretrain.Settings(
        corpus=("text.txt",), tokenizer="chars", layers=1, heads=2, width=8, context=8, steps=6,
        warmup=2, eval_every=4, save_every=2, sample=6, lr=1e-2, prompt="The ", dropout=0.1,
        **SMALL) if not resume else pretrain.Settings(), resume=resume)),
    "pretrain, lora": ("pretrain-1", lambda resume: pretrain.main(pretrain.Settings(
        init="base", method="lora", corpus=("text.txt",), context=8, steps=4, warmup=1, r=1,
        eval_every=3, save_every=2, sample=6, prompt="The ",
        **SMALL) if not resume else pretrain.Settings(), resume=resume)),
    "finetune": ("finetune-lora-1", lambda resume: tuned("lora", resume)),
    "finetune, full, float16": ("finetune-full-1", lambda resume: tuned(
        "full", resume, dtype="float16", threads=True)),
    "distill": ("distill-1", lambda resume: distill.main(distill.Settings(
        corpus=("text.txt",), layers=2, heads=2, width=8, context=8, teacher_steps=8, steps=8,
        prompt="The ", **SMALL) if not resume else distill.Settings(), resume=resume)),
    "align": ("align-ppo-1", lambda resume: align.main(align.Settings(
        model="base", data="text.txt", prompt=4, tokens=3, test=4, steps=6, r=1, eval_every=4,
        save_every=3, ptx=0.1, replay_from=("text.txt",), **SMALL) if not resume
        else align.Settings(), resume=resume)),
    "quantize": (None, lambda resume: quantize.main(
        Path("base"), (64,), "text.txt", Path("runs/codebooks.png"))),
}


SHARES = dict(zip(JOBS, (0.2, 0.1, 0.2, 0.1, 0.2, 0.1, 0.1)))  # of the kills


def tuned(method, resume, **changes):
    s = finetune.Settings(method=method, model="base", data=("last",), train=8, test=2,
                          known=("text.txt",), r=1, steps=4, warmup=1, save_every=1, eval_every=3,
                          **SMALL | changes)
    finetune.main(finetune.Settings() if resume else s, resume=resume)


class Killer:
    """Ends this process at its n-th file operation below the working folder; counts them."""

    def __init__(self, n, seed):
        self.n, self.count, self.rng, self.here = n, 0, random.Random(seed), os.getcwd()
        sys.addaudithook(self.hear)
        os.fsync = lambda fd: self.operate()  # the kernel outlives us

    def hear(self, event, args):
        if event in EVENTS or (event == "open" and args[2] & WRITES):
            path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
            if path and (not os.path.isabs(path) or path.startswith(self.here)):
                self.operate(path if event == "open" and args[2] & os.O_APPEND else None)

    def operate(self, appended=None):
        self.count += 1
        if self.count == self.n:
            if appended and self.rng.random() < 0.5:  # half of a line is written
                with open(appended, "ab") as file:
                    file.write(b'{"step": 1, "lo')
            os._exit(KILLED)


def run(job, folder, n, seed=0):
    """Run a job in `folder` until its n-th operation, or to its end: (whether it ended, count)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        read, write = os.pipe()
        child = os.fork()
    if not child:
        try:
            _child(job, folder, n, seed, write)
        finally:
            os._exit(1)
    os.close(write)
    with open(read) as pipe:
        told = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), (folder / "log.txt").read_text()
    return code == 0, int(told or 0)


def _child(job, folder, n, seed, write):
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "w", closefd=False, buffering=1)
    quantize.print_errors = lambda *args: None  # takes seconds and writes nothing, as
    distill.speeds = lambda models, tokens: {name: [1.0] for name in models}
    name, main = JOBS[job]
    resume = Path("runs", name) if name and Path("runs", name).exists() else None
    killer = Killer(n, seed)
    try:
        main(resume)
        os.write(write, str(killer.count).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """What every child would import again."""
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    backend_agg.FigureCanvasAgg(Figure()).draw()


def prepare(folder):
    """What the programs read: a text and a base model."""
    folder.mkdir()
    words = np.random.default_rng(0).choice(["The", "cat", "sat", "on", "a", "mat.\n"], 200)
    (folder / "text.txt").write_text(" ".join(words))
    huggingface.save_model(Transformer(Config.llama(258, 64, 1, 2, 8, 8), 0), folder / "base")
    data.ByteTokenizer().save(folder / "base" / "tokenizer.json")
    return folder


def left(folder):
    """{path below runs: what is in it}, without the seconds of steps."""
    found = {}
    for path in sorted((folder / "runs").rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "metrics.jsonl":
                content = [{k: v for k, v in record.items() if k != "seconds"}
                           for record in read_json_lines(path)]
            found[path.relative_to(folder).as_posix()] = content
    return found


@pytest.mark.parametrize("job", JOBS)
def test_killed_programs_end_like_straight_ones(tmp_path, job):
    straight = prepare(tmp_path / "straight")
    ended, count = run(job, straight, n=0)
    wanted = left(straight)
    assert ended and count > 4 and wanted
    kills, chain = 0, 0
    while kills < max(1, round(KILLS * SHARES[job])):
        chain += 1
        rng, folder, ended = random.Random(f"{job} {chain}"), prepare(tmp_path / str(chain)), False
        story = []
        while not ended:
            n = rng.randint(1, count if not story else 2 * count)  # beyond: it ends
            ended, _ = run(job, folder, n, seed=chain)
            story.append(n)
            kills += not ended
        found = left(folder)
        assert found.keys() == wanted.keys(), story
        assert [name for name in wanted if found[name] != wanted[name]] == [], story
