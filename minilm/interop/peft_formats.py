"""What PEFT calls the numbers and settings of each method: FORMATS has an entry a method.

PEFT keeps a module's tensors under base_model.model.<module>.<end>:

    LORA      lora_A.weight (r, I), lora_B.weight (O, r), as here; with use_dora, which is DoRA,
              lora_magnitude_vector (O,) too
    ADALORA   lora_A (r, I), lora_E (r, 1), lora_B (O, r): our Q, lam, P
    IA3       ia3_l (O, 1); in feedforward_modules, whose input is scaled, (1, I)

GPT-2 keeps W_q, W_k and W_v in one c_attn. When LoRA is read, each of our three layers gets its own
third of B, and all three share c_attn's A: one tensor, so it is trained as PEFT trains it (but with
dropout each layer drops other inputs). When LoRA is written whose A's differ, they are stacked and
the B's become blocks, for

    [ Bq Aq ]   [ Bq       ] [ Aq ]
    [ Bk Ak ] = [    Bk    ] [ Ak ]
    [ Bv Av ]   [       Bv ] [ Av ]

has rank 3r. alpha grows with the rank (threefold, for rsLoRA by sqrt(3)), so the scale stays the
same. If the A's are equal bit for bit, one A is enough and the B's are put below each other, so
what was read with rank r is written with it. A layer without an adapter gets zeros. No other number
changes.

DoRA's m is split and joined as B is. A layer without an adapter gets the norms of its rows.

AdaLoRA's scale is alpha / (init_r + 1e-5), whatever rank a module has. rank_pattern says of each of
init_r singular values whether it is in the file. Its P, lam and Q are split and joined as B, r and
A are, and init_r and alpha grow as r and alpha do.

IA3's vectors for outputs are joined end to end; a layer without an adapter gets ones. A vector for
the input is shared by all three, as A is: q, k and v with different ones cannot be written.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minilm.backend import to_device
from minilm.peft.adalora import AdaLoRA
from minilm.peft.adapted import ends_with
from minilm.peft.dora import DoRA, row_norms
from minilm.peft.ia3 import IA3
from minilm.peft.lora import LoRA


class Format(NamedTuple):
    """How PEFT writes a method. sizes: (O, I) of each of our layers that a module joins."""

    methods: tuple[type, ...]  # of the adapters
    ends: tuple[str, ...]  # of the tensors' keys
    fields: dict  # of adapter_config.json: (default, test of a value, what passes, in words)
    shapes: Callable  # (config, module, sizes, tensors that are there) -> {end: shape}
    split: Callable  # (config, module, sizes, tensors) -> an adapter for each of our layers
    join: Callable  # (module, our layers, adapters, None if there is none) -> (tensors, form)
    describe: Callable  # ({module: form}, other modules, adapters, bias) -> fields, with targets


ENTRIES = 10**4  # of a list or table, each of which is compared with each module of the model


def names(value):
    return (type(value) is list and len(value) <= ENTRIES
            and all(type(name) is str for name in value))


def _number(value): return type(value) in (int, float) and abs(value) < 1e38
def _rank(value): return type(value) is int and value > 0
def _mask(value): return type(value) is list and all(type(kept) is bool for kept in value)


def _table(value, fits):
    return value is None or (isinstance(value, dict) and len(value) <= ENTRIES
                             and all(map(fits, value.values())))


def _layers(value):
    return value is None or all(type(i) is int and i >= 0
                                for i in (value if type(value) is list else [value]))


def _keeps_base(init):  # pissa_niter_16 and the like
    return init in (None, True, False) or str(init).lower() in ("gaussian", "orthogonal", "eva")


CONVERTED = (
    "true, false, 'gaussian', 'orthogonal' or 'eva'. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take "
    "from the base's weights what A and B start with, so A and B belong to a base that is in no "
    "file; PEFT's save_pretrained converts them if it gets path_initial_model_for_weight_conversion"
    ". MiCA does not train B"
)
LORA_FIELDS = {
    "r": (None, _rank, "a positive integer"),
    "lora_alpha": (None, _number, "a number"),
    "lora_dropout": (0.0, lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "use_rslora": (False, lambda v: type(v) is bool, "true or false"),
    "use_dora": (False, lambda v: type(v) is bool, "true or false"),
    "rank_pattern": (None, lambda v: _table(v, _rank), "modules' names and positive integers"),
    "alpha_pattern": (None, lambda v: _table(v, _number), "modules' names and numbers"),
    "bias": ("none", lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "init_lora_weights": (True, _keeps_base, CONVERTED),
    "layers_to_transform": (None, _layers, "numbers of layers"),
    "layers_pattern": (None, lambda v: v is None or type(v) is str or names(v), "names"),
}


def _lora_shapes(config, module, sizes, tensors):
    (r, _), O = _lora_form(config, module), sum(O for O, _ in sizes)
    shapes = {"lora_A.weight": (r, sizes[0][1]), "lora_B.weight": (O, r)}
    return shapes | ({"lora_magnitude_vector": (O,)} if config["use_dora"] else {})


def _lora_split(config, module, sizes, tensors):
    """An adapter for each of our layers. They share one A, whose gradient is the sum of theirs."""
    _, alpha = _lora_form(config, module)
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    parts = [LoRA(A, part.copy(), alpha, config["lora_dropout"], config["use_rslora"])
             for part in _split(B, sizes)]
    for part in parts:
        part.A = parts[0].A
    if config["use_dora"]:
        ms = _split(tensors["lora_magnitude_vector"], sizes)
        parts = [DoRA(part, m.copy()) for part, m in zip(parts, ms)]
    return parts


def _lora_form(config, module):
    """r and alpha of a module: those that the patterns have for it, or the default."""
    return (config["rank_pattern"].get(module, config["r"]),
            config["alpha_pattern"].get(module, config["lora_alpha"]))


def _lora_join(module, bases, adapters):
    """(A, B and m of several adapters joined, their form: (r, alpha))."""
    if any(type(a) is DoRA for a in adapters):
        tensors, form = _lora_join(module, bases, [a and a.lora for a in adapters])
        ms = [a.m.data if a else row_norms(base) for a, base in zip(adapters, bases)]
        m = np.concatenate([to_device(m, "cpu") for m in ms])
        return tensors | {"lora_magnitude_vector": m.astype(tensors["lora_B.weight"].dtype)}, form
    sizes, present = _sizes(bases), [a for a in adapters if a]
    if len({(a.r, a.alpha, a.rslora) for a in present}) > 1:
        raise ValueError(f"the parts of {module} have different r, alpha or rslora")
    As, Bs = ([to_device(t.data, "cpu") for t in tensors]
              for tensors in zip(*((a.A, a.B) for a in present)))
    r, alpha, equal = present[0].r, present[0].alpha, len({A.tobytes() for A in As}) == 1
    blocks = 1 if equal else len(present)
    B = np.zeros((sum(O for O, _ in sizes), blocks, r), Bs[0].dtype)
    rows = [part for part, a in zip(_split(B, sizes), adapters) if a]
    for i, part in enumerate(rows):
        part[:, 0 if equal else i] = Bs[i]
    A = As[0] if equal else np.concatenate(As)
    alpha *= math.sqrt(blocks) if present[0].rslora else blocks
    tensors = {"lora_A.weight": A, "lora_B.weight": B.reshape(-1, blocks * r)}
    return tensors, (len(A), int(alpha) if alpha == int(alpha) else float(alpha))


def _lora_describe(forms, others, adapters, bias):
    """Fields with the commonest form as the default; the others become patterns."""
    dora = {"use_dora": True} if any(type(a) is DoRA for a in adapters) else {}
    settings = {(a.rslora, a.drop.p) for a in (a.lora if dora else a for a in adapters)}
    if len(settings) > 1:
        raise ValueError(f"PEFT has one use_rslora and lora_dropout for all, not {settings}")
    (rslora, dropout), = settings
    (r, alpha), _ = Counter(forms.values()).most_common(1)[0]
    return {
        "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora,
        "rank_pattern": {m: form[0] for m, form in forms.items() if form[0] != r},
        "alpha_pattern": {m: form[1] for m, form in forms.items() if form[1] != alpha},
        "target_modules": sorted({shortest_end(m, others) for m in forms}), "bias": bias,
        "init_lora_weights": True,
    } | dora


ADALORA_FIELDS = {field: LORA_FIELDS[field] for field in (
    "lora_dropout", "bias", "layers_to_transform", "layers_pattern")} | dict.fromkeys(
    ("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
     "total_step", "use_rslora", "alpha_pattern"),  # of the training, or without a meaning
    (None, lambda v: True, "anything")) | {
    "init_r": (None, _rank, "a positive integer"),
    "lora_alpha": (None, lambda v: _number(v) and v > 0, "a positive number"),
    "rank_pattern": (None, lambda v: _table(v, _mask), "tensors' names and lists of true or false"),
    "init_lora_weights": (True, lambda v: type(v) is bool, "true or false"),
    "use_dora": (False, lambda v: not v, "false"),
}


def _adalora_shapes(config, module, sizes, tensors):
    kept = (config["rank_pattern"] or {}).get(f"{module}.lora_E")
    r = config["init_r"] if kept is None else sum(kept)
    return {"lora_A": (r, sizes[0][1]), "lora_E": (r, 1), "lora_B": (sum(O for O, _ in sizes), r)}


def _adalora_split(config, module, sizes, tensors):
    """An adapter for each of our layers. They share one Q and one lam."""
    Q, lam, P = (tensors[end] for end in ("lora_A", "lora_E", "lora_B"))
    parts = [AdaLoRA(part.copy(), lam, Q, config["lora_alpha"], config["lora_dropout"],
                     config["init_r"]) for part in _split(P, sizes)]
    for part in parts:
        part.lam, part.Q = parts[0].lam, parts[0].Q
    return parts


def _adalora_join(module, bases, adapters):
    """(P, lam and Q of several adapters joined, their form: (r, init_r, alpha))."""
    present = [a for a in adapters if a]
    first, parts = present[0], {tuple(to_device(t.data, "cpu").tobytes() for t in (a.lam, a.Q))
                                for a in present}
    groups = [first] if len(parts) == 1 else present  # each has columns of its own
    lam, Q = (np.concatenate([to_device(t.data, "cpu") for t in ts])
              for ts in zip(*((a.lam, a.Q) for a in groups)))
    P = np.zeros((sum(O for O, _ in _sizes(bases)), len(lam)), lam.dtype)
    stops = [*np.cumsum([a.r for a in groups])]
    for rows, a in zip(_split(P, _sizes(bases)), adapters):
        if a:
            stop = stops[0 if len(groups) == 1 else groups.index(a)]
            rows[:, stop - a.r : stop] = to_device(a.P.data, "cpu")
    R = first.ranknum * len(groups)
    alpha = first.alpha if len(groups) == 1 else first.scale * (R + 1e-5)
    return {"lora_A": Q, "lora_E": lam, "lora_B": P}, (len(lam), R, alpha)


def _adalora_describe(forms, others, adapters, bias):
    """PEFT gives every module the rank init_r first, and then what rank_pattern leaves of it."""
    settings = {(a.alpha, a.ranknum, a.drop.p) for a in adapters}
    if len(settings) > 1:
        raise ValueError("PEFT has one lora_alpha, init_r and lora_dropout for all, not "
                         f"{sorted(settings)}")
    (_, _, dropout), = settings
    R, alpha = max((R, alpha) for _, R, alpha in forms.values())
    masks = {f"{m}.lora_E": [True] * r + [False] * (R - r) for m, (r, _, _) in forms.items()
             if r < R}
    return {"init_r": R, "target_r": R, "lora_alpha": alpha, "lora_dropout": dropout, "bias": bias,
            "total_step": 1, "rank_pattern": masks or None, "init_lora_weights": True,
            "target_modules": sorted({shortest_end(m, others) for m in forms})}


IA3_FIELDS = {
    "feedforward_modules": (None, lambda v: v is None or type(v) is str or names(v), "names"),
}


def _ia3_shapes(config, module, sizes, tensors):
    """(1, I) if feedforward_modules names the module; if it has no names, the tensor decides."""
    scaled = config["feedforward_modules"]
    inner = (any(module.endswith(end) for end in scaled) if names(scaled)  # as PEFT compares them
             else np.shape(tensors.get("ia3_l"))[:1] == (1,))
    return {"ia3_l": (1, sizes[0][1]) if inner else (sum(O for O, _ in sizes), 1)}


def _ia3_split(config, module, sizes, tensors):
    l = tensors["ia3_l"]
    if _ia3_shapes(config, module, sizes, tensors)["ia3_l"][0] == 1:
        parts = [IA3(l[0].copy(), feedforward=True) for _ in sizes]
        for part in parts:
            part.l = parts[0].l
        return parts
    return [IA3(part[:, 0].copy()) for part in _split(l, sizes)]


def _ia3_join(module, bases, adapters):
    """(the vectors of several adapters joined, their form: do they scale the input?)."""
    sizes = _sizes(bases)
    ls = [a and to_device(a.l.data, "cpu") for a in adapters]
    present = [l for l in ls if l is not None]
    inner = {a.feedforward for a in adapters if a}
    if inner == {True} and len(present) == len(ls) and len({l.tobytes() for l in ls}) == 1:
        return {"ia3_l": ls[0][None]}, True
    if inner != {False}:
        raise ValueError(f"{module} has one vector for its input, which {len(ls)} layers share "
                         "here: they must all have an adapter, with the same vector")
    ones = (np.ones(O, present[0].dtype) if l is None else l for l, (O, _) in zip(ls, sizes))
    return {"ia3_l": np.concatenate([*ones])[:, None]}, False


def _ia3_describe(forms, others, adapters, bias):
    """PEFT needs feedforward_modules among target_modules, and also matches parts of words."""
    if bias != "none":
        raise ValueError("PEFT trains no biases beside IA3")
    outer = [m for m, inner in forms.items() if not inner]
    ends = {m: shortest_end(m, [*others], outer if inner else []) for m, inner in forms.items()}
    return {"target_modules": sorted({*ends.values()}), "init_ia3_weights": True,
            "feedforward_modules": sorted({ends[m] for m, inner in forms.items() if inner})}


def _sizes(bases):
    """(O, I) of each layer."""
    return [base.weight.shape for base in bases]


def _split(array, sizes):
    """The rows of each of our layers: views."""
    return np.split(array, np.cumsum([O for O, _ in sizes])[:-1])


def shortest_end(module, others, apart=()):
    """The fewest last parts of the module's name that are not the last parts of any other name.

    A name in `apart` may not even end with the same letters. ValueError if there is no such end.
    """
    parts = module.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
    for end in ends:
        if not any(ends_with(other, end) for other in others) and not any(
                other.endswith(end) for other in apart):
            return end
    also = sorted(other for other in {*others, *apart} if other.endswith(module))
    raise ValueError(f"PEFT cannot train {module} alone: its name would also name {also}")


FORMATS = {
    "LORA": Format((LoRA, DoRA), ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
                   LORA_FIELDS, _lora_shapes, _lora_split, _lora_join, _lora_describe),
    "ADALORA": Format((AdaLoRA,), ("lora_A", "lora_E", "lora_B"), ADALORA_FIELDS, _adalora_shapes,
                      _adalora_split, _adalora_join, _adalora_describe),
    "IA3": Format((IA3,), ("ia3_l",), IA3_FIELDS, _ia3_shapes, _ia3_split, _ia3_join,
                  _ia3_describe),
}
