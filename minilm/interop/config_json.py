"""config.json <-> Config: the tables of families.py and the spellings of spelled.py, both ways.

Every field of transformers' classes is read, refused if it is not what Transformer does, or known
not to matter (Family.harmless). A field that transformers does not know changes nothing there, and
nothing here.
"""

from dataclasses import fields, replace

from minilm.config import Config
from minilm.interop.families import FAMILIES, ONLY, Family
from minilm.interop.heads import HEADS
from minilm.interop.spelled import padding, require, value

OPTIONAL = ("n_inner", "num_key_value_heads")  # sizes that may be null or absent
LAYERS = 10**5  # more are damage; measure.plan goes through them without asking for the tensors


def read_config(raw) -> tuple[Family, Config]:
    """What config.json describes. ValueError, with the field's name, if Transformer cannot express
    it."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        text = raw.get("text_config") if isinstance(raw, dict) else None
        of_text = text.get("model_type") if isinstance(text, dict) else None
        hint = (f"; its text_config is {of_text!r}: save its language_model and head as one"
                if isinstance(of_text, str) and of_text in FAMILIES else
                "; interop.t5 reads T5s" if kind == "t5" else "")
        raise ValueError(f"model_type is {kind!r}, expected one of {list(FAMILIES)}{hint}")
    names = raw.get("architectures")
    name = names[0] if type(names) is list and names and type(names[0]) is str else None
    family = next((other for other in HEADS[kind].values() if other.architecture == name),
                  FAMILIES[kind])
    raw = family.absent | respelled(raw, family.spellings)
    for field, expected in (ONLY | family.only).items():
        allowed = expected if isinstance(expected, tuple) else (expected,)
        require(raw.get(field, allowed[0]) in allowed, raw, field, repr(expected))
    plain = raw.get("quantization_config") is None
    require(plain, raw, "quantization_config", "null; minilm.interop.load_model reads 4 and 8 bits")
    facts, types = {}, {field.name: field.type for field in fields(Config)}
    for ours, theirs in family.fields.items():
        null = theirs in OPTIONAL and raw.get(theirs) is None
        if ours == "padding":
            facts[ours] = padding(raw, theirs, facts["vocab_size"])
        elif not null and (theirs in raw or types[ours] is int):  # else both have the same default
            facts[ours] = value(raw, theirs, types[ours])
    known, field = family.activations, family.fields["activation"]
    name = facts.get("activation", next(iter(known)))
    require(name in known, raw, field, f"one of {list(known)}")
    facts["activation"] = known[name]
    require(facts["layers"] <= LAYERS, raw, family.fields["layers"], f"at most {LAYERS}")
    for spelled in family.spelled:
        facts |= spelled.read(raw, facts)
    return family, family.config(**facts)


def read_folder(raw, keys=None) -> tuple[Family, Config]:
    """As read_config, for weights with these keys. If raw names no architecture, they show the
    head; a tied one over the vocabulary has no key."""
    family, c = read_config(raw)
    if raw.get("architectures") or keys is None:
        return family, c
    heads, masked = HEADS[raw["model_type"]], c.head == "masked"
    own = family.modules["head.transform" if masked else "head"]
    if f"{heads['classes'].modules['head']}.weight" in keys:
        family = heads["classes"]
    elif f"{own}.weight" not in keys and (masked or not c.tied):
        family = heads["none"]
    return read_config(raw | {"architectures": [family.architecture]})


def describe_config(c: Config, wanted: str | None = None) -> tuple[Family, dict]:
    """The first family that expresses c, and its config.json; of the wanted model_type if that
    does. ValueError if there is none, which says what the nearest one cannot express."""
    if not isinstance(c, Config):
        raise TypeError(f"expected a Transformer's Config, got a {type(c).__name__}; interop.t5 "
                        "writes T5s")
    decoder = c.head == "linear" or (c.causal and c.head != "masked")
    nearest = ("llama" if c.positions == "rotary" else "gpt2" if decoder else
               "roberta" if c.positions == "counted" else "bert" if c.segments else "distilbert")
    reason = None
    for kind in ([wanted] if wanted else []) + [nearest, *FAMILIES]:
        family = HEADS[kind].get(c.head, FAMILIES[kind])
        try:
            return family, _described(kind, family, c)
        except ValueError as error:
            reason = reason or error
    raise reason


def respelled(raw, spellings) -> dict:
    """raw with the names that families.py uses. ValueError for two that contradict each other."""
    raw = dict(raw)
    for other, name in spellings.items():
        if other in raw:
            require(raw.get(name, raw[other]) == raw[other], raw, other, f"{name}'s value")
            raw[name] = raw.pop(other)
    return raw


def _described(kind: str, family: Family, c: Config) -> dict:
    """config.json for c; ValueError if it would not be read as c again."""
    names = {ours: theirs for theirs, ours in reversed(family.activations.items())}
    raw = {"architectures": [family.architecture], "model_type": kind}
    raw |= {theirs: getattr(c, ours) for ours, theirs in family.fields.items()}
    raw[family.fields["activation"]] = names.get(c.activation, next(iter(family.activations)))
    for spelled in family.spelled:
        raw |= spelled.write(c)
    read = replace(read_config(raw)[1], dropout=c.dropout)
    if c.head == "none" and c.pooler is None:  # config.json does not say whether there is one
        read = replace(read, pooler=None)
    for name, given in vars(_normal(c)).items():
        if given != getattr(read, name):
            raise ValueError(f"{family.architecture}, the nearest, cannot express {name}={given!r}")
    return raw


def _normal(c: Config) -> Config:
    """c without facts that say nothing: a head width that is width / heads, a window that hides
    nothing, a theta that is the other's."""
    if c.window_theta == c.rope_theta and c.rope is None:
        c = replace(c, window_theta=None)
    if c.attention_scale == c.D**-0.5:
        c = replace(c, attention_scale=None)
    if c.head_width and c.head_width * c.heads == c.width:
        c = replace(c, head_width=None)
    hides = c.window_theta or (c.window and c.window < c.context)
    if c.window and (not hides or len(c.unwindowed) == c.layers):
        c = replace(c, window=None, unwindowed=(), window_theta=None)
    return c
