"""PEFT's methods that put rows in front of the text: FRONTS has what it calls their settings.

The folder holds one table, prompt_embeddings:

    PROMPT_TUNING    (p, C): rows like those of the embedding
    PREFIX_TUNING    (p, 2 L K D): for each row k and v of layer 0, k and v of layer 1, ..

With classes (SEQ_CLS) PEFT trains the classifier too, and keeps it as base_model.<module>.weight.
That goes for models that look at a text's last token; behind a prompt PEFT looks at the last row,
even if that is padding, so there texts are padded on the left. Other models look at the first one:
in PEFT it is the first row, here the first token of the text.

With prefix_projection PEFT trains an MLP, but it saves what the MLP gives, as a prefix here is
saved too. P_TUNING is refused: an encoder makes its rows, and is not in the folder.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minilm.backend import array_module, to_device
from minilm.files import FormatError
from minilm.interop.huggingface import check, finite
from minilm.interop.peft_formats import names
from minilm.peft.adapted import FRONT, placed
from minilm.peft.prefix import Prefix, Rows
from minilm.peft.prompt import Prompt
from minilm.peft.retrained import Retrained, retrained
from minilm.tensor import no_grad
from minilm.transformer import Transformer

KEY = "prompt_embeddings"


class FrontFormat(NamedTuple):
    """How PEFT writes rows in front of the text."""

    method: type  # of the adapter
    fields: dict  # of adapter_config.json: (default, test of a value, what passes, in words)
    sizes: Callable  # Config -> what token_dim, num_attention_heads and a row's width must be
    read: Callable  # (table, Config) -> the adapter
    write: Callable  # adapter -> table


def _whole(v): return type(v) is int and v > 0
def _maybe(v): return v is None or _whole(v)


FIELDS = {
    "base_model_name_or_path": (None, lambda v: v is None or type(v) is str, "a name or null"),
    "modules_to_save": (None, lambda v: v is None or names(v), "names"),
    "num_virtual_tokens": (None, _whole, "a positive integer"),
    "token_dim": (None, _maybe, "a positive integer or null"),
    "num_layers": (None, _maybe, "a positive integer or null"),
    "num_attention_heads": (None, _maybe, "a positive integer or null"),
    "num_transformer_submodules": (None, lambda v: v in (None, 1), "1 or null"),
}
INERT = {  # what the rows start from, and how PEFT makes them while it trains
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_hidden_size", "prefix_projection", "init_weights",
}


def _rows_of(table, c):  # (p, 2 L K D) -> a Prefix
    parts = table.reshape(len(table), 2 * c.layers, 1, c.kv_heads, c.D).transpose(1, 2, 3, 0, 4)
    parts = array_module(table).ascontiguousarray(parts)  # (2 L, 1, K, p, D)
    return Prefix([Rows(k, v) for k, v in zip(parts[::2], parts[1::2])])


def _table_of(prefix):  # a Prefix -> (p, 2 L K D)
    with no_grad():
        parts = [to_device(t.data, "cpu")[0] for pair in prefix.pairs() for t in pair]
    return np.stack(parts).transpose(2, 0, 1, 3).reshape(prefix.length, -1)


FRONTS = {
    "PROMPT_TUNING": FrontFormat(
        Prompt, FIELDS, lambda c: (c.width, None, c.width), lambda table, c: Prompt(table),
        lambda prompt: to_device(prompt.P.data, "cpu")),
    "PREFIX_TUNING": FrontFormat(
        Prefix, FIELDS, lambda c: (c.kv_heads * c.D, c.kv_heads, 2 * c.layers * c.kv_heads * c.D),
        _rows_of, _table_of),
}


def read_front(path, file, method: FrontFormat, config, arrays, whole) -> dict:
    """The adapter in the folder, and a trained head: by path. FormatError if it is for another."""
    model = whole.model
    if not isinstance(model, Transformer):
        raise FormatError(path, "peft_type is of rows in front of a Transformer's text, but this "
                                f"model is an {type(model).__name__}")
    c, p = model.config, config["num_virtual_tokens"]
    dim, heads, width = method.sizes(c)
    expected = {"token_dim": dim, "num_attention_heads": heads, "num_layers": c.layers}
    for field, own in expected.items():
        if own and config[field] not in (None, own):
            raise FormatError(path, f"{field} is {config[field]}, but for this model it is {own}")
    if p >= c.context:
        raise FormatError(path, f"num_virtual_tokens is {p}, which leaves no room for a text: the "
                                f"model's context is {c.context}")
    if (saved := config["modules_to_save"]) and not _classifies(c):
        raise FormatError(path, f"modules_to_save is {saved!r}, which is not supported in front of "
                                "a text but for classes of its last token")
    trained = whole.wanted(config, (), arrays)
    check(file, arrays, {KEY: (p, width)} | {
        key: whole.shape(module, kind) for key, (module, kind, _) in trained.items()})
    table = finite(file, KEY, arrays[KEY], placed(model, ()).dtype)
    return whole.read(file, arrays, trained, {FRONT: method.read(placed(model, table), c)})


def _classifies(c) -> bool:
    """Are there classes, of a text's last token?"""
    return bool(c.labels) and not c.pooler


def write_front(name, adapters, whole, raw) -> tuple[dict, dict]:
    """(the tensors, the fields; raw has those of all methods). ValueError if PEFT has no such.

    A classifier is always there: PEFT gives classes only with one that it trains.
    """
    c, heads, tensors = whole.model.config, {}, {}
    if _classifies(c):
        head = adapters.get("head") or retrained(whole.bases["head"])
        heads = {"head": head} if type(head) is Retrained and not head.inner else {}
    if adapters.keys() - heads.keys() != {FRONT}:
        raise ValueError(f"the adapter {name!r} is in front of the text and on layers too; PEFT "
                         "has one method in a folder")
    adapter = adapters[FRONT]
    for part in (adapter, *heads.values()):
        part.require_finite()
    if heads:
        tensors, saved, _ = whole.write(heads, {})
        raw = raw | {"modules_to_save": saved, "task_type": "SEQ_CLS"}
    raw = {field: value for field, value in raw.items() if field != "fan_in_fan_out"}
    for kind, method in FRONTS.items():
        if type(adapter) is method.method:
            dim, heads, _ = method.sizes(c)
            own = {"prefix_projection": False, "encoder_hidden_size": None} if heads else {
                "prompt_tuning_init": "RANDOM"}
            return tensors | {KEY: method.write(adapter)}, raw | {
                "peft_type": kind, "num_virtual_tokens": adapter.length, "token_dim": dim,
                "num_layers": c.layers, "num_attention_heads": heads or c.heads,
                "num_transformer_submodules": 1} | own
    raise ValueError(f"the adapter {name!r} is a {type(adapter).__name__}; PEFT's in front are "
                     f"{[*FRONTS]}")
