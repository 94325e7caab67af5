"""A model or an adapter from any folder, and into one.

A model is of plain weights, or of 4-bit or 8-bit ones. An adapter is in PEFT's folder or, for
bottlenecks and subspaces, in one of our own.
"""

import errno
import os
from pathlib import Path

from minilm.files import FormatError, read_json
from minilm.interop import bitsandbytes, bottlenecks, huggingface, peft, subspaces
from minilm.interop.shards import require_folder, require_no_run
from minilm.nn import Module
from minilm.peft.adapted import adapted_layers
from minilm.peft.bottleneck import Bottleneck
from minilm.peft.subspace import Moved
from minilm.quantize.linear import is_quantized
from minilm.together import settle
from minilm.transformer import Transformer

OURS = {Bottleneck: bottlenecks, Moved: subspaces}  # what PEFT has no form for


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


def load_adapter(model: Module, path: str | os.PathLike, name: str = "default") -> Module:
    """Put the folder's adapter on the model, and let it act; returns the model.

    Raises what the load_adapter of peft, bottlenecks or subspaces raises.
    """
    settle(path)
    _require_adapter(Path(path))
    return (own_format(path) or peft).load_adapter(model, path, name)


def save_adapter(model: Module, path: str | os.PathLike, name: str = "default",
                 base: str | os.PathLike | None = None) -> None:
    """Write the model's adapter of this name; see save_adapter of peft, bottlenecks or subspaces.
    """
    kinds = {type(m.adapters.get(name)) for m in adapted_layers(model).values()}
    ours = next((OURS[kind] for kind in kinds if kind in OURS), peft)
    ours.save_adapter(model, path, name, base)


def own_format(path: str | os.PathLike):
    """The module that reads this folder of an adapter, if it is one of our own; or else None."""
    return next((m for m in OURS.values() if (Path(path) / m.CONFIG).exists()), None)


def base_of(path: str | os.PathLike) -> str | None:
    """The folder or name of the model that the folder's adapter is for, if the folder says it.

    Raises FileNotFoundError and FormatError.
    """
    settle(path)
    _require_adapter(Path(path))
    ours = own_format(path)
    return ours.read(path).base or None if ours else peft.base_of(path)


def _require_adapter(folder: Path) -> None:
    """FileNotFoundError if there is no such folder, FormatError if it is none of an adapter."""
    if not os.path.lexists(folder):
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(folder))
    if not folder.is_dir():
        raise FormatError(folder, "is no folder; an adapter is a folder with adapter_config.json")
    if (folder / "adapter_config.json").exists():
        return
    if (folder / "config.json").exists():
        raise FormatError(folder, "holds a model, not an adapter: give it to load_model, or to a "
                                  "program as --model")
    require_no_run(folder)
