"""Pictures of results: PNG, and SVG that takes the colour of its text from the page around it.

Needs matplotlib (extra `plots`). In an SVG text stays text, and the background is the page's, so
one picture serves light and dark pages, screens and paper. The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from minilm.files import write_atomically

INK = "#010203"  # is replaced by the page's own text colour
COLORS = ("#2f7fc1", "#d9702b", "#2f9b6d", "#b0569f", "#b58a1b", "#7a7f87", "#c94b55", "#4f9fb0")
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "minilm", "font.size": 9,
    "font.family": "sans-serif", "figure.facecolor": "none", "axes.facecolor": "none",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.linewidth": 0.6,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.13, "grid.linewidth": 0.6,
}
PLAIN = {  # what matplotlib writes -> what a page can hold
    r"(?s)^.*?(?=<svg )": "",  # the head of a file
    r"(?s)\s*<metadata>.*?</metadata>": "",  # who drew it, and when
    r"(?s)(<svg [^>]*)>\s*<defs>\s*<style.*?</defs>":  # a style that would apply to the whole page
        r'\1 stroke-linejoin="round" stroke-linecap="butt" font-family="sans-serif">',
    r"font-family: [^;]*; ": "",
}


def curve(axes, found: dict[float, list[float]], color: str, label: str):
    """A line through the means of found, x -> numbers, and a dot for each number."""
    found = {x: numbers for x, numbers in found.items() if numbers}
    axes.plot([*found], [fmean(numbers) for numbers in found.values()], color=color, label=label)
    for x, numbers in found.items():
        axes.plot([x] * len(numbers), numbers, "o", color=color, markersize=4, alpha=0.6,
                  markeredgewidth=0)


def bars(axes, found: dict[str, list[float]], color_of: Callable[[str], str]):
    """From top to bottom a bar for the mean of each name's numbers, and a dot for each number."""
    for i, name in enumerate(names := [*found][::-1]):
        axes.barh(i, fmean(found[name]), color=color_of(name), alpha=0.45)
        axes.plot(found[name], [i] * len(found[name]), "o", color=color_of(name), markersize=4,
                  markeredgewidth=0)
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)


def save_png(figure, path: Path) -> Path:
    """Save a figure of matplotlib as a whole file, in a folder that is made if need be."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())
    return path


def draw_svg(path: Path, draw: Callable, size: tuple[float, float] = (4.6, 3.2)) -> Path | None:
    """Let draw(figure) fill a figure of `size` inches, and save it; None without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg")
    text = file.getvalue().decode().replace(INK, "currentColor")
    for pattern, plain in PLAIN.items():
        text = re.sub(pattern, plain, text)
    write_atomically(path, text.encode())
    return path
