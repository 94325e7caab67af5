"""The `tokenizers` library, made safe for files that nobody has checked.

The library is written in Rust. It takes much on trust, and then

    panics               a panic is no Exception, only a BaseException, so it ends the program
    asks for all memory  saving goes through all ids from 0 to the largest; replacements that each
                         make two letters of one make 2^n of one after n of them
    forgets              a token is lost on saving if another one has its id
    draws at random      if the file has BPE-dropout

`called` turns the first into ValueError, `read` refuses or switches off the others.
"""

import base64
import os

from minilm.extras import install

STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
GROWTH = 10**4  # letters that may become of one
GAPS = 2**16  # ids without a token, beside as many as there are tokens


def library():
    """The module. ImportError, with what to install, if it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"BPE needs the tokenizers library: {install('hf')}") from error
    return tokenizers


def called(what: str, function, *args, **settings):
    """function(*args, **settings). ValueError, "what: why", if the library raises or panics."""
    try:
        return function(*args, **settings)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and panics
        raise ValueError(f"{what}: {error}") from error


def read(path: str | os.PathLike, fields: dict):
    """The library's tokenizer from a file that holds these fields.

    ValueError if it is none, or if it would take far more memory than its file and its texts.
    """
    what = "not a Hugging Face tokenizer"
    tokenizer = called(what, library().Tokenizer.from_file, os.fspath(path))
    if (growth := _growth([fields.get(step) for step in STEPS])) > GROWTH:
        raise ValueError(f"its steps can make {growth:.3g} letters of one, expected at most "
                         f"{GROWTH}")
    vocab = called(what, tokenizer.get_vocab)
    if len(owner := {id: token for token, id in vocab.items()}) < len(vocab):
        token, id = next((token, id) for token, id in vocab.items() if owner[id] != token)
        raise ValueError(f"the tokens {token!r} and {owner[id]!r} have the same id {id}")
    if (largest := max(owner, default=0)) > 2 * len(vocab) + GAPS and largest < 2**31:
        raise ValueError(f"{len(vocab)} tokens have ids up to {largest}: too many ids have none")
    for id in called(what, tokenizer.encode, "").ids:  # with what stands around each text
        if id not in owner:
            raise ValueError(f"its post-processor gives the id {id}, which no token has")
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def _growth(step) -> float:
    """How many letters these steps, one after another, can make of one."""
    if isinstance(step, list):
        product = 1.0
        for part in step:
            product *= _growth(part)
        return product
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") in ("Replace", "Prepend"):
        return max(1.0, *(len(str(step.get(field, ""))) for field in ("content", "prepend")))
    if step.get("type") == "Precompiled":
        return max(1.0, _longest(step.get("precompiled_charsmap")))
    if step.get("type") == "ByteLevel":  # two for each letter that is not ASCII
        return 2.0
    if step.get("type") == "TemplateProcessing" and isinstance(step.get("single"), list):
        return max(1.0, sum(_pieces(part, step) for part in step["single"]))
    return _growth([part for part in step.values() if isinstance(part, list)])


def _pieces(part, template) -> int:
    """How many texts or tokens a part of a template puts in."""
    if not isinstance(part, dict) or "SpecialToken" not in part:
        return 1
    try:
        return len(template["special_tokens"][part["SpecialToken"]["id"]]["ids"])
    except (TypeError, LookupError):
        return 1


def _longest(charsmap) -> int:
    """The bytes of the longest text in SentencePiece's map of letters.

    It is the size of a trie in 4 bytes, the trie, and texts with a zero byte after each.
    """
    data = base64.b64decode(charsmap) if isinstance(charsmap, str) else b""
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(map(len, texts.split(b"\0")))
