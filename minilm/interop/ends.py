"""Where a text begins and ends: what a model's folder says of it, beside its architecture.

bos_token_id begins a text, eos_token_id ends it (a number or a list), and pad_token_id fills up the
shorter rows of a batch. As in transformers, generation_config.json alone says what ends a text, and
config.json if that file is absent. bos and pad, which change no text here, come from either.

tokenizer_config.json makes AutoTokenizer take tokenizer.json as it is. Without it, the class that
belongs to the architecture would build another tokenizer, or none.
"""

from pathlib import Path

from minilm.files import FormatError, read_json
from minilm.transformer import Ends

FIELDS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}


def read_ends(folder: Path) -> Ends:
    """The ids that the folder names. FormatError for one that is no id, with the file's name."""
    found = {}
    for file in (folder / "config.json", folder / "generation_config.json"):
        if file.name != "config.json" and not file.exists():
            continue
        raw = read_json(file)
        if not isinstance(raw, dict):
            raise FormatError(file, f"is {type(raw).__name__}, expected fields")
        for ours, theirs in FIELDS.items():
            ids = _ids(file, theirs, raw.get(theirs), several=ours == "eos")
            found |= {ours: ids} if ids or ours == "eos" else {}
    bos, pad = (found.get(name, (None,))[0] for name in ("bos", "pad"))
    return Ends(bos, found.get("eos", ()), pad)


def describe_ends(ends: Ends, before=()) -> dict:
    """The fields of config.json and generation_config.json.

    An id that is not known is null: left out, it would become the one of the architecture's first
    model, such as GPT-2's 50256. before: the fields until now, if a list of one should stay a list.
    """
    eos = ends.eos[0] if len(ends.eos) == 1 else list(ends.eos) or None
    if before and before.get(FIELDS["eos"]) == [eos]:
        eos = [eos]
    return {FIELDS["bos"]: ends.bos, FIELDS["eos"]: eos, FIELDS["pad"]: ends.pad}


def with_ends(raw: dict, ends: Ends) -> dict:
    """config.json with the ends. Its pad_token_id stays if it has one: there it is the id that the
    embedding does not train (Config.padding), which need not fill up texts."""
    return raw | describe_ends(ends._replace(pad=raw.get(FIELDS["pad"], ends.pad)), raw)


def ends_of(model, tokenizer) -> Ends:
    """The model's own ends; a model that has none ends its texts as the tokenizer does."""
    return model.ends if model.ends.eos else model.ends._replace(eos=(tokenizer.end,))


def tokenizer_fields(tokenizer, ends: Ends) -> dict[str, dict]:
    """{file: fields} of a tokenizer, for load_tokenizer and AutoTokenizer."""
    named = {id: name for name, id in tokenizer.special.items()}
    eos = tokenizer.end
    if eos not in ends.eos:
        eos = next((id for id in ends.eos if id in named), eos)
    roles = {"bos": ends.bos, "eos": eos, "pad": ends.pad, "mask": tokenizer.mask}
    names = {f"{role}_token": named[id] for role, id in roles.items() if id in named}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": tokenizer.fields(), "tokenizer_config.json": config | names}


def _ids(file, field, value, several) -> tuple[int, ...]:
    """The field's ids; none for null and for negative ones, which older files have for it."""
    ids = value if several and isinstance(value, list) else [] if value is None else [value]
    for id in ids:
        if type(id) is not int or abs(id) >= 2**31:
            kinds = "an id, a list of them or null" if several else "an id or null"
            raise FormatError(file, f"{field} is {value!r:.80}, expected {kinds}")
    return tuple(id for id in ids if id >= 0)
