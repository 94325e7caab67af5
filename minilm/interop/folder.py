"""A model from any folder: of plain weights, or of 4-bit or 8-bit ones."""

import os
from pathlib import Path

from minilm.files import read_json
from minilm.interop import bitsandbytes, huggingface
from minilm.interop.shards import require_folder
from minilm.together import settle
from minilm.transformer import Transformer


def load_model(
    path: str | os.PathLike, dtype: str = "float32", dropout: float = 0.0
) -> Transformer:
    """The Transformer in a folder of transformers.

    What is not quantized there is cast to dtype, one of huggingface.FLOATS; linear layers in 4 or 8
    bits become QuantizedLinears, code for code. Loading takes as much memory as the model, and for
    a moment its largest tensor. Raises FileNotFoundError. Raises FormatError, naming the field or
    the keys, if a file is damaged or Transformer cannot express what it says.
    """
    settle(path := Path(path))
    require_folder(path)
    raw = read_json(path / "config.json")
    quantized = isinstance(raw, dict) and raw.get("quantization_config") is not None
    return (bitsandbytes if quantized else huggingface).load_model(path, dtype, dropout)
