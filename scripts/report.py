"""One page: what the lectures say, line by line, and what shows it. Or the whole run that shows it.

    python scripts/report.py                                 # of what is kept in scripts/
    python scripts/report.py --results runs/adaptation_methods-1    # of these experiments alone
    python scripts/report.py --run                           # runs everything in full, for hours
    python scripts/report.py --run --quick --jobs 2          # in minutes; the numbers mean nothing
    python scripts/report.py --run --keep                    # and leaves the results for the page

Writes one HTML file that works without network and without scripts: the claims that hold and that
do not, the slides that are wrong, each line of the lectures with its verdicts and commands, each
experiment with its table beside the lectures' and its picture. Needs the extra `report`.

A whole run leaves everything in runs/lectures, and goes on there if it was stopped. What is run is
in scripts/lectures/run.toml. --keep leaves results in scripts/experiments, what other commands
print in scripts/lectures, and the page there as index.html.
"""

import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

from minilm.command import Given, command, many, typed
from minilm.extras import install
from minilm.files import FormatError, make_place, read_bytes, write_atomically
from minilm.lectures import Line, judges, parts, read_lectures
from minilm.loop import refuse_unused
from minilm.measure.verdict import FAILS, HOLDS, OPEN
from minilm.results import Result, claimed, found, number, slide_text
from minilm.wholerun import WholeRun, filled, in_order, lasted, quickly, read_jobs

FOLDER = Path(__file__).resolve().parent
WHOLE = Path("runs/lectures")
MARKS = {HOLDS: "✓", FAILS: "✗", OPEN: "?"}
SVG = "http://www.w3.org/2000/svg"
DRAWN = {"svg", "g", "path", "text", "tspan", "use", "defs", "clipPath", "rect"}
ET.register_namespace("", SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def main(results: tuple[Path, ...] = (), out: Path = Path("runs/report.html"), run: bool = False,
         quick: bool = False, jobs: int = 1, only: tuple[str, ...] = (), keep: bool = False,
         given: Given = frozenset()):
    """One page of what the lectures say and what shows it.

    Args:
        results: JSON files of results, or folders of runs, for a page of these experiments alone.
        out: file for the page.
        run: first run all experiments and commands that are not done yet, in the page's order.
        quick: end in minutes; the numbers mean nothing.
        jobs: how many run at once, each on a core of its own.
        only: run only these experiments and commands, by name, and what they need.
        keep: leave the results beside the experiments, and the page in scripts/lectures.
        given: names of the options on the command line.
    """
    if not run:
        refuse_unused(given, ("quick", "jobs", "only"), "they decide how to run: give --run, too")
    if results:
        refuse_unused(given, ("run", "keep"), "the page is of the results that are given")
    if keep:
        refuse_unused(given, ("out", "quick"), "what is kept has its place, and is no quick run")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    out, failed = FOLDER / "lectures" / "index.html" if keep else out, []
    if run:
        templates()  # said now, not after hours, if jinja2 is missing
        make_place(out)
        failed = run_all(quick, jobs, only, keep)
    if results:
        paths = [path / "result.json" if path.is_dir() else path for path in results]
        text = page(paths)
    else:
        whole = WHOLE.with_name(f"{WHOLE.name}-quick" * quick or WHOLE.name)
        at = (whole, whole) if run and not keep else (FOLDER / "experiments", FOLDER / "lectures")
        paths = sorted([*at[0].glob("*.json"), *at[0].glob("*-1/result.json")])
        paths = [path for path in paths if path.name != "times.json"]
        text = page(paths, at[1])
    make_place(out)
    write_atomically(out, text.encode())
    print(f"{out}: {many(len(paths), 'experiment')}")
    if failed:
        raise RuntimeError(f"these have failed, the page is without them: {', '.join(failed)}")


def run_all(quick: bool, at_once: int, only: tuple[str, ...], keep: bool) -> list[str]:
    """The whole run, or the rest of it. The names of those that failed."""
    every = read_jobs(FOLDER / "lectures")
    jobs = in_order(every, read_lectures(FOLDER / "lectures"), only)
    folder = WHOLE
    if quick:
        jobs, folder = quickly(jobs), WHOLE.with_name(f"{WHOLE.name}-quick")
        shutil.rmtree(folder, ignore_errors=True)
    whole = WholeRun(folder, FOLDER.parent)
    left = [job for job in jobs if not whole.done(job)]
    print(f"{folder}: {len(left)} of {len(jobs)} to run", end="")
    minutes = sum(job.minutes for job in left)
    two = f", {lasted(30 * minutes)} on two with --jobs 2" * (at_once == 1)
    print(f", about {lasted(60 * minutes)} of one core{two}" if minutes else "", flush=True)
    try:
        failed = whole.run(jobs, at_once, tell=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        words = ["--run", *["--keep"] * keep, *["--only"] * bool(only), *only]
        print(f"\ngo on with: {typed(__file__, *words, jobs=at_once)}")
        raise
    if keep:
        whole.keep(jobs, FOLDER / "experiments", FOLDER / "lectures")
    return failed


def templates():
    """(the page's template, the class of text that needs no escape). ImportError without jinja2."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise ImportError(f"a page needs jinja2: {install('report')}") from None
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)
    return environment.get_template("report.html.jinja"), Markup


def page(paths: list[Path], outputs: Path | None = None) -> str:
    """The page's HTML: results, and the pictures that lie beside them.

    outputs: the folder of what commands have printed, for the page of the lectures.
    """
    template, Markup = templates()
    results, ids = [(Result.load(path), path) for path in paths], []
    lectures = None
    if outputs:
        jobs = in_order(read_jobs(FOLDER / "lectures"), read_lectures(FOLDER / "lectures"))
        order = {job.name: i for i, job in enumerate(jobs)}
        results.sort(key=lambda pair: order.get(pair[0].name, len(order)))
        lectures = lectures_shown({result.name: result for result, _ in results}, jobs, outputs)
    shown = []
    for i, (result, path) in enumerate(results, 1):
        ids.append(result.name if result.name not in ids else f"{result.name}-{i}")
        svg = picture(path.with_suffix(".svg"), f"{len(ids)}-")
        shown.append({"id": ids[-1], "result": result, "claims": claims(result),
                      "picture": svg and Markup(svg)})
    return template.render(shown=shown, lectures=lectures, number=number,
                           slide_text=slide_text, marks=MARKS, measured=lambda name: name in ids)


def lectures_shown(results: dict[str, Result], jobs, outputs: Path) -> dict:
    """What the page says of the lectures: their lines, and the commands beside the experiments."""
    printed = {path.stem: path.read_text(encoding="utf-8") for path in outputs.glob("*.txt")}
    commands = {job.name: {"command": f"python {filled(job.run, WHOLE)}",
                           "short": re.sub(r" --(out|model) {\S+", "", job.run),
                           "output": printed.get(job.name)}
                for job in jobs if not job.experiment}
    lectures = [{"number": lecture.number, "title": lecture.title, "lines": [
        line_shown(line, lecture.number, results, commands) for line in lecture.lines]}
        for lecture in read_lectures(FOLDER / "lectures")]
    lines = [line for lecture in lectures for line in lecture["lines"]]
    states = [line["state"] for line in lines]
    return {"lectures": lectures, "commands": commands, "experiments": len(jobs) - len(commands),
            "minutes": sum(job.minutes for job in jobs), "lasted": lasted,
            "states": {state: states.count(state) for state in STATES},
            "wrong": [line for line in lines if line["line"].wrong]}


STATES = ("judged", "printed", "waiting", "not small")


def line_shown(line: Line, number: str, results: dict[str, Result], commands: dict) -> dict:
    """A line with its verdicts, and with what commands print of it."""
    judged = judges(line, results)
    printed = {name: parts(commands[name]["output"] or "", begins)
               for name, begins in line.commands.items()}
    state = ("judged" if any(judged.values()) else "printed" if printed else
             "waiting" if judged else "not small")
    at = [where if ":" in where else f"{number}:{where}" for where in line.at.split("; ")]
    return {"line": line, "at": at, "judged": judged, "printed": printed, "state": state}


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
