"""One trial of an experiment: adapt a model to small tasks by one method, then see what it can do.

An arm of such an experiment is a few settings of `Trial`, which are options of finetune.py:

    ARMS = {"full": {"method": "full", "lr": 1e-3}, "LoRA, r = 4": {"r": 4, "lr": 3e-3}}

The tasks are on words of 3 or 4 letters out of 8. Full fine-tuning and LoRA learn them to the end,
so their scores hold over seeds and over models. With 26 letters, up to 6 in a word, and sums of two
numbers, the same number of steps ends in the steep part of the curve, and says more about the seed
than about the method.

`program` makes the experiment's main function, which runs every arm on every seed; `tried` is one
of these runs. Rates decide more than methods do, so each arm needs the one that is best for it. To
find it, run the experiment with --rates on a seed that is not reported.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from minilm import adapting, data
from minilm.adapting import METHODS, Adapting, optimizer_and_loss
from minilm.command import Given
from minilm.experiment import Experiment, conduct
from minilm.files import read_json, remove, write_json
from minilm.interop import load_model, save_adapter, save_model
from minilm.loop import Training, fit, refuse_unused
from minilm.measure.answers import answers
from minilm.measure.losses import bits_per_byte, loss_of
from minilm.parallel.cores import default_workers
from minilm.peft import add_prefix, degrees_of_freedom, trainable_parameters
from minilm.ranges import optional, whole
from minilm.run import newest_model, share_held_out
from minilm.transformer import Config, Transformer
from minilm.versions import fingerprints

TASKS = ("reverse", "upper", "sort", "last")
ROOM = "room for text, tokens"
WORDS = data.Words("a", "h", 3, 4)
RIGHT, LOSS = "answered rightly, %", "loss of answers, nats a token"
KNOWN, TRAINED = "old text, bits a byte", "trained parameters"
MS, KEPT, SHARE = "ms a step", "kept, kB", "kept, % of the model's file"
MEASURES = {RIGHT: 1, LOSS: 3, KNOWN: 2, TRAINED: 0, MS: 0, KEPT: 0, SHARE: 1}


@dataclass(frozen=True)
class Trial(Adapting, Training):
    """What decides a trial's numbers, together with the model that is adapted."""

    model: str = ""
    """folder of the model"""
    tasks: tuple[str, ...] = TASKS
    """what it learns, among data.TASKS"""
    words: data.Words = WORDS
    """what these tasks draw"""
    batch: int = 8
    """records in a step"""
    steps: int = 2000
    """updates in the whole run; 0: the model stays as it is"""
    warmup: int = 100
    """steps of linear warmup"""
    save_every: int = 1000
    """steps between checkpoints"""
    train: int = 2000
    """records of each task to learn from"""
    test: int = 200
    """other records of each task, which are asked"""
    documents: int | None = None
    """held-out documents of the old text; None: all"""
    beside: int = 0
    """rows of a prefix that learns beside a method of low rank"""

    RANGES: ClassVar = Training.RANGES | Adapting.RANGES | {
        "train": whole(1), "test": whole(1), "documents": optional(whole(1)),
        "beside": whole(0)}
    OWN: ClassVar = False  # are its records others than those of `records_of`?


MADE = cache(data.make_tasks)
QUICK = {"batch": 4, "steps": 4, "warmup": 1, "workers": 1, "train": 16, "test": 2, "documents": 1}


def low_rank(r: int) -> dict:
    """Settings of LoRA at rank r: alpha is 2 r, and the rate falls with the rank.

    Of rates a factor of about 3 apart, 1e-2 was best for r = 1 and 3e-3 for r = 8, and the next
    higher one broke both; what this gives for r = 64, 1.2e-3, learned as much as full fine-tuning.
    """
    return {"r": r, "alpha": 2.0 * r, "lr": float(f"{1e-2 / math.sqrt(r):.2g}")}


def writer(config: Config, folder: Path):
    """ValueError for the facts of a folder's model that cannot give answers."""
    config.require_writer(folder, "gives answers")


def program(experiment: Experiment, measured: Callable | None = None, kind: type[Trial] = Trial,
            require: Callable[[Config, Path], None] = writer):
    """The main function of an experiment whose arms are settings of Trial, or of a kind of it.

    measured: what gives an arm's numbers, (Trial, RunDirectory, title) -> {measure: number}; by
    default `tried`. kind: Trial with more settings. require: raises ValueError for a model that
    is of no use; by default one that cannot give answers. ValueError for such a model, for one that
    an arm's method is not for, and for options that cannot be together.
    """
    def main(seeds: tuple[int, ...] = (0, 1, 2), quick: bool = False, out: Path = Path("runs"),
             model: tuple[Path, ...] = (), arms: tuple[str, ...] = (),
             rates: tuple[float, ...] = (), resume: Path | None = None, keep: bool = False,
             given: Given = frozenset()):
        if resume:
            refuse_unused(given, ("out",),
                          "the run keeps its folder: give --resume or --out, not both")
        if quick:
            refuse_unused(given, ("model",), "a quick run makes a tiny model of its own")
        if arms or rates:
            refuse_unused(given, ("keep",), "these are not all arms at their own rates")
        chosen = narrowed(experiment, arms, rates)
        bases = [] if quick else list(model) or [newest(require)]
        trials = {arm: trial_of(own, quick, kind) for arm, own in chosen.arms.items()}
        for folder in bases:  # if it is of no use, fail before the run gets a folder
            require(load_model(folder).config, folder)
            require_methods(folder, trials)
        settings = {"bases": [fingerprints(folder) for folder in bases],
                    "arms": {arm: asdict(trial) for arm, trial in trials.items()}}

        def run_arm(arm: str, seed: int, run) -> dict:
            folder = str(bases[seed % len(bases)]) if bases else ""
            s = replace(trials[arm], seed=seed, model=folder)
            return (measured or tried)(s, run, f"{arm}, seed {seed}")

        options = [word for name, values in
                   [("model", bases), ("arms", arms), ("rates", rates)] if values
                   for word in (f"--{name}", *map(str, values))]
        return conduct(chosen, run_arm, seeds, settings, options, quick, out, resume, keep)
    main.__doc__ = f"{experiment.question}\n\n{OPTIONS}"
    return main


OPTIONS = """
Args:
    seeds: of records, adapters and batches; every arm runs on each seed.
    quick: end in seconds, on a tiny model that knows nothing; the numbers mean nothing.
    out: the run gets a folder of its own in here.
    model: folders of n base models, with a tokenizer.json each; seed s adapts number s mod n. By
        default the newest runs/pretrain-*/model that is of use. The intervals from one base say
        nothing about another base.
    arms: run only these.
    rates: run every arm that learns at each of these learning rates, to find its best one.
    resume: folder of a run to go on with; arms and seeds that are done are not run again.
    keep: leave the result beside this program, for the page that report.py makes.
    given: names of the options on the command line.
"""


def newest(require: Callable[[Config, Path], None]) -> Path:
    """The newest of pretrain.py's models that are of use."""
    def fits(folder):
        try:
            require(load_model(folder).config, folder)
        except ValueError:
            return False
        return True
    return newest_model(Path("runs"), "pretrain-*", fits)


def narrowed(experiment: Experiment, arms, rates) -> Experiment:
    """The experiment with these of its arms, or all, each at every rate, or at its own."""
    if unknown := sorted({*arms} - {*experiment.arms}):
        raise ValueError(f"there is no arm {unknown[0]!r}, only "
                         f"{', '.join(map(repr, experiment.arms))}")
    chosen = {arm: own for arm, own in experiment.arms.items() if arm in (arms or [arm])}
    if not rates:
        return replace(experiment, arms=chosen)
    swept = {f"{arm}, lr {lr:g}": own | {"lr": lr} for arm, own in chosen.items() for lr in rates
             if own.get("steps") != 0 and own.get("lr") != 0}
    if not swept:
        raise ValueError(f"{', '.join(chosen)} learns nothing, so no rate is best for it")
    return replace(experiment, arms=swept, slide={}, claims={}, draw=None)


def trial_of(own: dict, quick: bool, kind: type[Trial] = Trial) -> Trial:
    """A trial with an arm's settings, or a tiny one with them."""
    if not quick:
        return kind(**{"workers": default_workers()[0]} | own)
    return kind(**own | QUICK | {"steps": min(QUICK["steps"], own.get("steps", Trial.steps))})


def require_methods(folder, trials: dict[str, Trial]):
    """ValueError if an arm's method is not for the model in the folder, or leaves no room for the
    tasks."""
    for arm, s in trials.items():
        if not s.steps:
            continue
        model, tokenizer = base(folder)
        try:
            model = prepared(model, replace(s, model=str(folder)))
            if not s.OWN and data.TASKS.keys() >= {*s.tasks}:
                data.encode(records_of(s)[1], tokenizer, context=model.room)
        except ValueError as error:
            raise ValueError(f"{folder} is not for the arm {arm!r}: {error}") from None


def prepared(model, s: Trial):
    """The model, ready to learn by the settings' method."""
    model = adapting.prepared(model, s)
    return add_prefix(model, s.beside, seed=s.seed) if s.beside else model


def tried(s: Trial, run, title: str, records=None) -> dict:
    """The numbers of MEASURES and of each task, after the model has learned the tasks.

    records: (to learn from, to be asked), if they are not those of the settings' tasks.
    """
    train, test = records or records_of(s)
    model, tokenizer = base(s.model)
    model, trained, seconds = learned(model, tokenizer, train, s, run, title)
    return {**right(model, tokenizer, test), LOSS: loss_of_answers(model, tokenizer, test),
            KNOWN: old_text(model, tokenizer, s), TRAINED: trained, ROOM: model.room,
            MS: 1e3 * seconds, **kept(model, tokenizer, s, run.path / "kept")}


def records_of(s: Trial) -> tuple[list, list]:
    """(to learn from, to be asked) of the settings' tasks."""
    return MADE(s.tasks, s.train, s.test, s.seed, s.words)


def learned(model, tokenizer, records, s: Trial, run, title: str,
            watch: Callable = lambda trainer, done: None):
    """(the model after it has learned the records, how many numbers it trained, seconds a step).

    The seconds are the median of the steps since the run last went on; 0 without a step.
    watch(Trainer, Step) is called where the run stands, and after each step.
    """
    if not s.steps:
        return model, 0, 0.0
    model = prepared(model, s)
    batches = data.InstructionBatches(records, tokenizer, s.batch, None, s.seed, model.room)
    return taught(model, batches, s, run, title, watch)


def taught(model, batches, s: Trial, run, title: str,
           watch: Callable = lambda trainer, done: None):
    """The same for a model that is prepared, and for any batches."""
    optimizer, loss = optimizer_and_loss(model, s)
    seconds, median = [], run.path / "seconds.json"  # of a step, if no step is left to be made
    for trainer, done in fit(run, model, batches, s, loss, optimizer=optimizer, title=title):
        seconds += [done.seconds] * (done.targets > 0)
        if done.step == s.steps and seconds:
            write_json(median, float(np.median(seconds)))
        watch(trainer, done)
    if done.step < s.steps:  # by Ctrl-C
        raise KeyboardInterrupt
    return model, degrees_of_freedom(model), read_json(median)


def base(folder: str):
    """A model and its tokenizer, which ends a text as the model does; tiny ones without a folder.
    """
    if not folder:
        return Transformer(Config.gpt2(258, 192, layers=2, heads=2, width=64)), data.ByteTokenizer()
    model, tokenizer = load_model(folder), data.load_tokenizer(Path(folder) / "tokenizer.json")
    data.adopt_end(tokenizer, model.ends.eos)
    return model, tokenizer


def right(model, tokenizer, test) -> dict[str, float]:
    """Per cent of the records that are answered rightly: of all, and of each task."""
    found = {}
    for record, said in zip(test, answers(model, test, tokenizer)):
        found.setdefault(f"{record.task}, %", []).append(100 * data.score(record, said))
    found = {task: float(np.mean(scores)) for task, scores in found.items()}
    return {RIGHT: float(np.mean(list(found.values()))), **found}


def loss_of_answers(model, tokenizer, records) -> float:
    """Nats a token of the right answers, ends included."""
    return loss_of(model, *data.encode(records, tokenizer, context=model.room))


def old_text(model, tokenizer, s: Trial) -> float:
    """Bits a byte of the text that pretrain.py does not train on."""
    documents = held_out(share_of(s))[: s.documents]
    tokens, targets = data.rows_of(documents, tokenizer, model.room)
    size = sum(len(document.encode()) for document in documents)
    counted = int((targets != data.IGNORED).sum())
    return bits_per_byte(loss_of(model, tokens, targets), counted, size)


def share_of(s: Trial) -> float:
    """The share of the text that the model's run held out, or what pretrain.py does by default."""
    return (share_held_out(s.model) if s.model else None) or 0.1


@cache
def held_out(share: float):
    """The held-out part of the text."""
    return data.split(data.load_corpus("python-reference"), share)[1]


def kept(model, tokenizer, s: Trial, folder: Path) -> dict[str, float]:
    """The size of what was learned, as it is saved, in kB and beside the model's own file."""
    if not s.steps:
        return {KEPT: 0.0, SHARE: 0.0}
    whole = sum(t.data.nbytes for _, t in base(s.model)[0].named_tensors())
    method = METHODS[s.method]
    if s.beside:  # PEFT has one method in a folder
        size = sum(p.data.nbytes for p in trainable_parameters(model))
    elif method.whole:
        save_model(method.finish(model), folder, tokenizer)
    else:
        save_adapter(model, folder)
    if not s.beside:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        remove(folder)
    return {KEPT: size / 1e3, SHARE: 100 * size / whole}
