"""A model from any folder, and into one: of plain weights, or of 4-bit or 8-bit ones."""

import os
from pathlib import Path

from minilm.files import read_json
from minilm.interop import bitsandbytes, huggingface
from minilm.interop.shards import require_folder
from minilm.quantize.linear import is_quantized
from minilm.together import settle
from minilm.transformer import Transformer


def load_model(
    path: str | os.PathLike, dtype: str = "float32", dropout: float = 0.0
) -> Transformer:
    """The Transformer in a folder of transformers.

    What is not quantized there is cast to dtype, one of huggingface.FLOATS; linear layers in 4 or 8
    bits become QuantizedLinears, code for code. Loading takes as much memory as the model, and for
    a moment its largest tensor. Weights that need no cast stay in the pages of the file: another
    may replace it, as `save_model` does, but do not write into it while the model lives. Raises
    FileNotFoundError. Raises FormatError, naming the field or the keys, if a file is damaged or
    Transformer cannot express what it says.
    """
    settle(path := Path(path))
    require_folder(path)
    raw = read_json(path / "config.json")
    quantized = isinstance(raw, dict) and raw.get("quantization_config") is not None
    return (bitsandbytes if quantized else huggingface).load_model(path, dtype, dropout)


def save_model(model: Transformer, path: str | os.PathLike, tokenizer=None) -> None:
    """Write a folder that transformers and `load_model` read; see huggingface.save_model, or for a
    quantized model bitsandbytes.save_model."""
    (bitsandbytes if is_quantized(model) else huggingface).save_model(model, path, tokenizer)
