"""minilm.loop and minilm.command: what a training program is given by `fit` and in which order,
stopping and resuming, Ctrl-C, the settings that are shared, and how every program ends."""

import dataclasses
import json
import math
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import distill
import finetune
import numpy as np
import pretrain
import pytest

from minilm import checkpoint, data
from minilm.command import command
from minilm.files import FormatError
from minilm.interop import huggingface, peft
from minilm.loop import Training, finish_on_interrupt, fit, resumed, validation
from minilm.nn import Linear, Module
from minilm.optim import SGD, AdamW, cosine_schedule
from minilm.parallel.cores import default_workers
from minilm.peft import add_lora
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


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, ctrl_c):
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


def test_sgd_is_saved_and_resumed(tmp_path):
    runs = []
    for stops in ((7,), (3, 7)):
        run = new_run(tmp_path)
        for steps in stops:
            model = make_model()
            optimizer, s = SGD(model.parameters(), 0.1), dataclasses.replace(SMALL, steps=steps)
            for _ in fit(run, model, BATCHES, dataclasses.replace(s, warmup=9),
                         optimizer=optimizer):
                pass
        runs.append(saved(run))
    assert runs[0] == runs[1] and runs[0][1] == 7


# Weights that are none


class Spoiled(LabelLoss):
    """A loss that is no number after so many steps."""

    def __init__(self, after):
        self.after, self.calls = after, 0

    def __call__(self, model, *rows, totals):
        loss, self.calls = super().__call__(model, *rows, totals=totals), self.calls + 1
        return loss * (math.nan if self.calls > self.after else 1.0)


def fit_spoiled(run, loss, dtype="float16", model=None, spoilt=None, **changes):
    """Train; a weight is spoilt after that step."""
    model = model or make_model(0.0).astype(dtype)
    s = dataclasses.replace(SMALL, dtype=dtype, **changes)
    for _, done in fit(run, model, BATCHES, s, loss, optimizer=AdamW(model.parameters())):
        if done.step == spoilt:
            model.embed.weight.data[0, 0] = math.inf


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_whose_every_step_overflows_saves_nothing(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(Diverged, match=r"each of the 2 steps overflowed and was skipped; "):
        fit_spoiled(run, Spoiled(0), steps=2)
    assert not (run.path / "checkpoints").exists()
    fit_spoiled(run, Spoiled(1), steps=2)  # of one that learned something, the rest is kept
    assert saved(run)[1] == 2
    with pytest.raises(Diverged, match="loss scale down to"):
        fit_spoiled(new_run(tmp_path), Spoiled(1), steps=99)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path, dtype):
    run = new_run(tmp_path)
    fit_spoiled(run, None, dtype, steps=3)
    before = saved(run)
    said = r"after step 4: embed\.weight: 1 of its .* not finite; nothing is saved"
    with pytest.raises(Diverged, match=said):
        fit_spoiled(run, None, dtype, steps=4, spoilt=4)
    assert saved(run) == before


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_run_does_not_begin_with_weights_that_are_not_finite(tmp_path, factor):
    model, run = make_model(), new_run(tmp_path)
    model.blocks[0].mlp.up.weight.data[1, 2:4] = factor
    with pytest.raises(ValueError, match=r"^blocks\.0\.mlp\.up\.weight: 2 of its 256 numb"):
        fit_spoiled(run, None, "float32", model)
    with pytest.raises(ValueError, match=r"not finite"):
        huggingface.save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists() and not (run.path / "checkpoints").exists()
    add_lora(model := make_model(), 2, 4)
    model.blocks[0].attention.q.adapters["default"].B.data[0] = factor
    with pytest.raises(ValueError, match=r"B: 2 of its 16 numbers are not finite"):
        peft.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    huggingface.save_model(make_model(), tmp_path / "model")


# Trainer's own border


@pytest.mark.parametrize("wrong, said", [
    (dict(lr=math.nan), "lr must be finite and at least 0, got nan"),
    (dict(lr=-1.0), "lr must be finite and at least 0, got -1.0"),
    (dict(clip=0.0), "clip must be positive, got 0.0"), (dict(clip=-1.0), "clip must be positive"),
    (dict(accumulate=0), "accumulate must be at least 1, got 0"),
    (dict(step=-1), "step must be at least 0, got -1")])
def test_bad_steps_are_refused_and_change_nothing(wrong, said):
    trainer = Trainer(model := make_model(0.0), AdamW(model.parameters()))
    before = trainer.optimizer.flat.data.copy()
    with pytest.raises(ValueError, match=f"^{said}"):
        trainer.step(**dict(step=0, batch=BATCHES[0]) | wrong)
    assert np.array_equal(trainer.optimizer.flat.data, before) and not trainer.optimizer.steps


def test_bad_trainers_are_refused():
    model = make_model()
    for wrong, said in ((dict(workers=0), "workers must be at least 1, got 0"),
                        (dict(seed=-1), "seed must be at least 0, got -1")):
        with pytest.raises(ValueError, match=f"^{said}$"):
            Trainer(model, AdamW(model.parameters()), **wrong)
    for wrong in (dict(min_lr=-1.0), dict(accumulate=0)):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            list(fit(None, model, BATCHES, SMALL, optimizer=AdamW(model.parameters()), **wrong))


def test_an_optimizer_of_another_model_is_an_error():
    model, other = make_model(0.0), make_model(0.0)
    with Trainer(model, AdamW(other.parameters())) as trainer:
        with pytest.raises(ValueError, match="no parameter of the optimizer has a gradient"):
            trainer.step(0, BATCHES[0])


@pytest.mark.parametrize("workers, processes", [(1, False), (2, False), (2, True)])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_parameter_without_a_gradient_stays_with_any_workers(workers, processes):
    model = make_model(0.0)
    extra = Linear(3, 5, np.random.default_rng(0))
    params = [*extra.parameters(), *model.parameters()]
    model.extra = extra  # is not called
    before = [p.data.copy() for p in params]
    with Trainer(model, AdamW(params, 0.1, weight_decay=0.1), workers, processes) as trainer:
        trainer.step(0, BATCHES[0])
    changed = [not np.array_equal(p.data, old) for p, old in zip(params, before)]
    assert changed == [False] * 2 + [True] * (len(params) - 2)


def test_validation_is_of_each_every_th_row():
    model = make_model()
    rows = data.cut(STREAM, 6)
    trainer = Trainer(model, AdamW(model.parameters()))
    for every in (1, 4):
        loss, right = trainer.evaluate(*(a[::every] for a in rows))
        found = validation(trainer, rows, every)
        assert found == {"validation_loss": round(loss, 5), "validation_accuracy": round(right, 5)}


def test_a_masked_models_few_targets_are_found_wherever_they_are():
    """Every fourth row may have none. If no row has one, that is said before the training."""
    tokenizer, texts = data.ByteTokenizer(), ["and so on it goes, to the end of it", "ab"]
    with pytest.raises(ValueError, match="held-out texts are too short: none of their 2 tokens is"):
        for seed in range(20):  # chance decides, once in three seeds
            data.batches_of([[[text] for text in texts]], tokenizer, 2, 8, seed, masked=True)
    model = Transformer(Config.bert(258, 8, 1, 2, 8, 16))
    tokens, targets = np.ones((5, 8), int), np.full((5, 8), -100)
    targets[2, 3] = 7
    trainer = Trainer(model, SGD(model.parameters()))
    assert validation(trainer, (tokens, targets), 4) == validation(trainer, (tokens, targets))


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
METHODS = ("r last alpha rslora targets kind k m form skip length hidden d said projection "
           "attention_dropout")
OWN = {  # of the programs' runs as they are on people's disks
    pretrain: "corpus weights validation tokenizer vocab_size family layers heads width bias "
    "context dropout accumulate min_lr beta2 weight_decay prompt sample init method " + METHODS,
    finetune: "model data train test reverse known replay replay_from accumulate method dropout "
              "weight_decay optimizer eps " + METHODS,
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


def test_ctrl_c_asks_first_and_interrupts_then(ctrl_c):
    with finish_on_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with finish_on_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_in_the_background_of_a_script_hears_the_first_one_too(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with finish_on_interrupt() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_thread_trains_without_a_word_on_ctrl_c():
    def work():
        with finish_on_interrupt() as interrupted:
            return interrupted()

    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is False
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_behind_the_end_is_not_of_this_run(tmp_path):
    run = new_run(tmp_path)
    go_on(run)
    with pytest.raises(FormatError, match=r"step is 7, but the run ends after 5"):
        go_on(run, dataclasses.replace(SMALL, steps=5))
