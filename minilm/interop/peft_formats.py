"""What PEFT calls the numbers and settings of each method: FORMATS has an entry a method.

PEFT keeps a module's tensors under base_model.model.<module>.<end>:

    LORA    lora_A.weight (r, I), lora_B.weight (O, r), as here
    IA3     ia3_l (O, 1); in feedforward_modules, whose input is scaled, (1, I)

GPT-2 keeps W_q, W_k and W_v in one c_attn. When LoRA is read, each of our three layers gets
c_attn's A and its own third of B. When it is written, the A's are stacked and the B's become
blocks, for

    [ Bq Aq ]   [ Bq       ] [ Aq ]
    [ Bk Ak ] = [    Bk    ] [ Ak ]
    [ Bv Av ]   [       Bv ] [ Av ]

has rank 3r. alpha grows with the rank (threefold, for rsLoRA by sqrt(3)), so the scale stays the
same. If the A's are equal bit for bit, as after reading, one A is enough and the B's are put below
each other. A layer without an adapter gets zeros. No other number changes.

IA3's vectors for outputs are joined end to end; a layer without an adapter gets ones. A vector for
the input is shared by all three: q, k and v with different ones cannot be written.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minilm.backend import to_device
from minilm.peft.adapted import ends_with
from minilm.peft.ia3 import IA3
from minilm.peft.lora import LoRA


class Format(NamedTuple):
    """How PEFT writes a method. sizes: (O, I) of each of our layers that a module joins."""

    method: type  # of the adapters
    ends: tuple[str, ...]  # of the tensors' keys
    fields: dict  # of adapter_config.json: (default, test of a value, what passes, in words)
    shapes: Callable  # (config, module, sizes, tensors that are there) -> {end: shape}
    split: Callable  # (config, module, sizes, tensors) -> an adapter for each of our layers
    join: Callable  # (module, sizes, adapters, None if there is none) -> (tensors, form)
    describe: Callable  # ({module: form}, other modules, adapters) -> fields, with target_modules


ENTRIES = 10**4  # of a list or table, each of which is compared with each module of the model


def names(value):
    return (type(value) is list and len(value) <= ENTRIES
            and all(type(name) is str for name in value))


def _number(value): return type(value) in (int, float) and abs(value) < 1e38
def _rank(value): return type(value) is int and value > 0


def _table(value, fits):  # keys must be plain names: other patterns could take forever to match
    return value is None or (isinstance(value, dict) and len(value) <= ENTRIES and all(
        re.fullmatch(r"\^?[\w.-]+", key) and fits(entry) for key, entry in value.items()))


LORA_FIELDS = {
    "r": (None, _rank, "a positive integer"),
    "lora_alpha": (None, _number, "a number"),
    "lora_dropout": (0.0, lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "use_rslora": (False, lambda v: type(v) is bool, "true or false"),
    "rank_pattern": (None, lambda v: _table(v, _rank), "modules' names and positive integers"),
    "alpha_pattern": (None, lambda v: _table(v, _number), "modules' names and numbers"),
    "bias": ("none", lambda v: v == "none", "'none'"),
    "init_lora_weights": (True, lambda v: v in (None, True, False, "gaussian", "orthogonal"),
                          "an initialisation that leaves the base as it is"),
    "layers_to_transform": (None, lambda v: True, ""),
}


def _lora_shapes(config, module, sizes, tensors):
    r, _ = _lora_form(config, module)
    return {"lora_A.weight": (r, sizes[0][1]), "lora_B.weight": (sum(O for O, _ in sizes), r)}


def _lora_split(config, module, sizes, tensors):
    _, alpha = _lora_form(config, module)
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    return [LoRA(A.copy(), part.copy(), alpha, config["lora_dropout"], config["use_rslora"])
            for part in np.split(B, len(sizes))]


def _lora_form(config, module):
    """r and alpha of a module. A pattern that matches the end of its name replaces the default."""
    def look_up(patterns, default):
        found = (value for key, value in (config[patterns] or {}).items()
                 if _pattern(key).fullmatch(module))
        return next(found, default)
    return look_up("rank_pattern", config["r"]), look_up("alpha_pattern", config["lora_alpha"])


@functools.lru_cache(ENTRIES)
def _pattern(key): return re.compile(rf"(.*\.)?({key})")


def _lora_join(module, sizes, adapters):
    """(A and B of several adapters joined, their form: (r, alpha))."""
    present = [a for a in adapters if a]
    if len({(a.r, a.alpha, a.rslora) for a in present}) > 1:
        raise ValueError(f"the parts of {module} have different r, alpha or rslora")
    As, Bs = ([to_device(t.data, "cpu") for t in tensors]
              for tensors in zip(*((a.A, a.B) for a in present)))
    r, alpha, equal = present[0].r, present[0].alpha, len({A.tobytes() for A in As}) == 1
    blocks = 1 if equal else len(present)
    B = np.zeros((len(adapters), len(Bs[0]), blocks, r), Bs[0].dtype)
    for i, j in enumerate(i for i, a in enumerate(adapters) if a):
        B[j, :, 0 if equal else i] = Bs[i]
    A = As[0] if equal else np.concatenate(As)
    alpha *= math.sqrt(blocks) if present[0].rslora else blocks
    tensors = {"lora_A.weight": A, "lora_B.weight": B.reshape(-1, blocks * r)}
    return tensors, (len(A), int(alpha) if alpha == int(alpha) else float(alpha))


def _lora_describe(forms, others, adapters):
    """Fields with the commonest form as the default; the others become patterns."""
    settings = {(adapter.rslora, adapter.drop.p) for adapter in adapters}
    if len(settings) > 1:
        raise ValueError(f"PEFT has one use_rslora and lora_dropout for all, not {settings}")
    (rslora, dropout), = settings
    (r, alpha), _ = Counter(forms.values()).most_common(1)[0]
    return {
        "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora,
        "rank_pattern": {m: form[0] for m, form in forms.items() if form[0] != r},
        "alpha_pattern": {m: form[1] for m, form in forms.items() if form[1] != alpha},
        "target_modules": sorted({_shortest_end(m, others) for m in forms}), "bias": "none",
        "init_lora_weights": True,
    }


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
        return [IA3(l[0].copy(), feedforward=True) for _ in sizes]
    return [IA3(part[:, 0].copy()) for part in np.split(l, len(sizes))]


def _ia3_join(module, sizes, adapters):
    """(the vectors of several adapters joined, their form: do they scale the input?)."""
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


def _ia3_describe(forms, others, adapters):
    """PEFT needs feedforward_modules among target_modules, and also matches parts of words."""
    outer = [m for m, inner in forms.items() if not inner]
    ends = {m: _shortest_end(m, [*others], outer if inner else []) for m, inner in forms.items()}
    return {"target_modules": sorted({*ends.values()}), "init_ia3_weights": True,
            "feedforward_modules": sorted({ends[m] for m, inner in forms.items() if inner})}


def _shortest_end(module, others, apart=()):
    """The fewest last parts of the module's name that are not the last parts of any other name.

    A name in `apart` may not even end with the same letters.
    """
    parts = module.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
    return next(end for end in ends if not any(ends_with(other, end) for other in others)
                and not any(other.endswith(end) for other in apart))


FORMATS = {
    "LORA": Format(LoRA, ("lora_A.weight", "lora_B.weight"), LORA_FIELDS, _lora_shapes, _lora_split,
                   _lora_join, _lora_describe),
    "IA3": Format(IA3, ("ia3_l",), IA3_FIELDS, _ia3_shapes, _ia3_split, _ia3_join, _ia3_describe),
}
