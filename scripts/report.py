"""One page of all experiments: tables beside the lectures' numbers, pictures, claims with verdicts.

    python scripts/report.py                                 # what is kept in scripts/experiments
    python scripts/report.py --results runs/adaptation_methods-1

Writes one HTML file that needs nothing else: no network, no script. Needs the extra `report`.
"""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import tyro

from minilm.files import FormatError, write_atomically
from minilm.measure.verdict import FAILS, HOLDS, OPEN
from minilm.results import Result, claimed, found, number

FOLDER = Path(__file__).resolve().parent
MARKS = {HOLDS: "✓", FAILS: "✗", OPEN: "?"}
SVG = {"svg", "g", "path", "text", "tspan", "use", "defs", "clipPath", "rect", "line", "circle",
       "title", "desc"}


def main(results: tuple[Path, ...] = (), out: Path = Path("runs/report.html")):
    """One page of all experiments.

    Args:
        results: results as JSON files, or folders of runs; by default all that are kept in
            scripts/experiments.
        out: the page.
    """
    paths = [path / "result.json" if path.is_dir() else path for path in results]
    paths = paths or sorted((FOLDER / "experiments").glob("*.json"))
    if not paths:
        raise ValueError("no result is kept in scripts/experiments: run an experiment, and give "
                         "its folder as --results")
    text = page([(Result.load(path), picture(path.with_suffix(".svg"))) for path in paths])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text.encode())
    print(f"{out}: {len(paths)} experiment{'s' * (len(paths) > 1)}")


def page(results: list[tuple[Result, str | None]]) -> str:
    """The page's HTML, of results and their pictures, SVG that `picture` has checked."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise ImportError('a page needs jinja2: pip install "minilm[report]"') from None
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    shown = [{"id": f"{result.name}-{i}", "result": result, "claims": claims(result),
              "picture": svg and Markup(with_prefix(svg, f"{result.name}-{i}-"))}
             for i, (result, svg) in enumerate(results, 1)]
    template = environment.get_template("report.html.jinja")
    return template.render(shown=shown, number=number, marks=MARKS)


def claims(result: Result) -> list[dict]:
    """Each claim as the page shows it."""
    return [claim | {"found": claim["low"] is not None and found(claim), "claimed": claimed(claim),
                     "strip": claim["low"] is not None and strip(claim)}
            for claim in result.claims]


def strip(claim: dict) -> dict:
    """Places, in percent of a line's length: the claimed zone, the interval, its mean, 0."""
    ends = [x for x in (claim["at_least"], claim["at_most"]) if x is not None]
    points = [*ends, 0.0, claim["low"], claim["high"]]
    margin = 0.12 * ((max(points) - min(points)) or 1.0)
    left, right = min(points) - margin, max(points) + margin
    def place(x): return round(100 * (x - left) / (right - left), 2)
    zone = [left if claim["at_least"] is None else claim["at_least"],
            right if claim["at_most"] is None else claim["at_most"]]
    return {"zone": [*map(place, zone)], "range": [place(claim["low"]), place(claim["high"])],
            "mean": place(claim["mean"]), "marks": [(x, place(x)) for x in sorted({0.0, *ends})]}


def picture(path: Path) -> str | None:
    """An SVG file that draws and does nothing else; None if there is none. FormatError."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        elements = list(ET.fromstring(text).iter())
    except ET.ParseError as error:
        raise FormatError(path, f"not SVG: {error}") from error
    for element in elements:
        tag = str(element.tag).rpartition("}")[2]
        if tag not in SVG:
            raise FormatError(path, f"a picture may not hold <{tag}>")
        for name, value in element.attrib.items():
            name = name.rpartition("}")[2]
            outside = name == "href" and not value.startswith("#")
            if name.startswith("on") or outside or re.search(r"url\((?!#)", value):
                raise FormatError(path, f"a picture may not hold {name}={value!r:.99}")
    return text[text.index("<svg") :]


def with_prefix(svg: str, prefix: str) -> str:
    """The same picture; its ids cannot meet those of others on the page."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"report.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
