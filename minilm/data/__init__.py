"""From text to batches: corpora, tokenizers, streams of token ids, instructions and tasks."""

from minilm.data.batches import (
    IGNORED,
    Batches,
    MaskedBatches,
    batches_of,
    corrupt,
    mask_tokens,
    pack,
    rows,
)
from minilm.data.corpora import Corpus, load_corpus, split
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
    "batches_of",
    "corrupt",
    "encode",
    "load_corpus",
    "load_records",
    "load_tokenizer",
    "make_tasks",
    "mask_tokens",
    "pack",
    "printable",
    "prompt",
    "rows",
    "save_records",
    "score",
    "split",
]
