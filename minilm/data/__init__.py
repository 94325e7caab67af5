"""From text to batches: corpora, tokenizers, streams of token ids."""

from minilm.data.batches import (
    IGNORED,
    Batches,
    MaskedBatches,
    corrupt,
    mask_tokens,
    pack,
    rows,
)
from minilm.data.corpora import Corpus, load_corpus, split
from minilm.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    printable,
)

__all__ = [
    "IGNORED",
    "BPETokenizer",
    "Batches",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "MaskedBatches",
    "Tokenizer",
    "corrupt",
    "load_corpus",
    "load_tokenizer",
    "mask_tokens",
    "pack",
    "printable",
    "rows",
    "split",
]
