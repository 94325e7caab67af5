"""Train a small language model from nothing, on text that comes with Python.

    python scripts/pretrain.py                      # about two minutes on two cores
    python scripts/pretrain.py --resume runs/pretrain-1

Shows the loss as it falls and a sample of what the model writes before the first step, after 100
steps and at the end: random bytes, then words, then sentences. Leaves a run directory with the
metrics, their curves, checkpoints, and the model as a Hugging Face folder.
"""

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from minilm import data
from minilm.generate import generate
from minilm.interop import huggingface
from minilm.optim import AdamW, LossScaler, cosine_schedule
from minilm.run import RunDirectory
from minilm.tensor import no_grad
from minilm.train import Diverged, Trainer, default_workers, finish_on_interrupt, train
from minilm.transformer import Config, Transformer


@dataclass(frozen=True)
class Settings:
    """What decides a run."""

    corpus: tuple[str, ...] = ("python-reference",)
    """python-reference, python-docstrings, python-source, or paths of text files and folders"""
    weights: tuple[float, ...] = ()
    """how often each corpus is drawn from; by default in proportion to its size"""
    validation: float = 0.1
    """share of each corpus that is held out"""
    tokenizer: str = "bytes"
    """bytes, chars, bpe, or the path of a tokenizer.json"""
    vocab_size: int = 2048
    """tokens of a bpe tokenizer, which is trained on the corpus"""
    family: Literal["gpt2", "llama", "bert"] = "gpt2"
    """architecture; bert learns to fill in masked tokens, the others to go on"""
    layers: int = 4
    """blocks of the model"""
    heads: int = 4
    """attention heads in a block"""
    width: int = 128
    """numbers that stand for a token; a multiple of heads"""
    context: int = 128
    """tokens in a row"""
    dropout: float = 0.0
    """share of the activations that a training step leaves out"""
    batch: int = 16
    """rows in a step"""
    accumulate: int = 1
    """micro-batches, one after another, in which a step's rows are run"""
    steps: int = 1200
    """updates in the whole run"""
    lr: float = 5e-3
    """learning rate after the warmup; from there it falls as a cosine"""
    min_lr: float = 3e-4
    """learning rate at the end"""
    warmup: int = 60
    """steps of linear warmup"""
    beta2: float = 0.95
    """decay of AdamW's second moment"""
    weight_decay: float = 0.1
    """on matrices only"""
    clip: float = 1.0
    """largest global norm of the gradient"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of weights and activations; those of 16 bits have float32 masters, float16 a loss scaler"""
    eval_every: int = 250
    """steps between losses on held-out text"""
    save_every: int = 500
    """steps between checkpoints"""
    prompt: str = "If the object "
    """what the samples go on from"""
    sample: int = 300
    """tokens in a sample"""
    seed: int = 0
    """of weights, batches, dropout and samples"""
    workers: int = 0
    """cores to use; 0 means all"""
    threads: bool = False
    """use threads rather than processes as workers"""


def main(settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),
         out: Path = Path("runs"), resume: Path | None = None):
    """Train a small language model.

    Args:
        settings: what decides the run.
        out: folder in which the run gets a folder of its own.
        resume: folder of a run to go on with, bit for bit, under its own settings.
    """
    if min(settings.eval_every, settings.save_every) < 1:
        raise ValueError("eval_every and save_every must be at least 1")
    if not settings.corpus or not settings.prompt:
        raise ValueError("corpus and prompt must not be empty")
    run = RunDirectory(resume) if resume else None
    s = run.settings(settings) if run else settings
    corpora = [data.load_corpus(name) for name in progress(s.corpus, "reading", "corpus")]
    described = [{"name": c.name, "sha256": c.sha256, "characters": c.characters} for c in corpora]
    if run and run.describe()["corpora"] != described:
        raise ValueError(f"{resume}: the text is not the one that this run was started on")
    parts = [data.split(corpus, s.validation) for corpus in corpora]
    stored = run and data.load_tokenizer(run.path / "tokenizer.json")
    tokenizer = stored or make_tokenizer(s, parts)
    batches, held_out = make_batches(s, parts, tokenizer)
    model = make_model(s, tokenizer.vocab_size).astype(s.dtype)
    if run is None:
        s = replace(s, workers=s.workers or default_workers()[0])  # other counts, other bits
        run = RunDirectory.create(out, "pretrain", asdict(s), described)
        tokenizer.save(run.path / "tokenizer.json")
    pretrain(run, s, model, batches, held_out, tokenizer)


def pretrain(run: RunDirectory, s: Settings, model, batches, held_out, tokenizer):
    """Train, evaluate, sample and save until the last step or Ctrl-C."""
    params, (_, processes) = model.parameters(), default_workers()
    optimizer = AdamW(params, s.lr, (0.9, s.beta2), weight_decay=s.weight_decay,
                      undecayed=[p for p in params if p.ndim < 2])
    scaler = LossScaler() if s.dtype == "float16" else None
    step = run.restore(model, optimizer, scaler)
    size = sum(p.size for p in params)
    print(f"{run.path}: {size:,} parameters, {s.workers} workers, from step {step}")
    show = partial(show_sample, run, model, tokenizer, s)
    schedule = partial(cosine_schedule, steps=s.steps, lr=s.lr, min_lr=s.min_lr, warmup=s.warmup)
    with Trainer(model, optimizer, s.workers, processes and not s.threads, s.seed,
                 scaler) as trainer:
        if step == 0:  # in here, where BLAS has one thread: two may wait for each other
            show(step)
        with finish_on_interrupt() as interrupted, tqdm(
                total=s.steps, initial=step, unit="step", disable=None) as bar:
            for done in train(trainer, batches, s.steps, schedule, step, s.clip, s.accumulate):
                step, last = done.step, done.step == s.steps or interrupted()
                bar.update()
                speed = done.targets / done.seconds
                bar.set_postfix_str(f"loss {done.loss:.3f}, {speed:,.0f} tokens/s")
                validation = {}
                if step % s.eval_every == 0 or step == s.steps:
                    validation = evaluate(trainer, held_out, every=1 if step == s.steps else 4)
                    bar.write(f"step {step}: held out: loss {validation['validation_loss']:.4f}, "
                              f"next token right {validation['validation_accuracy']:.1%}")
                run.log(**asdict(done), **validation)
                if step % s.save_every == 0 or last:
                    run.save(step, model, optimizer, scaler)
                if step in (100, s.steps):
                    show(step)
                if last:
                    break
    finish(run, model, tokenizer, step, s.steps)


def evaluate(trainer, held_out, every: int) -> dict:
    """Loss and accuracy on each `every`-th row of the held-out text."""
    loss, accuracy = trainer.evaluate(*(rows[::every] for rows in held_out))
    return {"validation_loss": round(loss, 5), "validation_accuracy": round(accuracy, 5)}


def finish(run, model, tokenizer, step, steps):
    """Write the model and the curves, and say where."""
    huggingface.save_model(model, run.path / "model")
    tokenizer.save(run.path / "model" / "tokenizer.json")
    drawn = run.plot()
    if step < steps:
        print(f"stopped after step {step}; go on with: --resume {run.path}")
        return
    print(f"curves: {drawn}" if drawn else 'for curves: pip install "minilm[plots]"')
    print(f"write more: python scripts/generate.py --model {run.path / 'model'}")


def show_sample(run, model, tokenizer, s: Settings, step: int):
    """Print and keep what the model writes now (bert: how it fills in masked tokens)."""
    if model.config.causal:
        prompt = tokenizer.encode(s.prompt)[None]
        text = tokenizer.decode(generate(model, prompt, s.sample, temperature=0.7, seed=s.seed)[0])
    else:
        tokens = tokenizer.encode(s.prompt)[None, : s.context]
        text = tokenizer.decode(fill_in(model, tokens, tokenizer, s.seed)[0])
    tqdm.write(f"--- after step {step}\n{data.printable(text)}\n---")
    run.write_sample(step, text)


def fill_in(model, tokens, tokenizer, seed):
    """The tokens with 15 % masked and guessed by the model."""
    masked, targets = data.corrupt(tokens, np.random.default_rng(seed), tokenizer)
    with no_grad():
        guesses = model.eval()(masked).data.argmax(-1)
    return np.where(targets == data.IGNORED, tokens, guesses)


def make_batches(s: Settings, parts, tokenizer):
    """(batches of the training parts, rows of those held out): as the family learns."""
    streams = [data.pack(progress(training, "tokens of the text", "document"), tokenizer)
               for training, _ in parts]
    weights = s.weights or [len(stream) for stream in streams]
    batches = data.Batches(streams, weights, s.batch, s.context, s.seed)
    held_out = data.cut(np.concatenate([data.pack(v, tokenizer) for _, v in parts]), s.context)
    if s.family == "bert":
        batches = data.MaskedBatches(batches, tokenizer, s.seed)
        held_out = data.corrupt(held_out[0], np.random.default_rng(s.seed), tokenizer)
    return batches, held_out


def make_tokenizer(s: Settings, parts):
    training = [text for documents, _ in parts for text in documents]
    if s.tokenizer == "bytes":
        return data.ByteTokenizer()
    if s.tokenizer == "chars":  # an alphabet must have every character that it will meet
        held_out = [text for _, validation in parts for text in validation]
        return data.CharTokenizer.train([s.prompt, *held_out, *training])
    if s.tokenizer == "bpe":
        documents = progress(training, "words for the tokenizer", "document")
        return data.BPETokenizer.train(documents, s.vocab_size)
    return data.load_tokenizer(s.tokenizer)


def progress(items, title: str, unit: str):
    """The items, with a bar that goes when they are through."""
    return tqdm(items, title, unit=unit, leave=False, disable=None)


def make_model(s: Settings, vocab_size: int) -> Transformer:
    shape = dict(vocab_size=vocab_size, context=s.context, layers=s.layers, heads=s.heads,
                 width=s.width, dropout=s.dropout)
    if s.family == "gpt2":
        return Transformer(Config.gpt2(**shape), s.seed)
    if s.family == "llama":  # SwiGLU has three matrices: 8/3 of the width gives two of four's size
        return Transformer(Config.llama(**shape, hidden=8 * s.width // 3), s.seed)
    return Transformer(Config.bert(**shape, hidden=4 * s.width), s.seed)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError, ImportError, Diverged) as error:
        sys.exit(f"pretrain.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped at once; a run that had begun goes on with --resume")
