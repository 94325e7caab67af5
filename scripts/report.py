"""One page of all experiments: tables beside the lectures' numbers, pictures, claims with verdicts.

    python scripts/report.py                                 # what is kept in scripts/experiments
    python scripts/report.py --results runs/adaptation_methods-1

Writes one HTML file that works without network and without scripts. Needs the extra `report`.
"""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from minilm.command import command
from minilm.extras import install
from minilm.files import FormatError, read_bytes, write_atomically
from minilm.measure.verdict import FAILS, HOLDS, OPEN
from minilm.results import Result, claimed, found, number

FOLDER = Path(__file__).resolve().parent
MARKS = {HOLDS: "✓", FAILS: "✗", OPEN: "?"}
SVG = "http://www.w3.org/2000/svg"
DRAWN = {"svg", "g", "path", "text", "tspan", "use", "defs", "clipPath", "rect"}
ET.register_namespace("", SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def main(results: tuple[Path, ...] = (), out: Path = Path("runs/report.html")):
    """One page of all experiments.

    Args:
        results: JSON files of results, or folders of runs; by default what is kept in
            scripts/experiments.
        out: file for the page.
    """
    paths = [path / "result.json" if path.is_dir() else path for path in results]
    paths = paths or sorted((FOLDER / "experiments").glob("*.json"))
    if not paths:
        raise ValueError("no result is kept in scripts/experiments: run an experiment, and give "
                         "its folder as --results")
    text = page(paths)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text.encode())
    print(f"{out}: {len(paths)} experiment{'s' * (len(paths) > 1)}")


def page(paths: list[Path]) -> str:
    """The page's HTML: results, and the pictures that lie beside them."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise ImportError(f"a page needs jinja2: {install('report')}") from None
    shown = []
    for i, path in enumerate(paths, 1):
        result, svg = Result.load(path), picture(path.with_suffix(".svg"), f"picture-{i}-")
        shown.append({"id": f"{result.name}-{i}", "result": result, "claims": claims(result),
                      "picture": svg and Markup(svg)})
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.get_template("report.html.jinja")
    return template.render(shown=shown, number=number, marks=MARKS)


def claims(result: Result) -> list[dict]:
    """Each claim as the page shows it."""
    return [claim | {"found": claim["low"] is not None and found(claim), "claimed": claimed(claim),
                     "strip": claim["low"] is not None and strip(claim)}
            for claim in result.claims]


def strip(claim: dict) -> dict:
    """Places on a line, in percent of its length: the claimed zone, the interval, its mean, 0."""
    ends = [x for x in (claim["at_least"], claim["at_most"]) if x is not None]
    points = [*ends, 0.0, claim["low"], claim["high"]]
    margin = 0.12 * ((max(points) - min(points)) or 1.0)
    left, right = min(points) - margin, max(points) + margin
    def place(x): return round(100 * (x - left) / (right - left), 2)
    zone = [left if claim["at_least"] is None else claim["at_least"],
            right if claim["at_most"] is None else claim["at_most"]]
    return {"zone": [*map(place, zone)], "range": [place(claim["low"]), place(claim["high"])],
            "mean": place(claim["mean"]), "marks": [(x, place(x)) for x in sorted({0.0, *ends})]}


def picture(path: Path, prefix: str) -> str | None:
    """An SVG file as part of a page, with prefix before its ids; None if there is no such file.

    FormatError for a file that holds more than a drawing.
    """
    if not path.exists():
        return None
    data = read_bytes(path)
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, LookupError, ValueError) as error:  # also of an unknown encoding
        raise FormatError(path, f"not SVG: {error}") from error
    for element in root.iter():
        tag = str(element.tag).removeprefix(f"{{{SVG}}}")
        if tag not in DRAWN:
            raise FormatError(path, f"a picture may not hold <{tag}>")
        for name, value in element.attrib.items():
            if name.startswith("on") or re.search(r"url\((?!#)", value) or (
                    name.endswith("href") and not value.startswith("#")):
                raise FormatError(path, f"a picture may not hold {name}={value!r:.99}")
            own = prefix + value if name == "id" else re.sub(r"^#|(?<=url\()#", f"#{prefix}", value)
            element.set(name, own)
    try:
        return ET.tostring(root, encoding="unicode")
    except RecursionError:
        raise FormatError(path, "is nested too deeply") from None


if __name__ == "__main__":
    command(main)
