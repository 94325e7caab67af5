"""Bytes of a training step of minilm.transformer, from shapes alone.

Weights, adapters, gradients and AdamW's states are counted from the shapes of the tensors.
Activations are all else that is alive at the highest moment of the step (activations.py). For
float32 on a CPU this predicts what `plan_memory.py --check` measures, except for Python's own
objects, about 0.1 MB. Of methods other than full, LoRA and QLoRA the activations are about right:
activations.py says what is not counted. For 16 bits, and for a GPU, whose ops work on whole arrays,
it counts the same arrays; this is not measured.
"""

import math
from typing import NamedTuple

from minilm.measure.activations import peak, step
from minilm.measure.step import OWN, Step, parameters, trainable
from minilm.peft.subspace import power_of_2
from minilm.quantize.fourbit import GROUP
from minilm.shapes import linear_layers


class Plan(NamedTuple):
    """Bytes of a training step."""

    weights: int  # the model's own, quantized or not
    adapters: int
    gradients: int
    optimizer: int  # AdamW's m and v, and the masters of 16-bit parameters
    activations: int  # all else at the highest moment

    total = property(sum)


def plan(s: Step) -> Plan:
    """How the memory of a step is made up."""
    trained, states = trainable(s), 2 if s.size == 4 else 3
    if s.method == "subspace":
        D = parameters(s.config)
        masters = 0 if s.size == 4 else 4 * D
        return Plan(weights(s), D * s.size, 4 * D, inside(s) + masters, peak(step(s)))
    adapters = 0 if s.method in OWN else trained * s.size
    return Plan(weights(s), adapters, 4 * trained, 4 * trained * states, peak(step(s)))


def inside(s: Step) -> int:
    """AdamW's m and v of theta^d, theta^d itself, and Fastfood's B (d,), G, Pi and Pi^T (n,)."""
    return 4 * (4 * s.d + 3 * power_of_2(parameters(s.config)))


def weights(s: Step) -> int:
    """The model's own weights."""
    numbers = parameters(s.config)
    if s.method != "qlora":
        return numbers * s.size
    sizes = [O * I for O, I in linear_layers(s.config).values()]
    rest = numbers - s.config.layers * sum(sizes)  # embeddings, norms, biases, the head
    return s.config.layers * sum(map(nf4, sizes)) + rest * s.size


def nf4(n: int, block_size: int = 64) -> int:
    """n numbers as a FourBit with double quantization: 4.127 bits each, if n is large."""
    blocks = math.ceil(n / block_size)  # codes; c2, 8 bits each; c1 and their offset, float32
    return math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / GROUP) + 4
