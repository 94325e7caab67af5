"""How a training step's time and memory grow with the model and with the text.

    python scripts/bench/benchmark.py --rows growth

    time = k N^a    memory = k N^a    N parameters, then T tokens of a text in N's place      (1)

Models of 0.1 to 100 million parameters see 4 texts of 256 tokens. A model of 11 million sees texts
of 64 to 4096 tokens, 8192 tokens a step. The exponent a is the slope of the least squares line
through the logarithms, with its standard error: it says how well (1) holds, as small models wait
for Python and large ones multiply. So the exponent of the three largest stands beside it. Memory
is what a step takes beyond weights and Adam's states (see contenders.py).
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contenders import Shape, our_config, our_side, torch_side
from turns import in_turn

V = 512
SIZES = [Shape(layers, heads, width, 256, 4, V) for layers, heads, width in (
    (1, 2, 64), (2, 4, 96), (4, 4, 144), (6, 6, 192), (6, 6, 384), (10, 8, 512), (14, 12, 768))]
LENGTHS = [Shape(6, 6, 384, T, 8192 // T, V) for T in (64, 128, 256, 512, 1024, 2048, 4096)]
ROUNDS = 3  # at most: the large ones take seconds
LIBRARIES = 1 << 30  # bytes that Python and PyTorch take of their own
SIDES = "PyTorch", "minilm"


@dataclass(frozen=True)
class Point:
    """What both sides take, in the order of SIDES."""

    x: int  # parameters, or tokens of a text
    seconds: tuple  # of each turn
    memory: tuple  # MiB

    def time(self, side) -> float:
        return statistics.median(self.seconds[side])


def measure(rounds: int, threads: bool, picture: Path):
    """Print the tables, and draw the picture."""
    from minilm.extras import told
    from minilm.measure.step import parameters
    from minilm.picture import draw_svg

    found = {}
    for title, x, shapes in (("parameters", lambda s: parameters(our_config(s)), SIZES),
                             ("tokens of a text", lambda s: s.context, LENGTHS)):
        print(f"\n| {title} | PyTorch | minilm | ratio | PyTorch | minilm | share |\n" + 7 * "|---"
              + "|", flush=True)
        found[title] = list(points(x, shapes, min(rounds, ROUNDS), threads))
    print("\n| exponent | PyTorch | minilm |\n|---|---|---|")
    print(*exponents(found), sep="\n")
    picture.parent.mkdir(parents=True, exist_ok=True)
    print(told("growth", draw_svg(picture, lambda figure: draw(figure, found), (7.2, 5.6))))


def points(x, shapes, rounds, threads):
    """A Point for each shape that fits in memory; prints its line. x: shape -> the Point's x.

    The first answer of a side is MiB, the others are seconds.
    """
    from minilm.measure.fit import available

    for shape in shapes:
        room, needed = available(), needs(shape)
        if room is not None and needed > room:
            print(f"| {x(shape):,} | left out: it needs {needed / 2**30:.1f} GiB, "
                  f"{room / 2**30:.1f} are free | | | | | |", flush=True)
            continue
        answers = in_turn(((torch_side, "memory", shape), (our_side, "memory", shape, threads)),
                          rounds + 1)
        point = Point(x(shape), tuple(side[1:] for side in answers),
                      tuple(side[0] for side in answers))
        print(line(point), flush=True)
        yield point


def needs(shape) -> int:
    """About the bytes that both sides take at once."""
    from minilm.measure.plan import plan
    from minilm.measure.step import Step

    step = Step(our_config(shape), "full", shape.batch, shape.context)
    return 2 * plan(step).total + LIBRARIES


def line(p: Point) -> str:
    times = [f"{1e3 * p.time(side):.4g} ms ({1e3 * min(p.seconds[side]):.4g} - "
             f"{1e3 * max(p.seconds[side]):.4g})" for side in (0, 1)]
    return (f"| {p.x:,} | {' | '.join(times)} | {p.time(0) / p.time(1):.2f} | {p.memory[0]:.0f} "
            f"MiB | {p.memory[1]:.0f} MiB | {p.memory[1] / p.memory[0]:.2f} |")


def exponents(found: dict[str, list[Point]]):
    """The lines of the table of exponents."""
    for what, value in (("time", Point.time), ("memory", lambda p, side: p.memory[side])):
        for title, all_of_them in found.items():
            for part, some in (("", all_of_them), (", the three largest", all_of_them[-3:])):
                if len(some) > 2:
                    cells = [exponent([p.x for p in some], [value(p, side) for p in some])
                             for side in (0, 1)]
                    cells = [f"{a:.2f} ± {error:.2f}" for a, error in cells]
                    yield f"| {what} by {title}{part} | {' | '.join(cells)} |"


def exponent(x, y) -> tuple[float, float]:
    """(a of eq. (1), its standard error), of three points or more.

    >>> exponent([1, 10, 100], [2, 20, 200])
    (1.0, 0.0)
    """
    from minilm.measure.scaling import power

    law, u = power(x, y), np.log(x)
    gaps = np.log(y) - np.log(law.at(np.asarray(x, float)))
    error = math.sqrt((gaps @ gaps) / (len(gaps) - 2) / ((u - u.mean()) @ (u - u.mean())))
    return law.a, round(error, 12)  # without noise it is 0, not what rounding leaves


def draw(figure, found: dict[str, list[Point]]):
    """Above time, below memory; by parameters and by tokens."""
    from minilm.picture import COLORS

    rows = figure.subplots(2, len(found), squeeze=False)
    for (title, some), time, memory in zip(found.items(), *rows):
        for side, name in enumerate(SIDES):
            x, style = [p.x for p in some], dict(color=COLORS[1 - side], label=name, marker="o",
                                                 markersize=3)
            time.plot(x, [p.time(side) for p in some], **style)
            memory.plot(x, [p.memory[side] for p in some], **style)
        for axes, what in ((time, "seconds a step"), (memory, "MiB of a step")):
            axes.set(xscale="log", yscale="log", xlabel=title, ylabel=what)
            low, high = axes.get_ylim()
            room = math.sqrt(max(1, 10 * low / high))  # on each side, up to a factor of ten in all
            axes.set_ylim(low / room, high * room)  # so that two percent do not look steep
    rows[0][0].legend(frameon=False)
