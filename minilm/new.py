"""What a run that begins with nothing begins with: a tokenizer, and a model of random weights."""

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from minilm import data
from minilm.transformer import Config, Transformer, drop_attention


def make_tokenizer(s, parts):
    """The one that the settings ask for; parts: (training texts, held-out ones) of each corpus."""
    training = [text for documents, _ in parts for text in documents]
    if s.tokenizer == "bytes":
        return data.ByteTokenizer()
    if s.tokenizer == "chars":  # its alphabet must have every character that it will meet
        held_out = [text for _, validation in parts for text in validation]
        return data.CharTokenizer.train([s.prompt, *held_out, *training])
    if s.tokenizer == "bpe":
        documents = progress(training, "words for the tokenizer", "document")
        return data.BPETokenizer.train(documents, s.vocab_size)
    if not Path(s.tokenizer).exists():
        raise ValueError(f"tokenizer {s.tokenizer!r} is neither a path nor one of bytes, chars, "
                         "bpe")
    return data.load_tokenizer(s.tokenizer, framed=False)


def make_model(s, vocab_size: int) -> Transformer:
    """A model of the settings' family and sizes."""
    shape = dict(vocab_size=vocab_size, context=s.context, layers=s.layers, heads=s.heads,
                 width=s.width, dropout=s.dropout)
    if s.family == "gpt2":
        config = Config.gpt2(**shape)
    elif s.family == "llama":  # SwiGLU's three matrices at 8/3 of the width are as large as two
        config = Config.llama(**shape, hidden=8 * s.width // 3, bias=s.bias)  # at 4
    else:
        config = Config.bert(**shape, hidden=4 * s.width)
    return drop_attention(Transformer(config, s.seed), s.attention_dropout)


def progress(items, title: str, unit: str) -> Iterable:
    """The items, with a progress bar that disappears at the end."""
    yield from tqdm(items, title, unit=unit, leave=False, disable=None)
