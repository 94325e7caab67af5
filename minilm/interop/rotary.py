"""Rotary positions in config.json: rope_theta and the stretching of angles, in all spellings.

Version 5 of transformers writes rope_parameters, which holds rope_theta too. Those before wrote
rope_scaling beside rope_theta. Their kind is rope_type or type. All that are there must agree. If
layers with a window turn by angles of their own, rope_parameters holds two of them by layer type,
and rope_local_base_freq was the other theta.
"""

import math
from dataclasses import fields

from minilm.config import Config
from minilm.interop.spelled import TYPES, Spelled, require, value
from minilm.rope import Dynamic, Linear, Llama3, Long, Yarn

ORIGINAL = "original_max_position_embeddings"
KINDS = {  # rope_type -> (ours, {our field: theirs})
    "linear": (Linear, {"factor": "factor"}),
    "dynamic": (Dynamic, {"factor": "factor"}),
    "llama3": (Llama3, {"factor": "factor", "original": ORIGINAL, "low": "low_freq_factor",
                        "high": "high_freq_factor"}),
    "yarn": (Yarn, {"factor": "factor", "original": ORIGINAL, "fast": "beta_fast",
                    "slow": "beta_slow", "attention": "attention_factor", "truncate": "truncate"}),
    "longrope": (Long, {"short": "short_factor", "long": "long_factor", "original": ORIGINAL,
                        "attention": "attention_factor"}),
}
OPTIONAL = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True}
OTHERS = {"yarn": ("mscale", "mscale_all_dim"), "longrope": ("factor",)}  # that are read too


def read(raw, facts) -> dict:
    """rope_theta, if it is there, and rope; for dynamic ropes the context as well."""
    spelled = {field: raw[field] for field in ("rope_parameters", "rope_scaling") if raw.get(field)}
    ropes, bases = set(), set()
    for field, rope in spelled.items():
        require(isinstance(rope, dict), raw, field, "null or fields")
        ropes.add(_rope(field, rope, raw, facts["context"]))
        bases |= {value(rope, "rope_theta", float)} if rope.get("rope_theta") is not None else set()
    bases |= {value(raw, "rope_theta", float)} if "rope_theta" in raw else set()
    require(len(bases) < 2, raw, "rope_theta", f"one value everywhere, not {sorted(bases)}")
    require(len(ropes) < 2, raw, "rope_scaling", "what rope_parameters says")
    found = {"rope_theta": bases.pop()} if bases else {}
    rope = ropes.pop() if ropes else None
    if type(rope) is Dynamic:  # max_position_embeddings is where it begins to stretch
        found["context"] = int(min(rope.factor * rope.original, 2**62))
    return found | {"rope": rope}


def write(c: Config) -> dict:
    rope = {"rope_type": "default"}
    for kind, (ours, names) in KINDS.items():
        if type(c.rope) is ours:
            given = {theirs: getattr(c.rope, our) for our, theirs in names.items()}
            given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
            rope = {"rope_type": kind} | {k: v for k, v in given.items() if v is not None}
    raw = {"rope_parameters": rope | {"rope_theta": c.rope_theta}}
    raw["rope_theta"] = c.rope_theta  # transformers before 5 looks here
    if c.rope:
        raw["rope_scaling"] = rope
    return raw | ({"max_position_embeddings": c.rope.original} if type(c.rope) is Dynamic else {})


def _rope(field, rope, raw, context):
    """The rope that this dict describes, None for an unstretched one."""
    names = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    kind = names[0] if names else "default"
    require(all(name == kind for name in names), rope, "type", f"rope_type's {kind!r}")
    if raw.get("model_type") == "phi3":  # which called it by other names before
        kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind) if kind else kind
    known = isinstance(kind, str) and kind in ("default", *KINDS)
    require(known, raw, field, f"a rope_type of {['default', *KINDS]}")
    ours, fields_ = KINDS.get(kind, (None, {}))
    allowed = {*fields_.values(), *OTHERS.get(kind, ()), "rope_theta", "rope_type", "type"}
    require(rope.get("partial_rotary_factor", 1.0) in (1.0, None), raw, field,
            "no partial_rotary_factor but 1")
    extra = {k for k, v in rope.items() if v is not None} - allowed - {"partial_rotary_factor"}
    require(not extra, raw, field, f"nothing but {sorted(allowed)} for {kind!r}")
    if ours is None:
        return None
    rope = _completed(kind, rope, raw, context)
    types = {f.name: f.type for f in fields(ours)}
    made = {our: _number(field, rope, theirs, types[our]) for our, theirs in fields_.items()}
    return ours(**made | ({"original": context} if ours is Dynamic else {}))


def _completed(kind, rope, raw, context) -> dict:
    """The fields with those that transformers would compute if they are absent."""
    rope = {k: v for k, v in rope.items() if v is not None}
    if raw.get(ORIGINAL) is not None:  # beside the dict: Phi-3
        rope.setdefault(ORIGINAL, raw[ORIGINAL])
        require(rope[ORIGINAL] == raw[ORIGINAL], raw, ORIGINAL, f"{rope[ORIGINAL]!r} as below")
    rope.setdefault(ORIGINAL, context)
    original = value(rope, ORIGINAL, int)
    if kind in ("yarn", "longrope"):
        rope.setdefault("factor", context / original)
        factor = value(rope, "factor", float)
    if kind == "longrope" and "attention_factor" not in rope:
        rope["attention_factor"] = 1.0 if factor <= 1 or original == 1 else (
            math.sqrt(1 + math.log(factor) / math.log(original)))
    if kind == "yarn" and {"mscale", "mscale_all_dim"} <= rope.keys() - {"attention_factor"}:
        m, n = (0.1 * value(rope, k, float) for k in ("mscale", "mscale_all_dim"))
        stretch = math.log(max(factor, 1.0))
        rope.setdefault("attention_factor", (m * stretch + 1) / (n * stretch + 1))
    return OPTIONAL | rope


def _number(where, rope, field, kind):
    """A field of the dict; a list of numbers for a tuple."""
    try:
        if field not in rope or rope[field] is not None:
            if "tuple" in str(kind):
                require(type(rope.get(field)) is list and rope[field], rope, field, "numbers")
                return tuple(value({field: x}, field, float) for x in rope[field])
            return value(rope, field, kind if kind in (int, float, bool) else float)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return None


FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", ORIGINAL)
ROTARY = Spelled(FIELDS, read, write)
PHI3_ROTARY = ROTARY._replace(write=lambda c: write(c) | (  # transformers' Phi-3 looks there
    {ORIGINAL: c.rope.original} if type(c.rope) is Long else {}))


def rotary_by_type(full_theta: float, near_theta: float, older: str = "") -> Spelled:
    """What ROTARY says of full_attention, and window_theta: the theta of sliding_attention.

    The two thetas hold if none is named. older: a name that near_theta had before version 5.
    """
    def read_both(raw, facts):
        by_type = raw.get("rope_parameters") or {}
        fits = isinstance(by_type, dict) and by_type.keys() <= {*TYPES}
        require(fits, raw, "rope_parameters", f"null or what holds for each of {TYPES}")
        full, near = (by_type.get(kind) for kind in TYPES)
        found = {"rope_theta": full_theta} | read(raw | {"rope_parameters": full}, facts)
        fits = type(found["rope"]) is not Long and getattr(found["rope"], "truncate", True)
        require(fits, raw, "rope_parameters", "no longrope by layer type, nor a yarn's truncate: "
                "transformers looks for them elsewhere")
        near = read({"rope_parameters": near}, facts)
        require(near["rope"] is None, raw, "rope_parameters", f"no stretching of {TYPES[1]}")
        theta = value(raw, older, float) if older in raw else near.get("rope_theta", near_theta)
        require(theta == near.get("rope_theta", theta), raw, older, "what rope_parameters says")
        same = theta == found["rope_theta"] and found["rope"] is None
        return found | {"window_theta": None if same else theta}

    def write_both(c):
        raw, theta = write(c), c.window_theta or c.rope_theta
        near = {"rope_type": "default", "rope_theta": theta}
        by_type = dict(zip(TYPES, (raw["rope_parameters"], near)))
        return raw | {"rope_parameters": by_type} | ({older: theta} if older else {})

    return Spelled(FIELDS + ((older,) if older else ()), read_both, write_both)
