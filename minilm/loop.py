"""The loop of a training program: its settings, and `fit`, which the program iterates over.

    for trainer, done in fit(run, model, batches, settings, optimizer=optimizer):
        if done.targets:  # a step was made; the first time there was none
            run.log(**asdict(done))

`fit` goes on from the run's last checkpoint, makes the steps, saves, and handles Ctrl-C. The
program decides when to evaluate and what to log. It does so in the body of the loop, before `fit`
saves or makes the next step.
"""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from tqdm import tqdm

from minilm.data import IGNORED
from minilm.files import FormatError
from minilm.nn import Module
from minilm.optim import LossScaler, cosine_schedule
from minilm.parallel.cores import default_workers
from minilm.parallel.zero import Zero
from minilm.ranges import AT_LEAST_0, LIMIT, check, check_stored, one_of, whole
from minilm.ranks import RankTrainer
from minilm.run import RunDirectory
from minilm.train import Diverged, Step, Trainer


@dataclass(frozen=True)
class Training:
    """Settings that training programs share. A program's own settings extend them.

    ValueError for a setting out of its range, TypeError for one of another type.
    """

    RANGES: ClassVar = {
        "batch": whole(1), "steps": whole(0), "lr": AT_LEAST_0, "warmup": whole(0), "clip": LIMIT,
        "dtype": one_of("float32", "bfloat16", "float16"), "eval_every": whole(1),
        "save_every": whole(1), "seed": whole(0), "workers": whole(0)}

    batch: int = 16
    """rows in a step"""
    steps: int = 1200
    """updates in the whole run"""
    lr: float = 5e-3
    """learning rate after the warmup; from there it falls as a cosine"""
    warmup: int = 60
    """steps of linear warmup"""
    clip: float = 1.0
    """largest global norm of the gradient; inf for none"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of weights and activations; 16 bits have float32 masters, float16 also has a loss scaler"""
    eval_every: int = 250
    """steps between evaluations on held-out data"""
    save_every: int = 500
    """steps between checkpoints"""
    seed: int = 0
    """of everything random: weights, batches, dropout"""
    workers: int = 0
    """cores to use; 0 means all"""
    threads: bool = False
    """use threads rather than processes as workers"""

    def __post_init__(self):
        check_stored(self.RANGES, **vars(self))


def resumed(settings, resume: Path | None, given=frozenset()):
    """(the run to go on with, or None; its own settings, or those given).

    given: the names of the options that were given, where that is known (see command.py); otherwise
    a setting counts as given if it is not its default. If workers is 0, it becomes the number of
    cores. It is stored, since another number of workers gives other bits. ValueError if what is
    given differs from the run's own.
    """
    cores = default_workers()[0]
    if resume is None:
        return None, replace(settings, workers=settings.workers or cores)
    if "out" in given:
        raise ValueError("the run keeps its folder: give --resume or --out, not both")
    if "workers" in given:
        settings = replace(settings, workers=settings.workers or cores)
    run = RunDirectory(resume)
    own = run.settings(settings, given)
    own = replace(own, workers=own.workers or cores)
    run.warn_of_other_bits(own.workers)
    return run, own


def refuse_unused(given, names, why: str):
    """ValueError if one of these options was given, though it decides nothing; why: the reason."""
    if wrong := sorted({*names} & given):
        raise ValueError(f"{wrong[0]} is given, but {why}")


def fit(run: RunDirectory, model: Module, batches, settings: Training, loss=None, *, optimizer,
        min_lr: float = 0.0, accumulate: int = 1, saved: Module | None = None,
        title: str | None = None) -> Iterator[tuple[Trainer, Step]]:
    """Train from the run's last checkpoint on; yields (trainer, step), first before any step.

    The first Step says where the run stands, with targets=0. After it comes one for each step that
    was made. When the program has dealt with a step, a checkpoint is saved if one is due.
    batches[step] is a step's batch. loss: as in train.py. optimizer: AdamW, or one that also has
    `states`, over everything that trains. MeZO needs one worker, clip=inf and float32; a Zero's
    ranks all call fit, with a RankRun. min_lr: learning rate at the end. accumulate: micro-batches
    of a step. saved: what checkpoints hold, if more than the model trains. title: of the bar.

    After a first Ctrl-C the current step is finished and saved, and training stops; a second one
    interrupts at once. If the first comes during the last step, it is raised after everything is
    saved. RuntimeError if another process trains this run.

    FormatError if the checkpoint is not of this run, as if it lies behind the run's last step.
    ValueError if weights are not finite before the first step. Diverged if they are not when they
    are to be saved, or if every step of the run had to be skipped; then nothing is saved.
    """
    check({"min_lr": AT_LEAST_0, "accumulate": whole(1)}, min_lr=min_lr, accumulate=accumulate)
    s, saved = settings, saved or model
    scaler = LossScaler() if s.dtype == "float16" else None
    schedule = partial(cosine_schedule, steps=s.steps, lr=s.lr, min_lr=min_lr, warmup=s.warmup)
    with run.alone(), trainer_of(model, optimizer, s, scaler, loss) as trainer:
        step = run.restore(saved, optimizer, scaler)
        if step > s.steps:
            raise FormatError(run.path / "checkpoints", f"state.json: step is {step}, but the run "
                              f"ends after {s.steps}")
        with trainer.whole():
            model.require_finite()
        yield trainer, Step(step, math.nan, math.nan, 0.0, targets=0, seconds=0.0)
        last, named = step >= s.steps, f", {title}" if title else ""
        with finish_on_interrupt() as interrupted, tqdm(
                total=s.steps, initial=step, desc=title, unit="step", disable=None) as bar:
            while not last:
                done = trainer.step(step, batches[step], schedule(step), s.clip, accumulate)
                step, speed = done.step, done.targets / done.seconds
                bar.update()
                bar.desc = f"loss {done.loss:.3f}{named}: "  # in front, which a narrow bar keeps
                bar.set_postfix_str(f"{speed:,.0f} targets/s")
                yield trainer, done
                stopped = trainer.agreed(interrupted())
                last = step == s.steps or stopped
                if last or step % s.save_every == 0:
                    with trainer.whole():
                        require_good(step, step == s.steps, saved, optimizer)
                    run.save(step, saved, optimizer, scaler)
        if trainer.agreed(interrupted()) and step == s.steps:
            raise KeyboardInterrupt


def trainer_of(model: Module, optimizer, s: Training, scaler, loss) -> Trainer:
    """The trainer that such an optimizer needs."""
    if isinstance(optimizer, Zero):
        return RankTrainer(model, optimizer, s.seed, scaler, loss)
    cores, processes = default_workers()
    return Trainer(model, optimizer, s.workers or cores, processes and not s.threads, s.seed,
                   scaler, loss)


def require_good(step: int, at_end: bool, model: Module, optimizer):
    """Diverged if what was trained is not worth saving."""
    if at_end and not optimizer.steps:
        raise Diverged(f"each of the {step} steps overflowed and was skipped; nothing was learned "
                       "and nothing is saved")
    try:
        model.require_finite()
    except ValueError as error:
        raise Diverged(f"after step {step}: {error}; nothing is saved") from None


def validation(trainer: Trainer, held_out, every: int = 1) -> dict:
    """Loss and accuracy on each `every`-th row of the held-out data, for the log; on all rows if
    those have no target."""
    every = every if (held_out[1][::every] != IGNORED).any() else 1
    loss, accuracy = trainer.evaluate(*(rows[::every] for rows in held_out))
    return {"validation_loss": round(loss, 5), "validation_accuracy": round(accuracy, 5)}


@contextmanager
def finish_on_interrupt():
    """A first Ctrl-C only makes the yielded function return True; a second one interrupts.

    So a run saves at SIGINT even if a script has started it with &, which makes programs ignore
    SIGINT: it is how a script asks a run to stop. A second one then stays ignored.
    Only the main thread may say what Ctrl-C does; in another one nothing changes.
    """
    pressed = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def press(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
