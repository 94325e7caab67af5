"""Say before a run how much memory it takes, and whether that fits.

    python scripts/plan_memory.py --model runs/pretrain-1/model --batch 16   # any folder, any bits
    python scripts/plan_memory.py --family llama --layers 80 --width 8192 --hidden 22016 \\
        --vocab-size 32000 --context 512 --dtype bfloat16 --checkpoint-every 1 --rank 16 \\
        --targets all-linear --device cuda --card 48
    python scripts/plan_memory.py --check           # predicted and measured side by side
    python scripts/plan_memory.py --lectures        # the arithmetic of the lectures

Prints, for each method of finetune.py that is asked for, the bytes of weights, adapters, gradients,
optimizer states and activations. Activations are all else that is alive at the highest moment of a
training step. The numbers follow from the shapes and from what each op keeps for its backward pass
(minilm/measure/plan.py). Of a folder it also says what loading it and generating with it take, and
whether that fits this machine. No weight is read for that.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from minilm.command import Given, command
from minilm.interop.sizes import Sizes, read_shape, sizes
from minilm.loop import refuse_unused
from minilm.measure.fit import available, generating
from minilm.measure.lectures import print_lectures
from minilm.measure.memory import measured
from minilm.measure.plan import Plan, plan
from minilm.measure.step import LOW_RANK, Step, parameters, trainable
from minilm.measure.step import METHODS as NAMES
from minilm.transformer import Config

Method = Literal[NAMES]


@dataclass(frozen=True)
class Widths:
    """The sizes of a model that is not in a folder."""

    family: Literal["gpt2", "llama", "bert"] = "gpt2"
    """its architecture"""
    layers: int | None = None
    """blocks of the model"""
    width: int | None = None
    """numbers that stand for a token"""
    heads: int | None = None
    """attention heads in a block; by default one for every 64 of the width"""
    kv_heads: int | None = None
    """llama's key and value heads; by default as many as heads"""
    hidden: int | None = None
    """width of the MLP; by default 4 times the width, for llama 8/3 of it"""
    vocab_size: int = 50257
    """tokens that the model knows"""


@dataclass(frozen=True)
class Sizing:
    """The sizes of what a method adds; each means something to one or two of them."""

    k: int = 2
    """blocks that top trains"""
    m: int = 16
    """numbers in the middle of a bottleneck"""
    form: Literal["H", "P", "L"] = "H"
    """where bottlenecks are: H after attention and MLP, P after the MLP, L the same with a norm"""
    skip: int = 0
    """lowest blocks that get no bottleneck"""
    length: int = 16
    """rows of a prompt or a prefix, in front of the context's tokens"""
    prefix_hidden: int | None = None
    """width of an MLP that makes a prefix while it trains; by default there is none"""
    d: int = 1000
    """numbers that a subspace trains"""


USES = {"k": ("top",), "d": ("subspace",), **dict.fromkeys(("m", "form", "skip"), ("bottleneck",)),
        "length": ("prompt", "prefix"), "prefix_hidden": ("prefix",), "rank": LOW_RANK,
        "targets": (*LOW_RANK, "ia3")}  # an option, and the methods to which it means something


def main(model: Path | None = None, widths: Annotated[Widths, tyro.conf.arg(name="")] = Widths(),
         method: tuple[Method, ...] = ("full", "lora", "qlora"), batch: int = 1,
         context: int | None = None, rank: int = 8, targets: tuple[str, ...] = (),
         added: Annotated[Sizing, tyro.conf.arg(name="")] = Sizing(),
         dtype: Literal["float32", "bfloat16", "float16"] = "float32", checkpoint_every: int = 0,
         device: Literal["cpu", "cuda"] = "cpu", card: float | None = None, check: bool = False,
         lectures: bool = False, given: Given = frozenset()):
    """Say how much memory a training run takes.

    Args:
        model: Hugging Face folder, quantized or not; for the table its config.json is enough. Or
            give layers and width.
        widths: the sizes of a model that is not in a folder.
        method: as in finetune.py. Only full, lora and qlora have activations that are exact.
        batch: rows in a step.
        context: tokens in a row; by default as many as the model takes, 1024 if it is no folder's.
        rank: of the adapters; adalora's first one.
        targets: layers that get adapters, such as q v mlp.up, or all-linear; by default q v, for
            ia3 k v down.
        added: the sizes of what a method adds.
        dtype: of weights and adapters; AdamW has float32 gradients, states and masters.
        checkpoint_every: blocks in a checkpointed segment; 0 keeps every activation.
        device: cuda works on whole arrays, cpu on blocks that fit its cache.
        card: memory in GB (10^9 bytes) that the run should fit in.
        check: measure a step of small models, and print how far off the prediction is.
        lectures: print the lectures' numbers from these formulas.
        given: names of the options on the command line.
    """
    if check or lectures:
        if len(given) > 1:
            raise ValueError("check and lectures have their own models and take no other option; "
                             f"got {', '.join(sorted(given))}")
        (print_check if check else print_lectures)()
        return
    if card is not None and not card > 0:
        raise ValueError(f"card must be a positive number of GB, got {card}")
    require_used(method, given)
    if model and (widths != Widths() or given & {field.name for field in fields(Widths)}):
        raise ValueError(f"give either a model's folder or its widths, got both {model} and "
                         "--family, --layers, --width, ...")
    in_front = added.length if {*USES["length"]} & {*method} else 0
    config, bits = read_shape(model) if model else (
        make_config(widths, context and context + in_front), None)
    if bits:
        method = of_codes(model, bits, method, given)
    length = config.context - in_front if context is None else context
    steps = [Step(config, m, batch, length, rank, targets_of(m, targets), dtype, checkpoint_every,
                  device, **vars(added)) for m in method]
    print_plans(steps, model and sizes_of(model, dtype), bits, card)


def require_used(method, given: Given):
    """ValueError if there is no method, or an option that means nothing to any of them."""
    if not method:
        raise ValueError(f"method must be some of {', '.join(NAMES)}, got none")
    refuse_unused(given, [option for option, some in USES.items() if not {*some} & {*method}],
                  f"the method is {' '.join(method)}")


def targets_of(method: str, targets: tuple[str, ...]) -> tuple[str, ...] | str:
    """The layers that get adapters, as a Step takes them; without targets the method's own."""
    if not targets:
        return ("k", "v", "down") if method == "ia3" else ("q", "v")
    return "all-linear" if targets == ("all-linear",) else targets


def print_plans(steps: list[Step], held: Sizes | None, bits: int | None, card: float | None):
    """Print the table, and of a folder's model what else it takes."""
    s, plans = steps[0], [plan(step) for step in steps]
    if held and bits:
        plans = [p._replace(weights=held.weights) for p in plans]
    print(f"{parameters(s.config):,} parameters, {s.batch} x {s.T} tokens, {s.dtype} on {s.device}")
    print_table(steps, plans, card)
    if held:
        print_folder(held, generating(s.config, s.batch, s.T, s.dtype, bits), s.batch, s.T)


def of_codes(model: Path, bits: int, method, given: Given):
    """The methods for a model that is quantized: adapters alone. ValueError for others."""
    if "method" in given and set(method) != {"qlora"}:
        raise ValueError(f"{model} is quantized to {bits} bits, which are not trained: give "
                         "--method qlora, adapters on them")
    return ("qlora",)


def sizes_of(model: Path, dtype: str) -> Sizes | None:
    """What loading the folder takes; None if it has a config.json and no weights."""
    try:
        return sizes(model, dtype)
    except FileNotFoundError:
        return None


def print_folder(held: Sizes, more: int, batch: int, length: int):
    """Print what loading a folder and generating with it take, and whether this machine has it."""
    free = available()
    lines = {f"the folder's {amount(held.stored)}, loaded": held.loading,
             f"writing {batch} x {length} tokens, about": held.weights + more}
    if free is not None:
        print(f"available on this machine: {amount(free)}")
    for title, n in lines.items():
        fits = "" if free is None else ", fits" if n <= free else f", short of {amount(n - free)}"
        print(f"{title}: {amount(n)}{fits}")


def print_table(steps: list[Step], plans: list[Plan], card: float | None):
    """Print a column a method, a line a kind of memory."""
    lines = {"": [step.method for step in steps],
             "trained": [f"{trainable(step):,}" for step in steps]}
    for kind in (*Plan._fields, "total"):
        lines[kind] = [amount(getattr(p, kind)) for p in plans]
    if card:
        over = [p.total - card * 1e9 for p in plans]
        lines[f"{card:g} GB"] = ["fits" if n <= 0 else f"short of {amount(n)}" for n in over]
    width = max(len(cell) for cells in lines.values() for cell in cells) + 2
    for kind, cells in lines.items():
        print(f"{kind:12}" + "".join(cell.rjust(width) for cell in cells))


def amount(n: float) -> str:
    """Bytes in MB (10^6) or GB (10^9)."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.2f} MB"


def make_config(w: Widths, context: int | None) -> Config:
    """The Config of a model of these widths, by default for 1024 tokens."""
    context = 1024 if context is None else context
    if w.layers is None or w.width is None:
        raise ValueError(f"give --model, or --layers and --width; got layers {w.layers}, "
                         f"width {w.width}")
    shape = dict(vocab_size=w.vocab_size, context=context, layers=w.layers, width=w.width,
                 heads=max(1, w.width // 64) if w.heads is None else w.heads)
    if w.family == "llama":
        hidden = 8 * w.width // 3 if w.hidden is None else w.hidden
        return Config.llama(**shape, hidden=hidden, kv_heads=w.kv_heads)
    if w.kv_heads is not None:
        raise ValueError(f"kv_heads is for llama only, got {w.kv_heads} for {w.family}")
    hidden = 4 * w.width if w.hidden is None else w.hidden
    return (Config.gpt2 if w.family == "gpt2" else Config.bert)(**shape, hidden=hidden)


SIZES = {"S": (Config.gpt2(256, 64, 4, 4, 128), 12), "M": (Config.gpt2(512, 256, 6, 6, 384), 8),
         "wide vocabulary": (Config.gpt2(1024, 128, 4, 8, 256), 8)}
METHODS = (("full", ("q", "v")), ("lora", ("q", "v")), ("lora", "all-linear"),
           ("qlora", ("q", "v")), ("qlora", "all-linear"))


def print_check():
    """Print predicted and measured bytes of a step, for three sizes and five ways to train."""
    print(f"{'size':17}{'method':8}{'targets':12}{'predicted':>13}{'measured':>13}{'error':>8}")
    cases = [(*size, *how) for size in SIZES.items() for how in METHODS]
    for name, (config, batch), method, targets in tqdm(cases, unit="step", leave=False,
                                                       disable=None):
        step = Step(config, method, batch, config.context, targets=targets)
        predicted, found = plan(step).total, sum(measured(step).values())
        on = "" if method == "full" else targets if type(targets) is str else " ".join(targets)
        tqdm.write(f"{name:17}{method:8}{on:12}{predicted / 1e6:10.2f} MB{found / 1e6:10.2f} MB"
                   f"{predicted / found - 1:8.1%}")


if __name__ == "__main__":
    command(main)
