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
)
from minilm.data.chat import (
    Chat,
    load_chat,
    plain,
    read_names,
    read_templates,
    write_templates,
)
from minilm.data.conversations import (
    answer_rows,
    holds_conversations,
    load_conversations,
    opening,
)
from minilm.data.corpora import Corpus, load_corpora, load_corpus
from minilm.data.heldout import account, split, split_records
from minilm.data.instructions import (
    InstructionBatches,
    Record,
    RowBatches,
    encode,
    filled,
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
    "Chat",
    "Corpus",
    "InstructionBatches",
    "MaskedBatches",
    "Record",
    "RowBatches",
    "Tokenizer",
    "account",
    "adopt_end",
    "answer_rows",
    "batches_of",
    "corrupt",
    "cut",
    "encode",
    "filled",
    "holds_conversations",
    "load_chat",
    "load_conversations",
    "load_corpora",
    "load_corpus",
    "load_records",
    "load_tokenizer",
    "make_tasks",
    "mask_tokens",
    "opening",
    "pack",
    "plain",
    "printable",
    "prompt",
    "read_names",
    "read_templates",
    "save_records",
    "score",
    "split",
    "split_records",
    "write_templates",
]
