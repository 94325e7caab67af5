"""What a folder holds beside its weights: a loaded model carries it, and saving gives it back.

`model.origin` has the folder's small files as they are, (name, bytes) each. From config.json come
the family and the fields that no Config has, such as dropouts; from generation_config.json how the
model samples; the tokenizer's files come back byte for byte. What the model itself says wins: its
Config, its dtype, its ends. If its Config is none of the family any more, nothing of config.json
counts.
"""

from dataclasses import replace
from pathlib import Path

from minilm.config import Config
from minilm.files import json_bytes, read_bytes
from minilm.interop.config_json import read_config
from minilm.interop.ends import FIELDS, describe_ends
from minilm.interop.families import FAMILIES, Family
from minilm.interop.heads import HEADS
from minilm.strict import parse
from minilm.transformer import Ends

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja")
GONE = ("quantization_config", "auto_map")  # of the weights as they were; of programs there

START = "decoder_start_token_id"  # T5's
IDS, PAD = (*FIELDS.values(), START), FIELDS["pad"]

Origin = tuple[tuple[str, bytes], ...]


def remember(folder: Path) -> Origin:
    """The small files of a folder."""
    return tuple((name, read_bytes(folder / name))
                 for name in (CONFIG, GENERATION, *TOKENIZER_FILES) if (folder / name).is_file())


def model_type(origin: Origin) -> str | None:
    """The family of the folder; None for a model that was not loaded."""
    kind = _fields(origin, CONFIG).get("model_type")
    return kind if isinstance(kind, str) and kind in FAMILIES else None


def kept_fields(origin: Origin, family: Family) -> dict:
    """The fields of config.json that say nothing about a Config of this family."""
    read = {*family.fields.values(), *family.spellings, *GONE,
            *(field for spelled in family.spelled for field in spelled.fields)}
    kind = model_type(origin)  # None: T5's
    same = kind is None or any(family is f for f in (FAMILIES[kind], *HEADS[kind].values()))
    kept = _fields(origin, CONFIG) if same else {}
    return {field: value for field, value in kept.items() if field not in read}


def own_spelling(origin: Origin, family: Family, c: Config) -> dict:
    """The folder's config.json in its own words, if the family still says c with them; else {}."""
    raw = {field: value for field, value in _fields(origin, CONFIG).items() if field not in GONE}
    raw["architectures"] = [family.architecture]
    try:
        read, said = read_config(raw)
        said = replace(said, dropout=c.dropout, pooler=said.pooler if c.pooler else None)
    except ValueError:
        return {}
    if read is not family or said != c:
        return {}
    if PAD in family.fields.values():
        return raw | {PAD: c.padding}
    return {field: value for field, value in raw.items() if field != PAD}  # ends.py says it


def generation_config(folder: Path, raw: dict, ends: Ends, origin: Origin) -> dict[str, bytes]:
    """{file: bytes} for a folder whose config.json gets the fields `raw`.

    With nothing to say there is no such file, unless an older model left one: its ids would win.
    """
    kept = _fields(origin, GENERATION)
    ids = describe_ends(ends, kept) | {START: raw.get(START)}
    ids = {field: id for field, id in ids.items() if id is not None}
    fields = ids | {field: value for field, value in kept.items() if field not in IDS}
    return {GENERATION: json_bytes(fields)} if fields or (folder / GENERATION).exists() else {}


def tokenizer_files(origin: Origin, given: dict[str, dict] | None) -> dict[str, bytes]:
    """{file: bytes} of the tokenizer.

    given: the files of another one, {file: fields}, which replaces the remembered one with all that
    is its own. If it has the same tokens, it is the remembered one: then it only adds files.
    """
    own = {name: data for name, data in origin if name in TOKENIZER_FILES}
    if not given:
        return own
    files = {name: json_bytes(fields) for name, fields in given.items()}
    same = _tokens(_fields(origin, TOKENIZER)) == _tokens(given[TOKENIZER])
    return files | own if same else files


def _tokens(fields: dict) -> list:
    """What decides the ids of a text in a tokenizer.json, in the spelling of any version."""
    model, added = fields.get("model"), fields.get("added_tokens")
    model, added = (model if isinstance(model, dict) else {}), (added or [])
    return [model.get("vocab"), fields.get("post_processor") is None,
            [(token.get("id"), token.get("content")) for token in added if isinstance(token, dict)]]


def _fields(origin, name) -> dict:
    """A remembered JSON file; {} if there is none, or if it holds something else."""
    try:
        found = parse(dict(origin)[name])
    except (KeyError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
