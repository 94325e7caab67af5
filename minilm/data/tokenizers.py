"""Tokenizers: text to token ids and back, in three sizes of token.

ByteTokenizer needs no training and can encode every text. CharTokenizer has one id for each
character of its corpus. BPETokenizer learns frequent byte sequences (byte-level BPE, through the
`tokenizers` library); it also reads the tokenizer.json of an existing model.

All three have the same attributes and methods:

    vocab_size  ids are 0 .. vocab_size - 1
    end         id of <|endoftext|>, the border between documents
    mask        id of <|mask|>, for masked language models, or None
    special     {name: id} of end, mask and others that are no text
    encode      str -> (N,) int32; never gives end or mask, even if the text spells them
    prompt      encode, for a text that a model shall go on from: see BPETokenizer
    marked      encode, but a special token's name in the text gives its id: for chat templates
    decode      (N,) ids -> str; leaves out special ids, and ids that name no token, because a
                model's table may have more rows than there are tokens. ValueError for negative ids
    fields      what tokenizer.json holds
    save        writes that, for load_tokenizer, the library `tokenizers`, and transformers
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from minilm.data.library import called, library, read
from minilm.files import FormatError, read_json, write_json

END, MASK = "<|endoftext|>", "<|mask|>"

# What published tokenizers call the two; the first name that is found counts.
END_NAMES = (END, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[SEP]")
MASK_NAMES = (MASK, "<mask>", "[MASK]")


class ByteTokenizer:
    """One id for each byte of UTF-8. Bytes that are not valid UTF-8 decode to U+FFFD."""

    end, mask, vocab_size = 256, 257, 258
    special = {END: end, MASK: mask}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    prompt = encode

    def marked(self, text: str) -> np.ndarray:
        return _marked(self, text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _named(ids, self.vocab_size)
        return ids[ids < self.end].astype(np.uint8).tobytes().decode(errors="replace")

    def fields(self) -> dict:
        """This tokenizer as byte-level BPE without a merge."""
        # There each byte is a character: itself if it can be seen, else one from U+0100 on.
        seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = (byte for byte in range(256) if byte not in seen)
        characters = dict(zip(seen, seen)) | {byte: 256 + i for i, byte in enumerate(hidden)}
        vocab = {chr(characters[byte]): byte for byte in range(256)}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False}
        return _fields({"type": "BPE", "vocab": vocab, "merges": []}, level, level, self.special)

    def save(self, path: str | os.PathLike) -> None:
        write_json(path, self.fields())


class CharTokenizer:
    """One id for each character of an alphabet: a string in ascending order, without repeats.

    encode raises ValueError for a character that is not in it, with the text around it.
    """

    def __init__(self, alphabet: str):
        self.alphabet = alphabet
        self.characters = _code_points(alphabet)
        if not alphabet or (np.diff(self.characters.astype(np.int64)) <= 0).any():
            raise ValueError(f"expected characters in ascending order, got {alphabet!r:.80}")
        self.end, self.mask = len(alphabet), len(alphabet) + 1
        self.vocab_size = len(alphabet) + 2
        self.special = {END: self.end, MASK: self.mask}
        # One more place than the last character needs: all characters beyond it look there.
        self.id_of = np.full(ord(alphabet[-1]) + 2, -1, np.int32)
        self.id_of[self.characters] = np.arange(len(alphabet))

    @classmethod
    def train(cls, documents: Iterable[str]) -> "CharTokenizer":
        """The alphabet is every character that occurs."""
        return cls("".join(sorted(set().union(*documents))))

    def encode(self, text: str) -> np.ndarray:
        ids = self.id_of[np.minimum(_code_points(text), len(self.id_of) - 1)]
        if (ids < 0).any():
            position = int(np.argmax(ids < 0))
            raise ValueError(
                f"character {text[position]!r} at position {position} is not in the alphabet of "
                f"{len(self.alphabet)} characters: {text[max(0, position - 20) : position + 20]!r}"
            )
        return ids

    prompt = encode

    def marked(self, text: str) -> np.ndarray:
        return _marked(self, text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _named(ids, self.vocab_size)
        return self.characters[ids[ids < self.end]].tobytes().decode("utf-32-le")

    def fields(self) -> dict:
        """This tokenizer as words of one character each; there too, no other can be encoded."""
        vocab = {character: id for id, character in enumerate(self.alphabet)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>"}  # no such word
        cut = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
               "invert": False}
        return _fields(model, cut, {"type": "Fuse"}, self.special)

    def save(self, path: str | os.PathLike) -> None:
        write_json(path, self.fields())


class BPETokenizer:
    """A tokenizer of the `tokenizers` library. If it is trained here, it is byte-level BPE.

    One that is read from a file keeps its own model and normalization, so decode may not give back
    exactly the same text. Its truncation and padding are switched off. ValueError if none of its
    special tokens is in END_NAMES.

    A file's post-processor puts tokens around a text, such as <s> in front. `prompt` lets it, as
    transformers does before it generates. framed=False takes it away, for a model that is trained
    on bare text.
    """

    def __init__(self, tokenizer, framed: bool = True):
        if not framed:
            tokenizer.post_processor = None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a special token spelled in the text is text
        added = tokenizer.get_added_tokens_decoder().items()
        self.special = special = {token.content: id for id, token in added if token.special}
        self.end = next((special[name] for name in END_NAMES if name in special), None)
        self.mask = next((special[name] for name in MASK_NAMES if name in special), None)
        if self.end is None:
            raise ValueError(f"no special token is one of {', '.join(END_NAMES)}")
        # Ids may have gaps, and an embedding needs a row for the largest.
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        if self.vocab_size > 2**31:
            raise ValueError(f"token id {self.vocab_size - 1} does not fit int32")
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn vocab_size tokens: 256 bytes, merges, end and mask; fewer if the text is short."""
        if isinstance(documents, str):
            raise TypeError("documents must be a sequence of texts, got one str")
        if vocab_size < 258:
            raise ValueError(f"vocab_size must be at least 256 bytes + 2, got {vocab_size}")
        tokens = library()
        tokenizer = tokens.Tokenizer(tokens.models.BPE())
        tokenizer.pre_tokenizer = tokens.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokens.decoders.ByteLevel()
        trainer = tokens.trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            initial_alphabet=tokens.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        tokenizer.add_special_tokens([END, MASK])
        return cls(tokenizer)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoded(text).ids, np.int32)

    def prompt(self, text: str) -> np.ndarray:
        framed = called("the tokenizer cannot frame the text", self.tokenizer.post_process,
                        self._encoded(text))
        return np.array(framed.ids, np.int32)

    def marked(self, text: str) -> np.ndarray:
        self.tokenizer.encode_special_tokens = False
        try:
            encoded = called(f"the tokenizer cannot encode the text {str(text)[:60]!r}",
                             self.tokenizer.encode, text, add_special_tokens=False)
        finally:
            self.tokenizer.encode_special_tokens = True
        return np.array(encoded.ids, np.int32)

    def _encoded(self, text):
        encoded = called(f"the tokenizer cannot encode the text {str(text)[:60]!r}",
                         self.tokenizer.encode, text, add_special_tokens=False)
        # Unigram and WordLevel can have a special token in their ordinary vocabulary as well.
        if not {self.end, self.mask}.isdisjoint(encoded.ids):
            raise ValueError("the text spells a special token that this tokenizer cannot escape: "
                             f"{text[:60]!r}")
        return encoded

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _named(ids, self.vocab_size)
        return called("the tokenizer cannot decode the ids", self.tokenizer.decode, ids.tolist(),
                      skip_special_tokens=True)

    def fields(self) -> dict:
        """This tokenizer in Hugging Face's format."""
        return json.loads(called("the tokenizer cannot be saved", self.tokenizer.to_str))

    def save(self, path: str | os.PathLike) -> None:
        write_json(path, self.fields())


Tokenizer = ByteTokenizer | CharTokenizer | BPETokenizer


def adopt_end(tokenizer: Tokenizer, eos: Collection[int]) -> None:
    """Make the tokenizer's end one of eos, the ids that end a model's texts (see model.ends).

    Nothing changes if its end is one of them already, or if none of them is a special token. What
    the model learns to end with is then what generation stops at.
    """
    known = [id for id in eos if id in tokenizer.special.values() and id != tokenizer.mask]
    if known and tokenizer.end not in known:
        tokenizer.end = known[0]


def printable(text: str) -> str:
    """The text, safe to print on a terminal: control characters become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def load_tokenizer(path: str | os.PathLike, framed: bool = True) -> Tokenizer:
    """Read a tokenizer.json: one that `save` wrote, or another one in Hugging Face's format.

    framed: as for BPETokenizer. Raises FormatError, FileNotFoundError, and ImportError if the
    format needs the library.
    """
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise FormatError(path, f"expected a JSON object, got {type(fields).__name__}")
    try:
        if own := _own(fields):
            return own
        match fields:  # version 0.1 had a format of its own
            case {"minilm_tokenizer": "bytes"}:
                return ByteTokenizer()
            case {"minilm_tokenizer": "characters", "alphabet": str(alphabet)}:
                return CharTokenizer(alphabet)
            case {"minilm_tokenizer": kind}:
                raise ValueError(f"minilm_tokenizer: {kind!r:.80} with fields {list(fields)!r:.80}")
        return BPETokenizer(read(path, fields), framed)
    except ValueError as error:
        raise FormatError(path, str(error)) from error


def _fields(model, pre_tokenizer, decoder, special) -> dict:
    """A tokenizer.json in Hugging Face's format."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": id, "content": name, **flags, "special": True} for name, id in special.items()]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None,
            "decoder": decoder, "model": model}


def _own(fields) -> ByteTokenizer | CharTokenizer | None:
    """The tokenizer that has exactly these fields; neither needs the library."""
    if fields == ByteTokenizer().fields():
        return ByteTokenizer()
    model = fields.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    alphabet = sorted(vocab) if isinstance(vocab, dict) else []
    if not alphabet or {len(character) for character in alphabet} != {1}:
        return None
    tokenizer = CharTokenizer("".join(alphabet))
    return tokenizer if fields == tokenizer.fields() else None


def _marked(tokenizer, text):
    """tokenizer.marked, for one that knows only characters."""
    names = "|".join(map(re.escape, tokenizer.special))
    parts = [[tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part)
             for part in re.split(f"({names})", text)]
    return np.concatenate(parts, dtype=np.int32)


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _named(ids, vocab_size):
    """The ids below vocab_size, checked."""
    ids = np.asarray(ids)
    if ids.ndim != 1:
        raise ValueError(f"expected ids of shape (N,), got {ids.shape}")
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"expected integer ids, got {ids.dtype}")
    if ids.size and ids.min() < 0:
        raise ValueError(f"ids must not be negative, got {ids.min()}")
    return ids[ids < vocab_size].astype(np.int64)
