"""Tokenizers: text to token ids and back, in three sizes of token.

ByteTokenizer needs no training and can encode every text. CharTokenizer has one id for each
character of its corpus. BPETokenizer learns frequent byte sequences (byte-level BPE, through the
`tokenizers` library); it also reads the tokenizer.json of an existing model.

All three have the same attributes and methods:

    vocab_size  ids are 0 .. vocab_size - 1
    end         id of <|endoftext|>, the border between documents
    mask        id of <|mask|>, for masked language models, or None
    encode      str -> (N,) int32; never gives end or mask, even if the text spells them
    decode      (N,) ids -> str; leaves special ids out, ValueError for an id out of range
    save        writes what load_tokenizer reads
"""

import os
from collections.abc import Iterable, Sequence

import numpy as np

from minilm.extras import install
from minilm.files import FormatError, read_json, write_atomically, write_json

END, MASK = "<|endoftext|>", "<|mask|>"

# What published tokenizers call the two; the first name that is found counts.
END_NAMES = (END, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
MASK_NAMES = (MASK, "<mask>", "[MASK]")


class ByteTokenizer:
    """One id for each byte of UTF-8. Bytes that are not valid UTF-8 decode to U+FFFD."""

    end, mask, vocab_size = 256, 257, 258

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _valid(ids, self.vocab_size)
        return ids[ids < self.end].astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        write_json(path, {"minilm_tokenizer": "bytes"})


class CharTokenizer:
    """One id for each character of an alphabet: a string in ascending order, without repeats.

    encode raises ValueError for a character that is not in it.
    """

    def __init__(self, alphabet: str):
        self.alphabet = alphabet
        self.characters = _code_points(alphabet)
        if not alphabet or (np.diff(self.characters.astype(np.int64)) <= 0).any():
            raise ValueError(f"expected characters in ascending order, got {alphabet!r:.80}")
        self.end, self.mask = len(alphabet), len(alphabet) + 1
        self.vocab_size = len(alphabet) + 2
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

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _valid(ids, self.vocab_size)
        return self.characters[ids[ids < self.end]].tobytes().decode("utf-32-le")

    def save(self, path: str | os.PathLike) -> None:
        write_json(path, {"minilm_tokenizer": "characters", "alphabet": self.alphabet})


class BPETokenizer:
    """A tokenizer of the `tokenizers` library. If it is trained here, it is byte-level BPE.

    One that is read from a file keeps its own model and normalization, so decode may not give back
    exactly the same text. Its truncation and padding are switched off. ValueError if none of its
    special tokens is in END_NAMES.
    """

    def __init__(self, tokenizer):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a special token spelled in the text is text
        added = tokenizer.get_added_tokens_decoder().items()
        special = {token.content: id for id, token in added if token.special}
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
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        tokenizer.add_special_tokens([END, MASK])
        return cls(tokenizer)

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the tokenizer cannot encode the text: {error}") from error
        ids = np.array(ids, np.int32)
        # Unigram and WordLevel can have a special token in their ordinary vocabulary as well.
        if ((ids == self.end) | (ids == self.mask)).any():
            raise ValueError("the text spells a special token that this tokenizer cannot escape")
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _valid(ids, self.vocab_size)
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def save(self, path: str | os.PathLike) -> None:
        write_atomically(path, self.tokenizer.to_str(pretty=True).encode())


Tokenizer = ByteTokenizer | CharTokenizer | BPETokenizer


def printable(text: str) -> str:
    """The text, safe to print on a terminal: control characters become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer.json: one that `save` wrote, or one in Hugging Face's format.

    Raises FormatError, FileNotFoundError, and ImportError if the format needs the library.
    """
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise FormatError(path, f"expected a JSON object, got {type(fields).__name__}")
    try:
        match fields:
            case {"minilm_tokenizer": "bytes"}:
                return ByteTokenizer()
            case {"minilm_tokenizer": "characters", "alphabet": str(alphabet)}:
                return CharTokenizer(alphabet)
            case {"minilm_tokenizer": kind}:
                raise ValueError(f"minilm_tokenizer: {kind!r:.80} with fields {list(fields)!r:.80}")
        return BPETokenizer(_read_huggingface(path))
    except ValueError as error:
        raise FormatError(path, str(error)) from error


def _read_huggingface(path):
    library = _library()
    try:
        return library.Tokenizer.from_file(os.fspath(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exception, only BaseException
        raise ValueError(f"not a Hugging Face tokenizer: {error}") from error


def _library():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"BPE needs the tokenizers library: {install('hf')}") from error
    return tokenizers


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _valid(ids, vocab_size):
    ids = np.asarray(ids)
    if ids.ndim != 1:
        raise ValueError(f"expected ids of shape (N,), got {ids.shape}")
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"expected integer ids, got {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"ids must lie in 0 .. {vocab_size - 1}, got {ids.min()} .. {ids.max()}")
    return ids.astype(np.int64)
