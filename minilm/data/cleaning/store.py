"""Documents on the disk, in the order in which they came, with what finds their copies.

    kept.jsonl   {"text": ..., "source": ...}, a line each
    kept.index   an Entry each: where the line begins, a digest, the hashes of the bands

So a million documents take 144 bytes each in the index and none in memory. What is written after
the last `save` is lost in a crash: `Store` cuts the files to where they were.
"""

import json
import os
from pathlib import Path

import numpy as np

from minilm.data.cleaning.duplicates import BANDS, MinHash, bands, digest, groups, shingles

ENTRY = np.dtype([("start", "<u8"), ("digest", "<u8"), ("bands", "<u8", BANDS)])


class Store:
    """The two files in a folder, cut to `count` documents and `size` bytes of lines, and open to
    take more. ValueError if they are shorter."""

    def __init__(self, folder: Path, count: int = 0, size: int = 0):
        self.folder, self.count, self.size = Path(folder), count, size
        self.sign = MinHash()
        for name, length in (("kept.jsonl", size), ("kept.index", count * ENTRY.itemsize)):
            path = self.folder / name
            path.touch()
            if path.stat().st_size < length:
                raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected {length:,}: "
                                 "it was changed")
            os.truncate(path, length)
        self.lines, self.index = (open(self.folder / name, "ab")
                                  for name in ("kept.jsonl", "kept.index"))

    def add(self, text: str, source: str):
        """Take a document."""
        line = json.dumps({"text": text, "source": source}, ensure_ascii=False).encode() + b"\n"
        entry = np.zeros((), ENTRY)
        entry["start"] = self.size
        entry["digest"] = digest(text)
        entry["bands"] = bands(self.sign(shingles(text)))
        self.lines.write(line)
        self.index.write(entry.tobytes())
        self.count, self.size = self.count + 1, self.size + len(line)

    def save(self):
        """Force everything to the disk."""
        for file in (self.lines, self.index):
            file.flush()
            os.fsync(file.fileno())

    def close(self):
        self.lines.close()
        self.index.close()


class Kept:
    """The documents of a store, to be read in any order. It holds a file open until `close`."""

    def __init__(self, folder: Path):
        path = Path(folder) / "kept.index"
        empty = np.zeros(0, ENTRY)
        self.entries = np.memmap(path, ENTRY, "r") if path.stat().st_size else empty
        self.lines = open(Path(folder) / "kept.jsonl", "rb")

    def close(self):
        self.lines.close()

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i: int) -> dict:
        """{"text": ..., "source": ...}"""
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        self.lines.seek(int(self.entries["start"][i]))
        return json.loads(self.lines.readline())

    def exact(self) -> np.ndarray:
        """For each document the first that has the same digest: (D,)."""
        _, first, which = np.unique(self.entries["digest"], return_index=True, return_inverse=True)
        return first[which]

    def near(self, among: np.ndarray, least: float) -> np.ndarray:
        """For each of the documents `among` the first that it is near to or linked with: (D,)."""
        def members(i): return shingles(self[among[i]]["text"])
        return among[groups(self.entries["bands"][among], members, least)]
