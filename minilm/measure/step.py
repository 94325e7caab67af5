"""A training step as plan.py sees it: what is trained, on how many tokens, in which numbers.

Letters: B batch, T tokens, N = B T rows, V vocabulary, I in, O out, r rank.
"""

import math
from dataclasses import dataclass

from minilm.arrays import BLOCK
from minilm.config import Config
from minilm.shapes import linear_layers, tensor_shapes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Step:
    """A training step: forward, cross-entropy, backward, AdamW. There is no dropout.

    targets: as in add_lora, in every block. qlora: NF4 in blocks of 64, with double quantization.
    ValueError for settings that the engine would refuse.
    """

    config: Config
    method: str  # full, lora or qlora
    batch: int
    T: int
    r: int = 8
    targets: tuple[str, ...] | str = ("q", "v")
    dtype: str = "float32"
    checkpoint_every: int = 0
    device: str = "cpu"

    def __post_init__(self):
        self.config.require_language()
        choices = {"method": ("full", "lora", "qlora"), "dtype": tuple(BYTES),
                   "device": ("cpu", "cuda")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.batch < 1 or self.checkpoint_every < 0:
            raise ValueError(f"batch must be at least 1 and checkpoint_every at least 0, got "
                             f"{self.batch} and {self.checkpoint_every}")
        if not 1 <= self.T <= self.config.context:
            raise ValueError(f"context must be 1 to {self.config.context} tokens, got {self.T}")
        if self.method == "full":
            return
        largest = min(min(linear_layers(self.config)[path]) for path in self.adapted)
        if not 1 <= self.r <= largest:
            raise ValueError(f"rank must be 1 to {largest}, a layer's size; got {self.r}")

    @property
    def adapted(self) -> set[str]:
        """The layers that have an adapter: their paths within a block."""
        paths = set(linear_layers(self.config))
        if self.method == "full":
            return set()
        if self.targets == "all-linear":
            return paths
        def fits(path, target): return f".{path}".endswith(f".{target}")
        wrong = [t for t in self.targets if not any(fits(p, t) for p in paths)]
        if wrong or not self.targets:
            raise ValueError(f"targets {wrong} match no layer of a block; there are "
                             f"{sorted(paths)} and 'all-linear'")
        return {p for p in paths if any(fits(p, t) for t in self.targets)}

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return BYTES[self.dtype]

    def array(self, features: int, wide: bool = False) -> int:
        """Bytes of an array (N, features). wide: in float32, whatever the step's dtype is."""
        return self.batch * self.T * features * (4 if wide else self.size)

    def keeps(self, *paths: str) -> bool:
        """Does one of these layers keep its input, for dW or dA?"""
        return self.method == "full" or not self.adapted.isdisjoint(paths)

    def weight(self, path: str) -> int:
        """What is alive beside a layer's dx: its dW, or its weight while that is dequantized."""
        O, I = linear_layers(self.config)[path]
        if self.method == "full":
            return O * I * self.size
        # The table look-up needs an int64 for every two codes; on a CPU it works in blocks.
        looked_up = O * I if self.device == "cuda" else min(O * I, BLOCK)
        return 4 * (O * I + looked_up) if self.method == "qlora" else 0

    def low_rank(self, *paths: str) -> int:
        """What the adapters of these layers keep: h = x A^T, (N, r) each."""
        return len(self.adapted & set(paths)) * self.array(self.r)

    def temporaries(self, size: int, whole: int, blocks: int) -> int:
        """Temporaries of a formula in by_rows: `whole` arrays, or `blocks` blocks on a CPU."""
        if self.device == "cuda" or size <= 8 * BLOCK:
            return whole * size
        return blocks * 4 * BLOCK


def parameters(c: Config) -> int:
    """Numbers in a model, each shared tensor once."""
    sizes = {path: math.prod(s) for path, s in tensor_shapes(c.of_layers([0])).items()}
    block = sum(n for path, n in sizes.items() if path.startswith("blocks."))
    return sum(sizes.values()) + (c.layers - 1) * block


def trainable(s: Step) -> int:
    """Numbers that the step changes."""
    if s.method == "full":
        return parameters(s.config)
    layers = linear_layers(s.config)
    return s.config.layers * s.r * sum(sum(layers[path]) for path in s.adapted)
