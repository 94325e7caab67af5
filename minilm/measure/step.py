"""A training step as plan.py sees it: what is trained, on how many tokens, in which numbers.

Letters: B batch, T tokens, N = B T rows, V vocabulary, I in, O out, r rank.
"""

import math
from dataclasses import dataclass, replace

from minilm.arrays import BLOCK, WHOLE
from minilm.config import Config
from minilm.measure import counts
from minilm.ranges import check, one_of, optional, whole
from minilm.shapes import linear_layers, tensor_shapes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
METHODS = ("full", "top", "bitfit", "lora", "qlora", "dora", "adalora", "ia3", "bottleneck",
           "prompt", "prefix", "subspace")
LOW_RANK = ("lora", "qlora", "dora", "adalora")
KINDS = {  # of PEFT, as Lialin et al. 2023, arXiv:2303.15647, call them
    "additive": ("ia3", "bottleneck", "prompt", "prefix"),  # numbers beside the model's
    "selective": ("top", "bitfit"),  # some of the model's own
    "reparametrised": (*LOW_RANK, "subspace"),  # by a change of low rank, or by few directions
}
OWN = ("full", "top")  # these train the model's own tensors


@dataclass(frozen=True)
class Step:
    """A training step: forward, cross-entropy, backward, AdamW. There is no dropout.

    targets: as in add_lora, in every block. qlora: NF4 in blocks of 64, with double quantization.
    r: adalora's is the first one. k: blocks of top. m, form, skip: of a bottleneck. length: rows
    in front of the T tokens. prefix_hidden: of a prefix's MLP. d: of a subspace. ValueError for
    settings that the engine would refuse.
    """

    RANGES = {"method": one_of(*METHODS), "dtype": one_of(*BYTES), "device": one_of("cpu", "cuda"),
              "batch": whole(1), "checkpoint_every": whole(0), "m": whole(1),
              "form": one_of("H", "P", "L"), "length": whole(1),
              "prefix_hidden": optional(whole(1)), "d": whole(1)}

    config: Config
    method: str  # one of METHODS
    batch: int
    T: int
    r: int = 8
    targets: tuple[str, ...] | str = ("q", "v")
    dtype: str = "float32"
    checkpoint_every: int = 0
    device: str = "cpu"
    k: int = 2
    m: int = 16
    form: str = "H"
    skip: int = 0
    length: int = 16
    prefix_hidden: int | None = None
    d: int = 1000

    def __post_init__(self):
        self.config.require_language()
        check(self.RANGES, **{name: getattr(self, name) for name in self.RANGES})
        c, room = self.config, self.config.context - self.front
        if not 1 <= self.T <= room:
            taken = f", without the {self.front} rows in front" if self.front else ""
            raise ValueError(f"context must be 1 to {room} tokens{taken}, got {self.T}")
        check({"k": whole(1, c.layers if self.method == "top" else math.inf),
               "skip": whole(0, c.layers - 1 if self.method == "bottleneck" else math.inf)},
              k=self.k, skip=self.skip)
        if self.method == "subspace":
            check({"d": whole(1, parameters(c))}, d=self.d)
        if self.method == "bitfit" and not counts.bitfit(c):
            raise ValueError("bitfit trains biases, but no layer of this model has one")
        largest = min((min(linear_layers(c)[path]) for path in self.adapted), default=math.inf)
        if self.method in LOW_RANK and not 1 <= self.r <= largest:
            raise ValueError(f"rank must be 1 to {largest}, a layer's size; got {self.r}")

    @property
    def whole(self) -> bool:
        """Does every weight get a gradient?"""
        return self.method in ("full", "subspace")

    @property
    def front(self) -> int:
        """Rows in front of the text."""
        return self.length if self.method in ("prompt", "prefix") else 0

    @property
    def adapted(self) -> set[str]:
        """The layers that have an adapter: their paths within a block."""
        given = self.method in (*LOW_RANK, "ia3")
        return counts.chosen(self.config, self.targets) if given else set()

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Rows of a text that the blocks see: its tokens, and a prompt's in front of them."""
        return self.T + (self.front if self.method == "prompt" else 0)

    @property
    def keys(self) -> int:
        """Keys that a text's last token sees, those in front too."""
        return self.T + self.front

    @property
    def prefix(self) -> int:
        """Bytes of a prefix's k and v in one block, for all texts."""
        return 2 * (self.keys - self.rows) * self.batch * self.config.kv_heads * self.config.D * (
            self.size)

    def within(self, i: int) -> "Step":
        """The step as block i sees it: of top and bottlenecks some blocks are as in full training,
        and some train nothing."""
        below = self.config.layers - self.k
        if self.method == "top" and i >= below:
            return replace(self, method="full")
        if self.method == "bottleneck" and i < self.skip:
            return replace(self, method="top", k=1)
        return self

    def trains(self, *paths: str) -> bool:
        """Is there something that trains at layers whose paths begin so, or in front of them?"""
        return self.method in ("full", "subspace", "bitfit", "prefix") or any(
            path.startswith(paths) for path in self.adapted)

    def array(self, features: int, wide: bool = False, rows: int | None = None) -> int:
        """Bytes of an array (N, features). wide: in float32, whatever the step's dtype is. rows: of
        each text, by default those that the blocks see."""
        N = self.batch * (rows or self.rows)
        return N * features * (4 if wide else self.size)

    def reaches(self, i: int) -> bool:
        """Does a gradient flow to the input of block i? If nothing below it trains, none does."""
        first = {"full": 0, "subspace": 0, "prompt": 0, "top": self.config.layers - self.k + 1,
                 "bottleneck": self.skip + 1}.get(self.method, 1)
        return i >= first

    def keeps(self, *paths: str) -> bool:
        """Does one of these layers keep its input, for dW, dA or dl?"""
        if self.method == "ia3":
            paths = [path for path in paths if path.endswith("down")]
        return self.whole or not self.adapted.isdisjoint(paths)

    def weight(self, path: str) -> int:
        """What is alive beside a layer's dx: its dW, or its weight while that is dequantized."""
        O, I = linear_layers(self.config)[path]
        if self.whole:
            return O * I * self.size
        # The table look-up needs an int64 for every two codes; on a CPU it works in blocks.
        looked_up = O * I if self.device == "cuda" else min(O * I, BLOCK)
        return 4 * (O * I + looked_up) if self.method == "qlora" else 0

    def beside(self, *paths: str) -> int:
        """What the adapters of these layers keep. LoRA and AdaLoRA: h = x A^T, (N, r) each. DoRA
        also, and IA3, what they multiply, (N, O)."""
        paths, layers = self.adapted & set(paths), linear_layers(self.config)
        kept = len(paths) * self.array(self.r) if self.method in LOW_RANK else 0
        if self.method == "dora":
            kept += sum(self.array(layers[path][0]) for path in paths)
        if self.method == "ia3":
            kept += sum(self.array(layers[path][0]) for path in paths if not path.endswith("down"))
        return kept

    def temporaries(self, size: int, whole: int, blocks: int) -> int:
        """Temporaries of a formula in by_rows: `whole` arrays, or `blocks` blocks on a CPU.

        size: bytes of an array in float32.
        """
        if self.device == "cuda" or size <= 4 * WHOLE:
            return whole * size
        return blocks * 4 * BLOCK


def parameters(c: Config) -> int:
    """Numbers in a model, each shared tensor once."""
    sizes = {path: math.prod(s) for path, s in tensor_shapes(c.of_layers([0])).items()}
    block = sum(n for path, n in sizes.items() if path.startswith("blocks."))
    return sum(sizes.values()) + (c.layers - 1) * block


def trainable(s: Step) -> int:
    """Numbers that an optimizer has states of; a subspace's move all others."""
    c = s.config
    return {
        "full": lambda: parameters(c), "top": lambda: counts.top(c, s.k),
        "bitfit": lambda: counts.bitfit(c), "lora": lambda: counts.lora(c, s.r, s.targets),
        "qlora": lambda: counts.lora(c, s.r, s.targets),
        "dora": lambda: counts.dora(c, s.r, s.targets),
        "adalora": lambda: counts.adalora(c, s.r, s.targets),
        "ia3": lambda: counts.ia3(c, s.targets),
        "bottleneck": lambda: counts.bottleneck(c, s.m, s.form, s.skip),
        "prompt": lambda: counts.prompt(c, s.length),
        "prefix": lambda: counts.prefix(c, s.length, s.prefix_hidden), "subspace": lambda: s.d,
    }[s.method]()
