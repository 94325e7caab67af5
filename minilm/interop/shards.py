"""The weights of a Hugging Face folder: model.safetensors, or several such files and their index.

What the folder is instead, if it holds no such weights, is said in words.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minilm.files import FormatError, read_json
from minilm.tensorfiles import Stored, open_tensors

FILE = "model.safetensors"
CONVERT = """it is converted by transformers:
    from transformers import AutoModelForCausalLM  # or the class that config.json names
    AutoModelForCausalLM.from_pretrained({}).save_pretrained("converted")"""


def require_folder(folder: Path) -> None:
    """FileNotFoundError if there is no such folder, FormatError if it is none of a model."""
    if not os.path.lexists(folder):
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(folder))
    if not folder.is_dir():
        raise FormatError(folder, "is no folder; a model is a folder with config.json and "
                                  f"{FILE}")
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        raise FormatError(folder, "holds an adapter, not a model: load the model that it is for, "
                                  "and then this with interop.peft.load_adapter(model, folder), or "
                                  "give a program --adapter")
    require_no_run(folder)
    _require_no_other_weights(folder)


def require_no_run(folder: Path) -> None:
    """FormatError if this is the folder of a run, with the folders in it that can be given."""
    if not (folder / "run.json").exists():
        return
    found = sorted({str(path.parent) for path in folder.glob("*/*.safetensors")})
    said = f"give {' or '.join(found)}" if found else "it has no model or adapter yet"
    raise FormatError(folder, f"is the folder of a run: {said}")


@contextmanager
def open_arrays(folder: Path) -> Iterator[tuple[Path, dict[str, Stored]]]:
    """(model.safetensors or the index of its shards, {key: tensor}), to be read in the `with`.

    Raises FileNotFoundError, and FormatError for damaged files.
    """
    file, index = folder / FILE, folder / f"{FILE}.index.json"
    with ExitStack() as opened:
        if file.exists() or not index.exists():
            if not file.exists():
                _require_no_other_weights(folder)
            yield file, opened.enter_context(open_tensors(file))
            return
        arrays = {}
        for shard in _shards(index):
            try:
                part = opened.enter_context(open_tensors(folder / shard))
            except FileNotFoundError:
                said = f"weight_map names {shard!r}, which is not there"
                raise FormatError(index, said) from None
            if twice := part.keys() & arrays.keys():
                raise FormatError(folder / shard, f"has what another shard has: {some(twice)}")
            arrays |= part
        yield index, arrays


def some(names) -> str:
    """The first five, and how many more there are."""
    first, more = sorted(names)[:5], len(names) - 5
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _shards(index) -> list[str]:
    """The files that the index names, in order."""
    raw = read_json(index)
    shards = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(shards, dict):
        raise FormatError(index, f"weight_map is {shards!r}, expected keys and their files")
    names = sorted(set(map(str, shards.values())))
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII):
            raise FormatError(index, f"weight_map names {name!r}, expected a .safetensors file")
    return names


def _require_no_other_weights(folder):
    """FormatError, which says what to do, if the folder's weights are in another format."""
    names = sorted(os.listdir(folder))
    for name in names:
        if name.endswith(".gguf"):
            raise FormatError(folder / name, "is GGUF; " + CONVERT.format(
                f'"{folder}", gguf_file="{name}"'))
    for name in names:
        if name.endswith((".bin", ".pt", ".pth")):
            raise FormatError(folder / name, "is a pickle, which may run any program; "
                              + CONVERT.format(f'"{folder}"'))
