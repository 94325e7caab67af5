"""Train a small language model from nothing, on text that comes with Python, or train one further.

    python scripts/pretrain.py                      # about two minutes on two cores
    python scripts/pretrain.py --resume runs/pretrain-1
    python scripts/pretrain.py --init runs/pretrain-1/model --corpus python-docstrings
    python scripts/pretrain.py --init runs/pretrain-1/model --corpus mine.txt --method lora
    mpiexec -n 4 python scripts/pretrain.py --stage 2        # four processes share a step

Shows the loss as it falls, and a sample of what the model writes before the first step, after 100
steps and at the end: random bytes, then words, then sentences. A run directory keeps the metrics,
their curves, checkpoints, and the model as a Hugging Face folder.

With --init it goes on with the model of a folder: all of its weights, or an adapter on them by one
of finetune.py's methods. It prints the loss on the new text before and after, and on the text that
the model was trained on, as far as a run.json says which that is.
"""

import hashlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import tyro
from tqdm import tqdm

from minilm import data
from minilm.adapting import METHODS, NAMES, Adapting, optimizer_and_loss
from minilm.command import Given, command, typed, utf8
from minilm.continued import load_base, print_losses, refuse_foreign, save_learned
from minilm.extras import told
from minilm.files import json_bytes, sha256
from minilm.generate import generate
from minilm.graph import no_dropout
from minilm.interop import huggingface
from minilm.joining import Connected, Device, adamw_of, again, begun, crew, joined, new_run
from minilm.loop import Training, fit, refuse_unused, validation
from minilm.measure.losses import bits_per_byte
from minilm.new import make_model, make_tokenizer, progress
from minilm.optim import AdamW
from minilm.ranges import AT_LEAST_0, BELOW_1, POSITIVE, each, one_of, optional, whole
from minilm.run import RunDirectory
from minilm.tensor import no_grad


@dataclass(frozen=True)
class Settings(Adapting, Training):
    """What decides a run."""

    init: str = ""
    """folder of a model to go on with, and of its tokenizer; by default the model is new"""
    method: Literal[NAMES] = "full"
    """how the model of --init learns, as in finetune.py; so are the settings of its methods"""
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
    family: Literal["gpt2", "llama", "bert"] = "llama"
    """architecture; bert learns to fill in masked tokens, the others to predict the next one"""
    layers: int = 8
    """blocks of the model"""
    heads: int = 4
    """attention heads in a block"""
    width: int = 64
    """size of the vector that stands for a token; a multiple of heads"""
    bias: bool = False
    """give a llama's linear layers biases; the other families always have them"""
    context: int = 128
    """tokens in a row"""
    dropout: float = 0.0
    """share of the activations, or of an adapter's input, that a training step leaves out"""
    accumulate: int = 1
    """a step's rows are run in this many micro-batches, one after another"""
    batch: int = 8
    """rows in a step"""
    steps: int = 2400
    """updates in the whole run"""
    lr: float | None = None
    """learning rate after the warmup, from where it falls as a cosine; by default 5e-3, of a
    bert 1e-3, with --init the method's own"""
    warmup: int = 120
    """steps of linear warmup"""
    min_lr: float | None = None
    """learning rate at the end; by default a twentieth of lr"""
    beta2: float = 0.95
    """decay of AdamW's second moment"""
    weight_decay: float = 0.1
    """on matrices only"""
    prompt: str = "If the object "
    """text that the samples go on from"""
    sample: int = 300
    """tokens in a sample"""

    LATER: ClassVar = (  # settings that runs of 0.1.0 do not have
        "bias", "init", *(field.name for field in fields(Adapting)))
    RANGES: ClassVar = Training.RANGES | Adapting.RANGES | {
        "steps": whole(1), "lr": optional(POSITIVE), "min_lr": optional(AT_LEAST_0),
        "beta2": BELOW_1, "weight_decay": AT_LEAST_0, "weights": each(AT_LEAST_0),
        "vocab_size": whole(1), "dropout": BELOW_1, "context": whole(1),
        "sample": whole(0), "family": one_of("gpt2", "llama", "bert")}

    @property
    def model(self) -> str:
        """What the methods call the folder of the base."""
        return self.init


LR = {"gpt2": 5e-3, "llama": 5e-3, "bert": 1e-3}  # norms after the branches need less
NOT_WITH_INIT = ["family", "layers", "heads", "width", "bias", "tokenizer", "vocab_size"]


def main(settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),
         out: Path = Path("runs"), resume: Path | None = None, stage: int | None = None,
         device: Device = "cpu", given: Given = frozenset(), comm: Connected = None):
    """Train a small language model, from nothing or further.

    Args:
        settings: what decides the run.
        out: the run gets a folder of its own in here.
        resume: folder of a run to go on with, bit for bit, under its own settings.
        stage: how mpiexec's processes share a step: 0 DDP, 1 ZeRO-1, 2 ZeRO-2, 3 FSDP.
        device: of the ranks; cuda is one GPU a rank, and needs a stage.
        given, comm: names of the options on the command line; the ranks.
    """
    settings = replace(settings, prompt=utf8("prompt", settings.prompt))
    if not settings.corpus or not settings.prompt:
        raise ValueError("corpus and prompt must not be empty")
    ranks = joined(stage, comm, device)
    run, s = begun(ranks, settings, resume, given)
    if not run:
        refuse_idle(s, given)
    s = replace(s, lr=s.lr or (METHODS[s.method].lr if s.init else LR[s.family]))
    if not run and (s.min_lr or 0) > s.lr:
        raise ValueError(f"min_lr must be at most lr, {s.lr}; got {s.min_lr}")
    corpora = data.load_corpora(progress(s.corpus, "reading", "corpus"))
    described = [{"name": c.name, "sha256": c.sha256, "characters": c.characters} for c in corpora]
    parts = [data.split(corpus, s.validation) for corpus in corpora]
    base = load_base(s, {text for texts, _ in parts for text in texts}) if s.init else None
    if run:
        check_same(run, described, base)
    stored = run and data.load_tokenizer(run.path / "tokenizer.json", framed=False)
    tokenizer = base.tokenizer if base else stored or make_tokenizer(s, parts)
    masked = not base.model.config.causal if base else s.family == "bert"
    shown = [(progress(texts, "tokens of the text", "document"), held) for texts, held in parts]
    batches, held_out = data.batches_of(shown, tokenizer, s.batch, s.context, s.seed, s.weights,
                                        masked, [c.name for c in corpora])
    model = base.model if base else make_model(s, tokenizer.vocab_size).astype(s.dtype)
    if run is None:
        written = hashlib.sha256(json_bytes(tokenizer.fields())).hexdigest()
        decisive = [{"name": "tokenizer.json", "sha256": written}, *(base.decisive if base else [])]
        run = new_run(ranks, out, "pretrain", asdict(s), described, decisive,
                      lambda folder: tokenizer.save(folder / "tokenizer.json"))
    tokens = s.batch * s.context * s.steps
    print(data.accounts(corpora, parts, batches.sizes, s.weights, tokens))
    size, known = sum(len(text.encode()) for _, held in parts for text in held), {}
    if base:
        print(*base.unknown, sep="\n", end="\n" * bool(base.unknown))
        known = {name: data.held_out_rows([texts], tokenizer, s.context, s.seed, masked)
                 for name, texts in base.known.items()}
    with run.going_on():
        pretrain(run, s, model, batches, held_out, tokenizer, size, known, ranks)


def check_same(run: RunDirectory, described: list[dict], base):
    """ValueError if the run was started on other text, another model or another tokenizer."""
    own, words = run.path / "tokenizer.json", "the text or the tokenizer is not the one that"
    files = base.decisive if base else []
    known = run.describe().get("base")  # earlier runs know nothing of it
    run.check(described, words.replace(" or", ", the model or") if base else words,
              [{"name": own.name, "sha256": sha256(own)}, *files] if known else ())


def pretrain(run: RunDirectory, s: Settings, model, batches, held_out, tokenizer, size: int,
             known, ranks=None):
    """Train, evaluate on held-out text of `size` bytes, and sample, until the end or Ctrl-C.

    known: rows of each corpus that the model of --init was trained on; it is evaluated on them
    before the first step and after the last.
    """
    optimizer, loss = make_optimizer(model, s, adamw_of(ranks, model))
    min_lr = s.lr / 20 if s.min_lr is None else s.min_lr
    for trainer, done in fit(run, model, batches, s, loss, optimizer=optimizer, min_lr=min_lr,
                             accumulate=s.accumulate):
        if not done.targets:
            trains = f"{sum(p.size for p in model.parameters()):,} " + (
                "trainable parameters" if s.init else "parameters")
            print(f"{run.path}: {f'{s.method} on {s.init}, ' * bool(s.init)}{trains}, "
                  f"{crew(ranks, s)}, from step {done.step}"
                  + ", its last" * (done.step == s.steps))
            if done.step == 0:
                show_sample(run, trainer, tokenizer, s, 0)
            if s.init and not run.records():
                found = evaluate(trainer, 0, 0, held_out, size)
                run.log(step=0, **found, known=losses(trainer, known))
            continue
        due = done.step % s.eval_every == 0 or done.step == s.steps
        found = evaluate(trainer, done.step, s.steps, held_out, size) if due else {}
        if s.init and done.step == s.steps:
            found["known"] = losses(trainer, known)
        run.log(**asdict(done), **found)
        if done.step in (100, s.steps):
            show_sample(run, trainer, tokenizer, s, done.step)
    if run.writes:
        finish(run, model, tokenizer, s, done.step, ranks)


def make_optimizer(model, s: Settings, adamw=AdamW):
    """(AdamW, the loss). What finetune.py's adapters and parts learn does not decay."""
    if s.method != "full":
        return optimizer_and_loss(model, replace(s, weight_decay=0.0), adamw)
    params = model.parameters()
    return adamw(params, s.lr, (0.9, s.beta2), weight_decay=s.weight_decay,
                 undecayed=[p for p in params if p.ndim < 2]), None


def evaluate(trainer, step: int, steps: int, held_out, size: int) -> dict:
    """Loss and accuracy on every fourth row of the held-out text; after the last step on all."""
    found = validation(trainer, held_out, every=4 if step < steps else 1)
    said = f"loss {found['validation_loss']:.4f}"
    if trainer.model.config.causal:  # a masked model predicts only some of the tokens
        targets = int((held_out[1] != data.IGNORED).sum())
        bits = bits_per_byte(found["validation_loss"], targets, size)
        found["bits_per_byte"] = round(bits, 5)
        said += f" ({bits:.3f} bits a byte)"
    tqdm.write(f"step {step}: held out: {said}, "
               f"next token right {found['validation_accuracy']:.1%}")
    return found


def losses(trainer, known) -> dict[str, float]:
    """The loss on the held-out rows of each corpus."""
    return {name: trainer.evaluate(*rows)[0] for name, rows in known.items()}


def finish(run, model, tokenizer, s: Settings, step: int, ranks=None):
    """Save the model, or its adapter, and the curves, and say where they are."""
    use, causal = {"model": run.path / "model"}, model.config.causal
    if s.init:
        use = save_learned(model, s, tokenizer, run.path)
    else:
        huggingface.save_model(model, run.path / "model", tokenizer)
    drawn = run.plot()
    if step < s.steps:
        print(f"stopped after step {step}; go on with: {again(ranks, __file__, run)}")
        return
    if s.init:
        print_losses(run)
    print(told("curves", drawn))
    if causal:
        print(f"write more: {typed(Path(__file__).with_name('generate.py'), **use)}")


def show_sample(run, trainer, tokenizer, s: Settings, step: int):
    """Print and keep what the model writes now; for bert, how it fills in masked tokens."""
    model, prompt = trainer.model, tokenizer.encode(s.prompt)[None]
    with trainer.whole():
        tokens = (generate(model, prompt, s.sample, temperature=0.7, seed=s.seed)
                  if model.config.causal else
                  fill_in(model, prompt[:, : s.context], tokenizer, s.seed))
    text = tokenizer.decode(tokens[0])
    tqdm.write(f"--- after step {step}\n{data.printable(text)}\n---")
    run.write_sample(step, text)


def fill_in(model, tokens, tokenizer, seed):
    """The tokens, 15 % of them masked and guessed by the model."""
    masked, targets = data.corrupt(tokens, np.random.default_rng(seed), tokenizer)
    with no_grad(), no_dropout():
        guesses = model(masked).data.argmax(-1)
    return np.where(targets == data.IGNORED, tokens, guesses)


def refuse_idle(s: Settings, given):
    """ValueError for an option that was given and decides nothing."""
    refuse_foreign(s, given, NOT_WITH_INIT)
    if s.tokenizer != "bpe":
        refuse_unused(given, ["vocab_size"], f"the tokenizer {s.tokenizer} has its own vocabulary")
    if s.family == "bert":
        refuse_unused(given, ["sample"], "bert fills in tokens of the prompt and writes no others")
    if s.family != "llama":
        refuse_unused(given, ["bias"], f"a {s.family} has biases in any case")
    if len(s.corpus) == 1:
        refuse_unused(given, ["weights"], "there is one corpus to draw from")


if __name__ == "__main__":
    command(main, stopped="stopped at once; a run that had begun goes on with --resume")
