"""minilm.loop and minilm.command: what a training program is given by `fit` and in which order,
stopping and resuming, Ctrl-C, the settings that are shared, and how every program ends."""

import dataclasses
import json
import re
import signal
import sys
from dataclasses import asdict, dataclass

import distill
import finetune
import numpy as np
import pretrain
import pytest

from minilm import checkpoint, data
from minilm.command import command
from minilm.files import FormatError
from minilm.loop import Training, finish_on_interrupt, fit, resumed, validation
from minilm.nn import Linear, Module
from minilm.optim import AdamW, cosine_schedule
from minilm.parallel.cores import default_workers
from minilm.run import RunDirectory
from minilm.train import Diverged, LabelLoss, Trainer
from minilm.transformer import Config, Transformer

SMALL = Training(batch=4, steps=7, lr=1e-2, warmup=2, clip=0.5, save_every=3, seed=1, workers=1)
STREAM = np.random.default_rng(5).integers(0, 13, 200)
BATCHES = data.Batches([STREAM], [1], batch=4, length=6, seed=3)


def make_model(dropout=0.2):
    return Transformer(Config.gpt2(13, 6, layers=1, heads=2, width=8, dropout=dropout), seed=0)


def new_run(folder):
    return RunDirectory.create(folder, "run", {}, [])


def go_on(run, settings=SMALL, after=lambda trainer, done: None, **changes):
    """Train to the end, or until `after` stops it; returns the steps that were yielded."""
    model, steps = make_model(), []
    optimizer = AdamW(model.parameters())
    for trainer, done in fit(run, model, BATCHES, settings, optimizer=optimizer, **changes):
        steps.append(done.step)
        if done.targets:
            run.log(**asdict(done))
        after(trainer, done)
    return steps


def saved(run):
    tensors, state = checkpoint.load(run.path / "checkpoints")
    return {name: a.tobytes() for name, a in tensors.items()}, state["step"]


def losses(run):
    return [(r["step"], r["loss"], r["norm"], r["lr"]) for r in run.records()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = new_run(tmp_path_factory.mktemp("straight"))
    go_on(run)
    return run


# fit


def test_it_begins_where_the_run_stands_and_yields_each_step(tmp_path, straight):
    assert [r["step"] for r in straight.records()] == list(range(1, 8))
    run = new_run(tmp_path)
    assert go_on(run) == list(range(8))
    assert go_on(run) == [7]  # it is done
    assert saved(run) == saved(straight) and losses(run) == losses(straight)


@pytest.mark.parametrize("accumulate, min_lr", [(1, 0.0), (2, 1e-3)])
def test_it_makes_the_steps_of_a_plain_loop(tmp_path, accumulate, min_lr):
    run, model = new_run(tmp_path), make_model()
    go_on(run, accumulate=accumulate, min_lr=min_lr)
    optimizer, s = AdamW(model.parameters()), SMALL
    with Trainer(model, optimizer, seed=1) as trainer:
        done = [trainer.step(i, BATCHES[i], cosine_schedule(i, 7, s.lr, min_lr, 2), 0.5, accumulate)
                for i in range(7)]
    assert losses(run) == [(d.step, d.loss, d.norm, d.lr) for d in done]
    tensors, _ = saved(run)
    assert all(tensors[f"model.{name}"] == p.data.tobytes() for name, p in model.named_parameters())


def test_it_is_saved_when_the_program_has_dealt_with_the_step(tmp_path, monkeypatch):
    happened, save, log = [], RunDirectory.save, RunDirectory.log
    monkeypatch.setattr(RunDirectory, "save", lambda run, step, *a: (
        happened.append(("save", step)), save(run, step, *a)))
    monkeypatch.setattr(RunDirectory, "log", lambda run, **r: (
        happened.append(("log", r["step"])), log(run, **r)))
    go_on(new_run(tmp_path))
    places = [happened.index(("save", step)) for step in (3, 6, 7)]
    assert [happened[i - 1] for i in places] == [("log", 3), ("log", 6), ("log", 7)]
    assert len(happened) == 7 + 3


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_that_fails_goes_on_from_its_checkpoint(tmp_path, straight, step):
    def fail(trainer, done):
        if done.step == step:
            raise OSError("no room")

    run = new_run(tmp_path)
    with pytest.raises(OSError, match="no room"):
        go_on(run, after=fail)
    assert go_on(run) == list(range((step - 1) // 3 * 3, 8))
    assert saved(run) == saved(straight) and losses(run) == losses(straight)


def press(times, step):
    def after(trainer, done):
        for _ in range(times * (done.step == step and done.targets > 0)):
            signal.raise_signal(signal.SIGINT)
    return after


def test_a_first_ctrl_c_saves_and_ends(tmp_path, straight):
    run = new_run(tmp_path)
    assert go_on(run, after=press(1, 2)) == [0, 1, 2]
    assert saved(run)[1] == 2
    assert go_on(run) == [2, 3, 4, 5, 6, 7]
    assert saved(run) == saved(straight) and losses(run) == losses(straight)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    run, before = new_run(tmp_path), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go_on(run, after=press(2, 4))
    assert saved(run)[1] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_with_the_last_step_is_not_lost(tmp_path, straight):
    run = new_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        go_on(run, after=press(1, 7))
    assert saved(run) == saved(straight)
    assert go_on(run) == [7]


def test_what_more_than_the_model_trains_is_saved_too(tmp_path):
    class Projected(LabelLoss):
        project = Linear(13, 13, np.random.default_rng(0), bias=False, std=0.3)

        def __call__(self, model, tokens, targets, totals):
            return super().__call__(lambda tokens: self.project(model(tokens)), tokens, targets,
                                    totals=totals)

    whole, loss, run = Module(), Projected(), new_run(tmp_path)
    whole.model, whole.project = make_model(), loss.project
    first = loss.project.weight.data.copy()
    optimizer = AdamW(whole.parameters())
    for _, done in fit(run, whole.model, BATCHES, SMALL, loss, optimizer=optimizer, saved=whole):
        assert done.step == 0 or done.targets == 24
    tensors, _ = saved(run)
    assert tensors["model.project.weight"] == loss.project.weight.data.tobytes() != first.tobytes()
    assert "model.model.embed.weight" in tensors and "m.project.weight" in tensors


@pytest.mark.parametrize("dtype, scaled", [("float32", False), ("float16", True)])
def test_float16_has_a_scaler(tmp_path, dtype, scaled):
    model = make_model().astype(dtype)
    s = dataclasses.replace(SMALL, steps=2, dtype=dtype)
    run, optimizer = new_run(tmp_path), AdamW(model.parameters())
    for trainer, _ in fit(run, model, BATCHES, s, optimizer=optimizer):
        assert (trainer.scaler is not None) == scaled
    assert ("scaler" in checkpoint.load(run.path / "checkpoints")[1]) == scaled


def test_validation_is_of_each_every_th_row():
    model = make_model()
    rows = data.cut(STREAM, 6)
    trainer = Trainer(model, AdamW(model.parameters()))
    for every in (1, 4):
        loss, right = trainer.evaluate(*(a[::every] for a in rows))
        found = validation(trainer, rows, every)
        assert found == {"validation_loss": round(loss, 5), "validation_accuracy": round(right, 5)}


# Settings


@dataclass(frozen=True)
class Settings(Training):
    steps: int = 5
    colour: str = "red"


def test_a_programs_settings_are_flat_and_a_resumed_run_keeps_its_own(tmp_path):
    run, s = resumed(Settings(colour="blue"), None)
    assert run is None and s.workers == default_workers()[0] and s.steps == 5
    made = RunDirectory.create(tmp_path, "run", asdict(dataclasses.replace(s, workers=3)), [])
    stored = json.loads((made.path / "run.json").read_text())["settings"]
    assert stored["colour"] == "blue" and stored["workers"] == 3 and stored["batch"] == 16
    run, own = resumed(Settings(), made.path)
    assert run.path == made.path and own == dataclasses.replace(s, workers=3)
    with pytest.raises(ValueError, match=r"others are given: workers 2 \(it has 3\)"):
        resumed(Settings(workers=2), made.path)
    with pytest.raises(FormatError, match=r"missing: \['colour'\], unknown: \[\]"):
        other = RunDirectory.create(tmp_path, "other", asdict(Training()), [])
        resumed(Settings(), other.path)


@pytest.mark.parametrize("change, said", [
    (dict(eval_every=0), "eval_every must be at least 1, got 0"),
    (dict(save_every=-1), "save_every must be at least 1, got -1"),
    (dict(workers=-1), "workers must be at least 0, got -1"),
])
def test_settings_that_make_no_loop_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Training(**change)


SHARED = ("batch steps lr warmup clip dtype eval_every save_every seed workers threads").split()
OWN = {  # of the programs' runs as they are on people's disks
    pretrain: "corpus weights validation tokenizer vocab_size family layers heads width context "
    "dropout accumulate min_lr beta2 weight_decay prompt sample",
    finetune: "method model data train test known r alpha rslora targets dropout kind",
}


@pytest.mark.parametrize("program", OWN, ids=lambda program: program.__name__)
def test_settings_keep_their_names(program):
    assert {f.name for f in dataclasses.fields(program.Settings)} == {
        *SHARED, *OWN[program].split()}
    assert [f.name for f in dataclasses.fields(Training)] == SHARED


def test_distillations_settings_keep_their_names():
    assert {f.name for f in dataclasses.fields(distill.Settings)} == set(
        "corpus validation teacher objective layers heads width context teacher_steps keep "
        "student_width steps temperature weights reverse masked_only top_k sweep batch lr prompt "
        "seed workers threads".split())


def test_a_run_on_other_corpora_is_refused(tmp_path):
    run = RunDirectory.create(tmp_path, "run", {}, [{"name": "a"}])
    run.check([{"name": "a"}], "the text is not the one that")
    said = f"{run.path}: the text is not the one that this run was started on"
    with pytest.raises(ValueError, match=re.escape(said)):
        run.check([{"name": "b"}], "the text is not the one that")


# The end of a program


@pytest.mark.parametrize("error", [
    ValueError("bad"), OSError("bad"), ImportError("bad"), RuntimeError("bad"), Diverged("bad")])
def test_what_is_wrong_is_one_line(monkeypatch, error):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/program.py"])
    with pytest.raises(SystemExit, match=r"^program\.py: bad$"):
        command(main)


def test_a_note_is_the_next_line(monkeypatch, tmp_path):
    errors = {"x: No space left": OSError(28, "No space left", "x"),
              "worker process 1 died": RuntimeError("worker process 1 died")}

    def main():
        with RunDirectory(tmp_path).going_on():
            raise errors[said]

    monkeypatch.setattr(sys, "argv", ["program.py"])
    for said in errors:
        with pytest.raises(SystemExit, match=f"^program.py: {said}\ngo on with: --resume "
                                             f"{re.escape(str(tmp_path))}$"):
            command(main)


def test_ctrl_c_is_a_line_and_a_bug_stays_one(monkeypatch):
    def main(number: int):
        raise {1: KeyboardInterrupt, 2: ZeroDivisionError}[number]

    monkeypatch.setattr(sys, "argv", ["program.py", "--number", "1"])
    with pytest.raises(SystemExit, match=r"^\nstopped$"):
        command(main)
    with pytest.raises(SystemExit, match=r"^\nstopped at once$"):
        command(main, stopped="stopped at once")
    for words, error in ((["--number", "2"], ZeroDivisionError), (["--number", "3"], KeyError)):
        monkeypatch.setattr(sys, "argv", ["program.py", *words])
        with pytest.raises(error):
            command(main)


def test_ctrl_c_asks_first_and_interrupts_then():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with finish_on_interrupt() as interrupted:
            assert not interrupted()
            signal.raise_signal(signal.SIGINT)
            assert interrupted()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with finish_on_interrupt():
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
