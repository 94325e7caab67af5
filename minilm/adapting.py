"""The methods that finetune.py knows: what each does to a model, and how what it learned is kept.

    method      trains                                      is kept as
    full        every weight                                a model
    top         the last k blocks and the last norm         a model
    bitfit      the biases                                  a model
    lora qlora dora adalora ia3                             PEFT's folder
    prompt prefix    rows in front of the text              PEFT's folder
    bottleneck  small MLPs in the blocks                    a folder of our own
    subspace    d numbers that move every weight            a folder of our own

Their settings are one class, from which each takes what means something to it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, NamedTuple

from minilm.measure.step import METHODS as NAMES
from minilm.optim import AdamW
from minilm.optim.inside import Inside
from minilm.peft import (
    Budget,
    Orthogonal,
    add_adalora,
    add_bitfit,
    add_bottleneck,
    add_dora,
    add_ia3,
    add_lora,
    add_prefix,
    add_prompt,
    add_subspace,
    subspace_of,
    train_top,
    trainable_parameters,
)
from minilm.peft.adapted import adapted_layers
from minilm.quantize import is_quantized, quantize_model
from minilm.ranges import AT_LEAST_0, BELOW_1, POSITIVE, check, one_of, optional, whole
from minilm.train import LabelLoss
from minilm.transformer import drop_attention


@dataclass(frozen=True)
class Adapting:
    """Settings of the methods. A program's own settings extend them."""

    method: Literal[NAMES] = "lora"
    """full: every weight. Selective: top, the last blocks; bitfit, the biases. Reparametrised, by
    changes of low rank: lora, dora, adalora; qlora, on a base of few bits; subspace, by few random
    directions. Additive: ia3, scaling vectors; bottleneck, small MLPs; prompt, prefix, rows in
    front of the text"""
    r: int = 8
    """rank of the adapters; adalora's first one"""
    last: int | None = None
    """rank that adalora leaves, on average; by default two thirds of r"""
    alpha: float = 16.0
    """the update is scaled by alpha / r"""
    rslora: bool = False
    """scale the update by alpha / sqrt(r) instead"""
    targets: tuple[str, ...] = ("all-linear",)
    """layers that get an adapter, among q k v o gate up down; all-linear is k v down for ia3"""
    dropout: float = 0.0
    """share of an adapter's input that a training step leaves out"""
    kind: str | None = None
    """quantize the base first: nf4, fp4, nf3, nf2, int4, int3, int2, int8, llm.int8; qlora takes
    nf4 if nothing is given"""
    k: int = 2
    """blocks that top trains"""
    m: int = 16
    """numbers in the middle of a bottleneck"""
    form: Literal["H", "P", "L"] = "H"
    """where bottlenecks are: H after attention and MLP, P after the MLP, L the same with a norm"""
    skip: int = 0
    """lowest blocks that get no bottleneck"""
    length: int = 16
    """rows of a prompt or a prefix, which take as much room from the text"""
    hidden: int | None = None
    """width of an MLP that makes a prefix while it trains; by default there is none. It learns more
    at a smaller rate, such as 1e-2"""
    d: int = 1000
    """numbers that a subspace trains in all"""
    said: bool = False
    """let some of them scale the layers' steps, one for each"""
    projection: Literal["fastfood", "dense"] = "fastfood"
    """of a subspace; dense takes d times the model's memory"""
    attention_dropout: float = 0.0
    """share of what each token attends to that a training step leaves out"""
    weight_decay: float = 0.0
    """AdamW's, on the matrices that train"""

    LATER: ClassVar = (  # that earlier runs do not have
        "d", "said", "projection", "attention_dropout", "weight_decay")

    RANGES: ClassVar = {
        "method": one_of(*NAMES), "r": whole(1), "last": optional(whole(1)), "alpha": POSITIVE,
        "dropout": BELOW_1, "k": whole(1), "m": whole(1), "form": one_of("H", "P", "L"),
        "skip": whole(0), "length": whole(1), "hidden": optional(whole(1)),
        "d": whole(1), "projection": one_of("fastfood", "dense"),
        "attention_dropout": BELOW_1, "weight_decay": AT_LEAST_0}


class Method(NamedTuple):
    """What finetune.py does for a method. The rates are starting points."""

    lr: float
    uses: str  # the settings that mean something to it
    prepare: Callable  # (model, settings) -> the model, ready to train
    whole: bool = False  # is a model saved, not an adapter?
    finish: Callable = lambda model: model  # model -> the same, ready to be saved

    @property
    def without(self) -> list[str]:
        """The settings that mean nothing to it."""
        return [f.name for f in fields(Adapting) if f.name not in ("method", *self.uses.split())]


def everything(model, s):
    """The model as it is."""
    if is_quantized(model):
        raise ValueError(f"{s.model} is quantized, and codes are not trained: use --method lora, "
                         "which leaves them as they are")
    return model


def few_bits(model, s, kind: str | None = None):
    """The model with its linear layers in codes, if the settings say so."""
    kind = s.kind or kind
    if kind and is_quantized(model):
        raise ValueError(f"{s.model} is quantized already: --method lora keeps its codes"
                         if s.method == "qlora" else
                         f"{s.model} is quantized already, but kind is {kind}")
    return quantize_model(model, kind) if kind else model


def low_rank(add, *names: str):
    """A method of `prepare` that gives add the settings of these names."""
    def prepare(model, s):
        targets = s.targets[0] if s.targets == ("all-linear",) else s.targets
        settings = {name: getattr(s, name) for name in names}
        base = few_bits(model, s, "nf4" if s.method == "qlora" else None)
        return add(base, s.r, s.alpha, targets, s.dropout, seed=s.seed, **settings)
    return prepare


def adalora(model, s):
    """The adapters of rank r. The range of `last` is checked before the run."""
    check({"last": optional(whole(1, s.r))}, last=s.last)
    return low_rank(add_adalora)(model, s)


def vectors(model, s):
    """IA3's, with those of `down` on its input."""
    targets = ("k", "v", "down") if s.targets == ("all-linear",) else s.targets
    inner = [t for t in targets if t.split(".")[-1] == "down"]
    return add_ia3(few_bits(model, s), targets, inner)


def bottleneck(model, s):
    """Small MLPs in the blocks."""
    return add_bottleneck(few_bits(model, s), s.m, s.form, s.skip, seed=s.seed)


def prompt(model, s):
    """Rows of the embedding in front."""
    return add_prompt(few_bits(model, s), s.length, seed=s.seed)


def prefix(model, s):
    """Keys and values in front of each layer's. What is saved of an MLP is what it gives."""
    return add_prefix(few_bits(model, s), s.length, hidden=s.hidden, seed=s.seed)


def subspace(model, s):
    """Tensors beside all of the model's, in a subspace."""
    return add_subspace(model, s.d, s.said, s.projection, s.seed)


def with_own_biases(model):
    """BitFit's layers in the place of the model's: merged, but codes stay codes."""
    for path, layer in adapted_layers(model).items():
        model.replace(path, layer.adapters["default"].layer)
    return model


ANY = "attention_dropout weight_decay"
LOW_RANK = f"r alpha dropout targets kind {ANY}"

# On a Llama of 8 x 64, in 1500 steps of scripts/experiments/adaptation_methods.py, each of these
# rates was as good as any of two or three, a factor of about 3 apart. ia3's is the highest tried.
# subspace's is for d = 1000, in 400 steps of intrinsic_dimension.py; it falls as 1 / sqrt(d).
METHODS = {
    "full": Method(1e-3, ANY, everything, whole=True),
    "top": Method(3e-3, f"k {ANY}", lambda model, s: train_top(model, s.k), whole=True),
    "bitfit": Method(3e-2, "attention_dropout", lambda model, s: add_bitfit(model), True,
                     with_own_biases),
    "lora": Method(3e-3, f"{LOW_RANK} rslora", low_rank(add_lora, "rslora")),
    "qlora": Method(3e-3, f"{LOW_RANK} rslora", low_rank(add_lora, "rslora")),
    "dora": Method(3e-3, f"{LOW_RANK} rslora", low_rank(add_dora, "rslora")),
    "adalora": Method(1e-2, f"{LOW_RANK} last", adalora),
    "ia3": Method(1e-1, "targets kind attention_dropout", vectors),
    "bottleneck": Method(1e-2, f"m form skip kind {ANY}", bottleneck),
    "prompt": Method(1e-1, f"length kind {ANY}", prompt),
    "prefix": Method(1e-1, f"length hidden kind {ANY}", prefix),
    "subspace": Method(3e-1, "d said projection attention_dropout", subspace),
}


OWN_RULE = "adalora", "subspace"  # what changes the parameters is not AdamW alone


def prepared(model, s):
    """The model, ready to learn by the settings' method. ValueError for one it is not for."""
    return METHODS[s.method].prepare(drop_attention(model, s.attention_dropout), s)


def optimizer_and_loss(model, s, adamw=AdamW):
    """What trains the model: AdamW, and the loss, None for the labels' own.

    adamw: what makes the optimizer, unless the method has an OWN_RULE.
    ValueError if there is a weight decay, but no matrix trains.
    """
    if s.method == "adalora":
        return Budgeted(model, s), Orthogonal(LabelLoss())
    if s.method == "subspace":
        if s.weight_decay:
            raise ValueError(f"weight_decay is {s.weight_decay}, but a subspace has none")
        return Inside(subspace_of(model), trainable_parameters(model), s.lr), None
    return adamw(trainable_parameters(model), s.lr, **decay(model, s)), None


def decay(model, s) -> dict:
    """AdamW's settings of a weight decay. Without one all parameters keep their order."""
    params = trainable_parameters(model) if s.weight_decay else []
    without = [p for p in params if p.ndim < 2]
    if params and len(without) == len(params):
        raise ValueError(f"weight_decay is {s.weight_decay}, but it is for matrices, and "
                         f"{s.method} trains none")
    return {"weight_decay": s.weight_decay, "undecayed": without}


class Budgeted(AdamW):
    """AdamW that lets a Budget follow its updates. Checkpoints hold the Budget's states beside m
    and v, so a run goes on bit for bit.

    A tenth of the updates warm up, and in the last three tenths the budget stays what it is.
    """

    def __init__(self, model, s):
        super().__init__(trainable_parameters(model), s.lr, **decay(model, s))
        last = s.last or max(1, round(2 * s.r / 3))
        self.budget = Budget(model, self, last, s.steps, s.steps // 10, 3 * s.steps // 10,
                             every=max(1, s.steps // 200))

    def step(self, scale: float = 1.0, everywhere=None):
        """An update, and what the Budget keeps after it."""
        super().step(scale, everywhere)
        self.budget.step(self.steps)

    def states(self) -> dict:
        """Those of AdamW and of the Budget, by name."""
        return super().states() | self.budget.states()

    def put_back(self, states: dict):
        """Go on from what states() gave."""
        super().put_back(states)
        self.budget.put_back(states)
