"""Several files of a folder that change as one: a model and its config, an adapter and its config.

After an error or a kill at any moment all of them are old or all are new, for readers that call
`settle` first. The new files are written to a folder, .saved, which appears by one rename and
counts from then on. They are moved from there to their places, *.json last. So a reader that knows
nothing of .saved may find a folder without its config, but never an old config beside new weights.
Of several writers one after the other moves its files: the folder is held meanwhile.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from minilm.files import sync_folder, temporary, write_synced
from minilm.locks import hold


def write_together(folder: str | os.PathLike, files: dict[str, Iterable[bytes]]) -> None:
    """Write files, {name: parts}, into a folder, which is made if need be; others there stay."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    with temporary(folder / "saved", folder=True) as new:
        for name, parts in files.items():
            write_synced(new / name, parts)
        sync_folder(new)
        with hold(folder):
            _settle(folder)
            os.replace(new, folder / ".saved")
            sync_folder(folder)
            _settle(folder)


def settle(folder: str | os.PathLike) -> None:
    """Finish what `write_together` was doing in the folder when it was killed."""
    if (Path(folder) / ".saved").is_dir():
        with hold(folder):
            _settle(Path(folder))


def _settle(folder):
    if not (saved := folder / ".saved").is_dir():  # another has finished it
        return
    names = sorted(os.listdir(saved))
    late = [name for name in names if name.endswith(".json")]
    for name in late:
        (folder / name).unlink(missing_ok=True)
    for name in [name for name in names if name not in late] + late:
        os.replace(saved / name, folder / name)
    sync_folder(folder)
    saved.rmdir()
