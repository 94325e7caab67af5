"""A trained model, as a program's user names it: a folder, an adapter's folder, both or neither."""

import sys
from pathlib import Path

from minilm.interop import base_of, load_adapter, load_model
from minilm.peft import merge_lora, unload_lora
from minilm.peft.adapted import merges
from minilm.run import newest_model
from minilm.transformer import Transformer


def load_trained(model: Path | None, adapter: Path | None, merge: bool = True,
                 job: str = "writes on") -> tuple[Path, Transformer]:
    """The model's folder, and the model with the adapter in its weights, or beside them if it
    cannot be merged or shall not be.

    model: by default the one that the adapter names, or without an adapter the newest runs/*/model;
    stderr says which. job: what the model is for, for the error if it cannot do it. ValueError for
    such a model, and if the adapter names no folder; FormatError, FileNotFoundError.
    """
    folder = model or (base_folder(adapter) if adapter else newest_model(Path("runs")))
    if not model:
        print(f"{folder}:", file=sys.stderr)
    elif adapter and Path(base_of(adapter) or model).absolute() != model.absolute():
        print(f"{adapter} was made for {base_of(adapter)}", file=sys.stderr)
    transformer = load_model(folder).eval()
    transformer.config.require_writer(folder, job)
    if adapter and merges(load_adapter(transformer, adapter)) and merge:
        unload_lora(merge_lora(transformer))
    return folder, transformer


def base_folder(adapter: Path) -> Path:
    """The folder of the model that the adapter is for."""
    base = base_of(adapter)
    if not base or not Path(base).is_dir():
        named = f"names {base!r}, which is no folder here" if base else "does not name its model"
        raise ValueError(f"{adapter} {named}: give --model")
    return Path(base)
