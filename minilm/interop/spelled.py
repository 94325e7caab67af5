"""Facts of Config that config.json spells in several fields, and how both ways go.

Each `Spelled` names its fields, reads {fact: value} from them, and writes them from a Config. What
is read is checked: ValueError names the field.
"""

from collections.abc import Callable
from typing import NamedTuple

from minilm.config import GATED, LINEAR, Config


class Spelled(NamedTuple):
    """Some facts of Config as fields of config.json."""

    fields: tuple[str, ...]
    read: Callable[[dict, dict], dict]  # (config.json, the facts so far) -> more facts
    write: Callable[[Config], dict]  # a Config -> fields


def value(raw, field, kind):
    """The field as a positive int or float, a bool or a str."""
    found = raw.get(field)
    fits = type(found) is kind or (kind is float and type(found) is int)
    if kind in (int, float):
        fits = fits and 0 < found < 1e38  # so it fits float32
    require(fits, raw, field, f"{'positive ' * (kind in (int, float))}{kind.__name__}")
    return kind(found)


def require(fits, raw, field, expected):
    if not fits:
        found = f"{raw[field]!r:.200}" if field in raw else "missing"
        raise ValueError(f"{field} is {found}, expected {expected}")


def optional(**fields: str) -> Spelled:
    """fact=field for positive numbers that may be null."""
    def read(raw, facts):
        return {fact: None if raw.get(field) is None else value(raw, field, float)
                for fact, field in fields.items()}

    return Spelled(tuple(fields.values()), read,
                   lambda c: {field: getattr(c, fact) for fact, field in fields.items()})


def _scale(raw, facts):
    n = value(raw, "query_pre_attn_scalar", int)
    D = facts["head_width"] or facts["width"] // facts["heads"]
    return {"attention_scale": None if n == D else n**-0.5}


def _scalar(c):
    scale = c.attention_scale
    return {"query_pre_attn_scalar": round(min(1 / scale / scale, 1e9)) if scale else c.D}


SCALE = Spelled(("query_pre_attn_scalar",), _scale, _scalar)  # scores are divided by its root


def padding(raw, field, vocab_size: int) -> int | None:
    """The id that fills up a text; None if the vocabulary has no such id. Older files have -1 for
    none, which transformers would take for the last id."""
    id = raw.get(field)
    require(id is None or type(id) is int, raw, field, "an id or null")
    return id if id is not None and 0 <= id < vocab_size else None


def _counted(raw, facts):
    """max_position_embeddings are rows: the first ones stand for no position of a text."""
    pad, field = facts["padding"], "max_position_embeddings"
    require(pad is not None, raw, "pad_token_id", "an id of the vocabulary")
    rows = value(raw, field, int)
    require(rows > pad + 1, raw, field, f"more than the {pad + 1} up to pad_token_id")
    return {"context": rows - pad - 1}


COUNTED = Spelled(("max_position_embeddings",), _counted,
                  lambda c: {"max_position_embeddings": c.places})


def biases(layers: dict[str, tuple[str, ...]]) -> Spelled:
    """{field: the linear layers that have a bias if it is true}."""
    def read(raw, facts):
        own = [n for n in LINEAR if n != "gate" or facts["activation"] in GATED]
        having = {n for field, names in layers.items() if field in raw and value(raw, field, bool)
                  for n in names}
        named = tuple(n for n in own if n in having)
        return {"bias": len(named) == len(own) if len(named) in (0, len(own)) else named}

    def write(c):
        return {field: c.has_bias(names[0]) for field, names in layers.items()}

    return Spelled(tuple(layers), read, write)


def head_width(divides: bool = False) -> Spelled:
    """head_dim. divides: heads of another width must divide the model's width all the same."""
    def read(raw, facts):
        width, heads = facts["width"], facts["heads"]
        D = None if raw.get("head_dim") is None else value(raw, "head_dim", int)
        require(not divides or width % heads == 0, raw, "hidden_size",
                f"a multiple of num_attention_heads, {heads}")
        return {"head_width": None if D is None or D * heads == width else D}

    return Spelled(("head_dim",), read, lambda c: {"head_dim": c.D})


def _window(raw, facts):
    """sliding_window; None if it hides nothing."""
    if raw.get("sliding_window") is None:
        return None
    window = value(raw, "sliding_window", int)
    return window if window < facts["context"] else None


def _no_window(raw, facts):
    require(_window(raw, facts) is None, raw, "sliding_window",
            "null or at least max_position_embeddings")
    return {}


NO_WINDOW = Spelled(("sliding_window",), _no_window, lambda c: {})

WINDOW = Spelled(("sliding_window",), lambda raw, facts: {"window": _window(raw, facts)},
                 lambda c: {"sliding_window": c.window})

TYPES = ("full_attention", "sliding_attention")


def _types(raw, facts):
    """layer_types, or None."""
    types, layers = raw.get("layer_types"), facts["layers"]
    fits = types is None or (type(types) is list and len(types) == layers)
    require(fits and all(t in TYPES for t in types or ()), raw, "layer_types",
            f"{layers} of {TYPES}")
    return types


def types_of(c: Config) -> list[str]:
    """layer_types of c."""
    return [TYPES[bool(c.window) and i not in c.unwindowed] for i in range(c.layers)]


def _window_of_some(windowed: Callable[[dict, dict, int], bool]) -> Spelled:
    """A window, if use_sliding_window, of those layers that layer_types names, or else of those for
    which windowed says so: (config.json, facts, the layer's number)."""
    def read(raw, facts):
        types, layers = _types(raw, facts), range(facts["layers"])
        used = "use_sliding_window" in raw and value(raw, "use_sliding_window", bool)
        window = _window(raw, facts) if used else None
        slides = [types[i] == TYPES[1] if types is not None else used and windowed(raw, facts, i)
                  for i in layers]
        given = used and raw.get("sliding_window") is not None
        require(given or types is None or not any(slides), raw, "layer_types",
                "full_attention alone without use_sliding_window")
        if window is None or not any(slides):
            return {}
        return {"window": window, "unwindowed": tuple(i for i in layers if not slides[i])}

    def write(c):
        return {"use_sliding_window": c.window is not None, "sliding_window": c.window,
                "layer_types": types_of(c)}

    return Spelled(("use_sliding_window", "sliding_window", "layer_types"), read, write)


def _upper(raw, facts, i):
    field = "max_window_layers"
    return i >= (28 if field not in raw else raw[field] if raw[field] == 0 else
                 value(raw, field, int))


_upper_layers = _window_of_some(_upper)
UPPER_WINDOW = _upper_layers._replace(  # of the layers from max_window_layers on: Qwen2 and 3
    fields=(*_upper_layers.fields, "max_window_layers"),
    write=lambda c: _upper_layers.write(c) | {"max_window_layers": c.layers})


def window_but_of_every(n: int, fields=()) -> Spelled:
    """A window of the layers that layer_types names, or else of all but every n-th one. fields may
    hold sliding_window_pattern, another n. A window of more than the context stays if its layers
    turn by other angles."""
    def read(raw, facts):
        types, layers = _types(raw, facts), range(facts["layers"])
        given = {field: raw[field] for field in fields if field in raw}
        every = value({"sliding_window_pattern": n} | given, "sliding_window_pattern", int)
        unwindowed = tuple(i for i in layers if (
            (i + 1) % every == 0 if types is None else types[i] == TYPES[0]))
        if len(unwindowed) == len(layers):
            return {"window_theta": None}
        window = value(raw, "sliding_window", int)
        if window >= facts["context"] and not facts.get("window_theta"):
            return {}
        return {"window": window, "unwindowed": unwindowed}

    def write(c):
        return {"sliding_window": c.window or c.context, "layer_types": types_of(c)}

    return Spelled(("sliding_window", "layer_types", *fields), read, write)


UNROTATED_WINDOW = _window_of_some(lambda raw, facts, i: i in facts["unrotated"])  # SmolLM3


def _unrotated(raw, facts):
    """no_rope_layers has a 0 for them; by default they are every no_rope_layer_interval-th."""
    rotates, field, layers = raw.get("no_rope_layers"), "no_rope_layers", range(facts["layers"])
    if rotates is None:
        every = value({"no_rope_layer_interval": 4} | raw, "no_rope_layer_interval", int)
        return {"unrotated": tuple(i for i in layers if (i + 1) % every == 0)}
    fits = type(rotates) is list and len(rotates) >= len(layers)
    require(fits and all(type(r) in (int, bool) and r in (0, 1) for r in rotates), raw, field,
            f"at least {len(layers)} of 0 and 1")
    return {"unrotated": tuple(i for i in layers if not rotates[i])}


UNROTATED = Spelled(("no_rope_layers", "no_rope_layer_interval"), _unrotated, lambda c: {
    "no_rope_layers": [int(i not in c.unrotated) for i in range(c.layers)]})
