"""Teach a trained model to follow instructions: train all of it, or adapters on a frozen base.

    python scripts/finetune.py                      # LoRA on the newest model, about two minutes
    python scripts/finetune.py --method qlora       # the same on a base of 4 bits
    python scripts/finetune.py --method prefix --length 8          # adapting.py lists all
    python scripts/finetune.py --method full --model runs/pretrain-1/model
    python scripts/finetune.py --method full --replay 0.2          # forgets less of its old text
    python scripts/finetune.py --method bitfit --optimizer mezo --lr 1e-2   # no backward pass
    python scripts/finetune.py --data mine.jsonl    # records of instruction, context, output
    python scripts/finetune.py --data mine.jsonl --reverse    # what was asked, out of the output
    python scripts/finetune.py --data talks.jsonl   # conversations: messages of role and content
    mpiexec -n 4 python scripts/finetune.py --stage 3        # four processes share a step

Without a file the model learns five small tasks on words and numbers. The program prints the share
of held-out records that the model answers rightly before and after, and some answers. It also
prints the loss on the text that the model was trained on, to show what it still knows. A run
directory keeps the adapter as a PEFT folder, or bottlenecks and subspaces in one of our own. If
full, top or bitfit change the model's own weights, it keeps the model as a Hugging Face folder.

Of conversations it learns the assistant's messages. They are written as the model's chat template
says, which is kept with what was learned; a model without one gets the format of records (needs
the extra `chat`). Their answers are not scored.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import tyro
from tqdm import tqdm

from minilm import data, versions
from minilm.adapting import METHODS, Adapting, optimizer_and_loss, prepared
from minilm.command import Given, command, many, typed
from minilm.continued import trained_on
from minilm.files import sha256
from minilm.interop import load_model, require_folder, save_adapter, save_model
from minilm.interop.folder import own_format
from minilm.joining import Connected, Device, adamw_of, again, begun, crew, joined, new_run
from minilm.lessons import Lesson, conversations, instructions, load_data
from minilm.loop import Training, fit, refuse_unused
from minilm.optim import MeZO
from minilm.peft import degrees_of_freedom
from minilm.ranges import BELOW_1, POSITIVE, one_of, optional, whole
from minilm.run import newest_model, share_held_out
from minilm.together import settle


@dataclass(frozen=True)
class Settings(Adapting, Training):
    """What decides a run."""

    model: str = ""
    """Hugging Face folder, quantized or not, with a tokenizer.json; by default the newest
    runs/pretrain-*/model"""
    data: tuple[str, ...] = ("reverse", "upper", "sort", "last", "add")
    """tasks (these, triangle, table, sql, similarity), or the path of a JSONL file"""
    train: int | None = None
    """records to train on, of each task or of the file; by default 2000 of a task, all of a file"""
    test: int = 100
    """records to hold out, of each task or of the file; those with the same prompt stay together"""
    reverse: bool = False
    """play the records the other way round: out of an output, learn what was asked"""
    known: tuple[str, ...] = ("python-reference",)
    """corpora that show what the model still knows, by what its run held out of them, or a tenth"""
    replay: float = 0.0
    """share of a step's rows that are old text, in the place of records, so that less is forgotten;
    of the part of the text that was not held out"""
    replay_from: tuple[str, ...] = ()
    """corpora of the old text; by default those that the model's run says it was trained on"""
    steps: int = 4000
    """updates in the whole run"""
    lr: float = 0.0
    """learning rate after the warmup; it falls as a cosine; 0 means the method's own, which is a
    starting point"""
    optimizer: Literal["adamw", "mezo"] = "adamw"
    """mezo: two forward passes a step and the memory of inference, but many more steps. It needs a
    learning rate of its own, and has no gradient to clip"""
    eps: float = 1e-3
    """how far mezo moves the parameters to see the slope; 1e-2 for adapters and biases"""
    warmup: int = 100
    """steps of linear warmup"""
    accumulate: int = 1
    """a step's rows are run in this many micro-batches, one after another"""
    eval_every: int = 1000
    """steps between losses on the held-out records"""
    save_every: int = 1000
    """steps between checkpoints"""

    RANGES: ClassVar = Training.RANGES | Adapting.RANGES | {
        "steps": whole(1), "test": whole(1), "train": optional(whole(1)),
        "optimizer": one_of("adamw", "mezo"), "eps": POSITIVE, "replay": BELOW_1,
        "accumulate": whole(1)}
    LATER: ClassVar = (  # that earlier runs do not have
        *Adapting.LATER, "optimizer", "eps", "reverse", "replay", "replay_from",
        "accumulate")


def main(settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),
         out: Path = Path("runs"), resume: Path | None = None, stage: int | None = None,
         device: Device = "cpu", given: Given = frozenset(), comm: Connected = None):
    """Teach a trained model to follow instructions.

    Args:
        settings: what decides the run.
        out: the run gets a folder of its own in here.
        resume: folder of a run to go on with, bit for bit, under its own settings.
        stage: how mpiexec's processes share a step: 0 DDP, 1 ZeRO-1, 2 ZeRO-2, 3 FSDP.
        device: of the ranks; cuda is one GPU a rank, and needs a stage.
        given, comm: names of the options on the command line; the ranks.
    """
    ranks = joined(stage, comm, device)
    run, s = begun(ranks, settings, resume, given)
    s = s if run else sensible(s, given)
    folder = Path(s.model) if s.model else newest_model(Path("runs"), "pretrain-*")
    s = replace(s, model=str(folder), lr=s.lr or METHODS[s.method].lr)
    settle(folder)  # so that all that is read of it is new
    require_folder(folder)
    tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    templates = data.read_templates(folder) or {"default": data.plain(tokenizer)}
    records = load_data(s)
    talks = not isinstance(records[1][0], data.Record)
    if not run:
        require_enough(s, records[0])
    described = fingerprints(s, records, talks and templates)
    corpora = [data.load_corpus(name) for name in s.known]
    old = trained_on(folder, s.replay_from) if s.replay else []
    decisive = [*versions.fingerprints(folder), *named(corpora), *named(old, "replay: ")]
    if run:
        run.check(described, "the model or the data are not those", decisive)
    base = load_model(folder)
    base.config.require_writer(folder, "gives answers")
    data.adopt_end(tokenizer, base.ends.eos)
    chat = data.load_chat(folder, tokenizer, templates) if talks else None
    model = prepared(base, s).astype(s.dtype)
    lesson = (conversations(*records, chat, model, s.batch, s.seed) if talks else
              instructions(*records, tokenizer, model, s.batch, s.seed))
    share = share_held_out(folder) or 0.1
    known = {corpus.name: data.rows_of(data.split(corpus, share)[1], tokenizer, model.room)
             for corpus in corpora}  # as in pretrain.py
    require_rows(model, s, [*lesson.batches.rows, lesson.held_out, *known.values()])
    lesson = replaying(lesson, old, share, tokenizer, model, s) if old else lesson
    if run is None:
        run = new_run(ranks, out, f"finetune-{s.method}", asdict(s), described, decisive)
    print(f"{many(len(records[0]), 'conversation' if talks else 'record')} to train on, "
          f"{len(records[1]):,} held out")
    with run.going_on():
        finetune(run, s, model, tokenizer, templates, lesson, known, ranks)


def named(corpora, prefix: str = "") -> list[dict]:
    """Names and SHA-256 of corpora, for run.json."""
    return [{"name": prefix + corpus.name, "sha256": corpus.sha256} for corpus in corpora]


def require_enough(s: Settings, records):
    """ValueError if there are fewer records to train on than the settings ask for."""
    if s.train and len(records) < s.train:
        raise ValueError(f"{' '.join(s.data)}: train is {s.train}, but only {len(records)} "
                         "records are left to train on")


def require_rows(model, s: Settings, rows):
    """ValueError if an id of these arrays has no row in the model's embedding."""
    if (largest := max(int(a.max()) for row in rows for a in row)) >= model.config.vocab_size:
        raise ValueError(f"{s.model}: the tokenizer gives the id {largest}, but the model has "
                         f"{model.config.vocab_size} rows")


def replaying(lesson: Lesson, old, share: float, tokenizer, model, s: Settings) -> Lesson:
    """The lesson with old text among its rows, without the share that is held out."""
    texts = [text for corpus in old for text in data.split(corpus, share)[0]]
    batches = data.replay_text(lesson.batches, texts, tokenizer, s.replay)
    require_rows(model, s, [(batches.old.tokens,)])
    print(f"{s.replay:.0%} of the rows are old text, of {', '.join(c.name for c in old)}")
    return lesson._replace(batches=batches)


def sensible(s: Settings, given) -> Settings:
    """The settings of a new run. ValueError for those that mean nothing to its method or optimizer.
    """
    refuse_unused(given, METHODS[s.method].without, f"the method is {s.method}")
    if not s.replay:
        refuse_unused(given, ("replay_from",), "replay is 0")
    if s.optimizer == "adamw":
        refuse_unused(given, ("eps",), "the optimizer is adamw")
        return s
    refuse_unused(given, ("clip", "workers", "threads", "accumulate"), "mezo has no gradient to "
                  "clip, to add up or to share between workers")
    refuse_unused(given, ("weight_decay",), "mezo has none")
    if s.dtype != "float32":
        raise ValueError(f"dtype is {s.dtype}, but mezo keeps no float32 masters, without which "
                         "small updates are lost")
    if s.method in ("adalora", "subspace"):
        raise ValueError(f"{s.method} goes by gradients, and mezo has none")
    if not s.lr:
        raise ValueError("mezo needs a learning rate of its own: give --lr, such as 3e-4 if full, "
                         "1e-3 for lora, 1e-2 for bitfit")
    return replace(s, clip=math.inf, workers=1)


def finetune(run, s: Settings, model, tokenizer, templates, lesson: Lesson, known, ranks=None):
    """Train, and print what the model can do and what it still knows, before and after."""
    optimizer, loss = ((MeZO(model.parameters(), s.lr, s.eps, seed=s.seed), None)
                       if s.optimizer == "mezo" else
                       optimizer_and_loss(model, s, adamw_of(ranks, model)))
    trained = degrees_of_freedom(model)
    examine = partial(examined, model, lesson, known)
    for trainer, done in fit(run, model, lesson.batches, s, loss, optimizer=optimizer,
                             accumulate=s.accumulate):
        if not done.targets:
            print(f"{run.path}: {s.method} on {s.model}, {trained:,} trainable "
                  f"parameters, {crew(ranks, s)}, from step {done.step}"
                  + ", its last" * (done.step == s.steps))
            last = (run.records() or [{}])[-1]
            # 0.1.0 may have stopped between the last step and its examination
            if not last or (done.step == s.steps and "right" not in last):
                run.log(**examine(trainer, done.step))
            continue
        if done.step % s.eval_every == 0:
            loss, _ = trainer.evaluate(*lesson.held_out)
            tqdm.write(f"step {done.step}: held out: loss {loss:.4f}")
        run.log(**asdict(done))
        if done.step == s.steps:
            run.log(**examine(trainer, done.step))
    if run.writes:
        finish(run, model, tokenizer, templates, s, done.step, lesson.prompt, ranks)


def examined(model, lesson: Lesson, known, trainer, step: int) -> dict:
    """Losses, and the share of records answered rightly by task; prints some answers."""
    with trainer.whole():
        right, shown = lesson.ask(model)
    for text in shown:
        tqdm.write(f"step {step}: {data.printable(text)[:100]}")
    known = {name: trainer.evaluate(*rows)[0] for name, rows in known.items()}
    return {"step": step, "right": right, "loss_held_out": trainer.evaluate(*lesson.held_out)[0],
            "loss_known": known}


def finish(run, model, tokenizer, templates, s: Settings, step: int, prompt: str | None,
           ranks=None):
    """Save what was learned, print the scores before and after, and say where everything is."""
    method, trained = METHODS[s.method], degrees_of_freedom(model)
    model = method.finish(model)
    if method.whole:
        save_model(model, kept := run.path / "model", tokenizer)
        use = {"model": kept}
        data.write_templates(kept, templates, data.read_names(Path(s.model), tokenizer))
    else:
        save_adapter(model, kept := run.path / "adapter", base=s.model)
        use = {"model": s.model, "adapter": kept}
        data.write_templates(kept, templates)
    if step < s.steps:
        print(f"stopped after step {step}; go on with: {again(ranks, __file__, run)}")
        return
    records = run.records() or [{}]
    before, after = (run.require(record, right=dict, loss_held_out=float, loss_known=dict)
                     for record in (records[0], records[-1]))
    for name in ("right", "loss_known"):
        run.require(before[name], **dict.fromkeys(after[name], float))
    print_scores(before, after)
    print_sizes(trained, kept, Path(s.model))
    how = {} if prompt is None else {"prompt": prompt}
    ask = typed(Path(__file__).with_name("generate.py"), *["--chat"] * (not how), **use,
                temperature=0, **how)
    print(f"ask it: {ask}")


def print_scores(before: dict, after: dict):
    """Print what `examined` found, before and after."""
    print(f"\n{'':24}{'before':>8}{'after':>8}")
    rows = [(f"{data.printable(task)}: right", before["right"][task], right)
            for task, right in after["right"].items()]
    if len(rows) > 1:
        rows.append(("all: right", *(float(np.mean(list(r["right"].values())))
                                     for r in (before, after))))
    for title, a, b in rows:
        print(f"{title:24}{a:>8.1%}{b:>8.1%}")
    print(f"{'held out: loss':24}{before['loss_held_out']:>8.3f}{after['loss_held_out']:>8.3f}")
    for name, loss in after["loss_known"].items():
        print(f"{name + ': loss':24}{before['loss_known'][name]:>8.3f}{loss:>8.3f}")


def print_sizes(trained: int, kept: Path, base: Path):
    """Print how much was learned: numbers that were trained, and bytes beside the base's."""
    ours, base = (sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                  for folder in (kept, base))
    what = "a folder of our own, which PEFT does not read" if own_format(kept) else kept.name
    print(f"{trained:,} numbers were trained; {ours:,} bytes are kept ({what}), beside the base's "
          f"{base:,}")


def fingerprints(s: Settings, records, templates):
    """Names and SHA-256 of the model's files, of the data and of the templates that they are
    written by, if any: they must not change for a resume."""
    found = {file.name: sha256(file) for file in sorted(Path(s.model).glob("*.safetensors"))}
    found[" ".join(s.data)] = hashlib.sha256(repr(records).encode()).hexdigest()
    if templates:
        found["chat template"] = hashlib.sha256(repr(templates).encode()).hexdigest()
    return [{"name": name, "sha256": digest} for name, digest in found.items()]


if __name__ == "__main__":
    command(main, stopped="stopped at once; a run that had begun goes on with --resume")
