"""From text to batches: corpora, tokenizers, streams of token ids, instructions and tasks."""

from minilm.data.batches import (
    IGNORED,
    Batches,
    MaskedBatches,
    batches_of,
    corrupt,
    cut,
    mask_tokens,
    pack,
    rows_of,
)
from minilm.data.corpora import Corpus, load_corpora, load_corpus
from minilm.data.heldout import account, split, split_records
from minilm.data.instructions import (
    InstructionBatches,
    Record,
    encode,
    load_records,
    prompt,
    save_records,
)
from minilm.data.tasks import TASKS, make_tasks, score
from minilm.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    adopt_end,
    load_tokenizer,
    printable,
)

__all__ = [
    "IGNORED",
    "TASKS",
    "BPETokenizer",
    "Batches",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "InstructionBatches",
    "MaskedBatches",
    "Record",
    "Tokenizer",
    "account",
    "adopt_end",
    "batches_of",
    "corrupt",
    "cut",
    "encode",
    "load_corpora",
    "load_corpus",
    "load_records",
    "load_tokenizer",
    "make_tasks",
    "mask_tokens",
    "pack",
    "printable",
    "prompt",
    "rows_of",
    "save_records",
    "score",
    "split",
    "split_records",
]
