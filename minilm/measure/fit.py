"""Does a model fit this machine? What generation takes beside the weights, and what is there."""

from pathlib import Path

from minilm.config import Config
from minilm.measure.activations import step
from minilm.measure.step import BYTES, Step
from minilm.shapes import linear_layers


def generating(c: Config, batch: int, T: int, dtype: str = "float32",
               bits: int | None = None) -> int:
    """Bytes beside the weights for writing texts of T tokens, most of which are the prompt.

    The keys and values of all tokens, which are exact, and what is alive at the highest moment of
    the prompt's pass: about, from a training step's forward pass. bits: of the linear layers. Their
    weight is made when it is used; LLM.int8() makes copies of its input as well.
    """
    cache = 2 * c.layers * c.kv_heads * c.D * batch * T * BYTES[dtype]
    weight = 4 * max(O * I for O, I in linear_layers(c).values()) if bits else 0
    copies = 3 * 4 * batch * T * c.hidden if bits == 8 else 0
    forward = max(op.forward for op in step(Step(c, "full", batch, T, dtype=dtype)))
    return cache + weight + copies + forward


def available(system: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may still take, on Linux; None if nothing tells.

    Of what the machine has and what the process's group of processes (cgroup) may have, the less.
    """
    found = []
    for line in _lines(system / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    limit, used = (_lines(system / "sys/fs/cgroup" / name) for name in
                   ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        found.append(max(0, int(limit[0]) - int(used[0])))
    return min(found, default=None)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
