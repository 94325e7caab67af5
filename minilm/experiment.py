"""Experiments: arms on the same seeds, a table beside the lecture's, claims that are judged.

An experiment remakes a table or figure of the lectures, and is one file in scripts/experiments.
The file says what is measured; `conduct` does what all experiments need. A run's folder holds

    run.json        settings and versions
    result.json     a Result, written again after each arm and seed, so that a run can go on
    result.svg      the picture (needs the extra `plots`)
    ARM-SEED/       checkpoints of the arm that is running
"""

import json
import math
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from minilm.command import Given, typed
from minilm.extras import told
from minilm.files import json_bytes, remove, write_atomically
from minilm.measure.verdict import FAILS, Verdict
from minilm.parallel.cores import default_workers
from minilm.picture import draw_svg
from minilm.ranges import check_stored, each, whole
from minilm.results import Result, number, table, verdicts
from minilm.run import RunDirectory
from minilm.train import Diverged

QUICK = "quick: too small and too short a run for its numbers to mean anything"


@dataclass(frozen=True)
class Experiment:
    """What the file of an experiment says about it."""

    file: str  # its __file__; it gives the name, and kept results lie beside it
    question: str
    slide: dict[str, dict[str, float]]  # source -> arm -> the lecture's number
    arms: Iterable[str]
    measures: dict[str, int]  # what is measured, with its unit -> decimals that are shown
    claims: dict[str, Callable[[list[dict]], Verdict]]  # text -> its verdict from the rows
    draw: Callable | None = None  # draw(figure, rows)
    likely: dict[str, str] = field(default_factory=dict)  # claim -> why it may fail; shown if so

    @property
    def name(self) -> str:
        return Path(self.file).stem


def program(experiment: Experiment, measured: Callable):
    """The main function of an experiment that needs no model of pretrain.py's.

    measured(arm, seed, quick) returns the number of each measure.
    """
    def main(seeds: tuple[int, ...] = (0, 1, 2), quick: bool = False, out: Path = Path("runs"),
             resume: Path | None = None, keep: bool = False, given: Given = frozenset()):
        if resume and "out" in given:
            raise ValueError("the run keeps its folder: give --resume or --out, not both")
        return conduct(experiment, lambda arm, seed, run: measured(arm, seed, quick), seeds, {},
                       quick=quick, out=out, resume=resume, keep=keep)
    main.__doc__ = f"{experiment.question}\n\n{OPTIONS}"
    return main


OPTIONS = """
Args:
    seeds: of everything random; every arm runs on each seed.
    quick: end in seconds; the numbers mean nothing.
    out: the run gets a folder of its own in here.
    resume: folder of a run to go on with; arms and seeds that are done are not run again.
    keep: leave the result beside this program, for the page that report.py makes.
    given: names of the options on the command line.
"""


def conduct(experiment: Experiment, measured: Callable[[str, int, RunDirectory], dict],
            seeds: Iterable[int], settings: dict, options: Iterable[str] = (), quick: bool = False,
            out: Path = Path("runs"), resume: Path | None = None, keep: bool = False) -> Result:
    """Run each arm on each seed, print the table and the verdicts, and draw the picture.

    measured(arm, seed, run) returns the number of each measure; training inside it may leave
    checkpoints in `run`. If it raises Diverged, each number is NaN; a claim about NaN cannot be
    told, and the picture leaves it out. settings: what decides the numbers, as JSON. options: the
    words of the command line that give these settings. resume: the folder of a run to go on with;
    arms and seeds that have a row there are not run again. keep: leave the result beside the
    experiment, too.
    ValueError if a quick run is to be kept, and if the run to go on with has other settings.
    """
    if quick and keep:
        raise ValueError("a quick run cannot be kept: its numbers mean nothing")
    if not (seeds := tuple(dict.fromkeys(seeds))):
        raise ValueError("an experiment needs at least one seed, got none")
    check_stored({"seeds": each(whole(0))}, seeds=seeds)
    program = ["python", f"scripts/experiments/{experiment.name}.py", "--seeds", *map(str, seeds)]
    command = shlex.join([*program, *options, *["--quick"] * quick])
    result = Result(experiment.name, experiment.question, command, quick, experiment.slide,
                    experiment.measures)
    settings = json.loads(json_bytes(settings | {"quick": quick}))  # as run.json gives them back
    if resume:
        run = RunDirectory(resume)
        stored = run.describe()["settings"]
        result = continued(Result.load(run.path / "result.json"), result, stored, settings)
    else:
        run = RunDirectory.create(out, experiment.name, settings, [],
                                  fill=lambda folder: result.save(folder / "result.json"))
    with run.going_on():
        print(f"{run.path}: {experiment.question}" + f"\n{QUICK}" * quick, flush=True)
        result = run_arms(experiment, result, measured, seeds, run.path, keep)
        result = replace(result, claims=judged(experiment, result))
        result.save(run.path / "result.json")
        print(f"\n{table(result)}\n\n{verdicts(result)}\n" + f"{QUICK}\n" * quick)
        leave(experiment, result, run.path, keep)
    return result


def continued(before: Result, now: Result, stored: dict, settings: dict) -> Result:
    """`now` with the rows of the run to go on with. ValueError if that run was another one."""
    for what, old, new in [("experiment", before.name, now.name), ("settings", stored, settings),
                           ("measures", before.measures, now.measures)]:
        if isinstance(old, dict) and isinstance(new, dict):  # say only what differs
            names = sorted(n for n in old | new if old.get(n) != new.get(n))
            old, new = ({n: x[n] for n in names if n in x} for x in (old, new))
        if old != new:
            raise ValueError(f"the run to go on with has the {what} {old}, but {new} are given")
    return replace(now, date=before.date, commit=before.commit, machine=before.machine,
                   rows=before.rows)


def run_arms(experiment: Experiment, result: Result, measured, seeds, folder: Path,
             keep: bool) -> Result:
    """The result with a row for every arm and seed, saved after each.

    All arms of a seed come before the next seed: a run that is cut short still has pairs to judge.
    """
    done = {(row["arm"], row["seed"]) for row in result.rows}
    def place(arm, seed): return folder / f"{arm}-{seed}".replace("/", "_")
    for pair in done:  # what a kill after the arm's row has left
        remove(place(*pair))
    result.save(folder / "result.json")
    commit, machine = commit_of(Path(experiment.file).parent), describe_machine()
    for arm, seed in [(a, s) for s in seeds for a in experiment.arms if (a, s) not in done]:
        (own := place(arm, seed)).mkdir(exist_ok=True)
        try:
            row = {"arm": arm, "seed": seed, **measured(arm, seed, RunDirectory(own))}
        except KeyboardInterrupt:
            words = shlex.split(result.command)[2:] + ["--keep"] * keep  # without python FILE
            print(f"\ngo on with: {typed(experiment.file, *words, resume=folder)}")
            raise
        except Diverged as error:
            print(f"{arm}, seed {seed}: {error}")
            row = {"arm": arm, "seed": seed, **dict.fromkeys(experiment.measures, math.nan)}
        shown = [f"{measure} {number(row[measure], decimals)}"
                 for measure, decimals in experiment.measures.items()]
        print(f"{arm}, seed {seed}: {'; '.join(shown)}", flush=True)
        commits = dict.fromkeys([*filter(None, result.commit.split(", ")), commit])
        result = replace(result, date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
                         commit=", ".join(commits), machine=machine, rows=(*result.rows, row))
        result.save(folder / "result.json")
        shutil.rmtree(own)
    return result


def judged(experiment: Experiment, result: Result) -> tuple[dict, ...]:
    """The claims with their verdicts, and the likely reason if one does not hold."""
    found, unknown = [], dict.fromkeys((name for row in result.rows for name in row), math.nan)
    rows = [row if finite(row) else unknown | row for row in result.rows]  # with all names
    for claim, judge in experiment.claims.items():
        verdict = judge(rows)
        failed = verdict.verdict == FAILS and not result.quick
        why = {"likely": experiment.likely[claim]} if failed and claim in experiment.likely else {}
        found.append({"claim": claim, **why, **asdict(verdict)})
    return tuple(found)


def finite(row: dict) -> bool:
    """Whether all numbers of a row are finite."""
    return all(math.isfinite(x) for x in row.values() if isinstance(x, float))


def leave(experiment: Experiment, result: Result, folder: Path, keep: bool):
    """Draw the picture, keep the result if asked to, and print where everything is."""
    rows = tuple(filter(finite, result.rows))
    def draw(figure): experiment.draw(figure, rows)
    picture = draw_svg(folder / "result.svg", draw) if experiment.draw and rows else None
    if experiment.draw and rows:
        print(told("a picture", picture))
    print(f"result: {folder / 'result.json'}")
    if keep:
        kept = Path(experiment.file).with_suffix(".json")
        result.save(kept)
        if picture:
            write_atomically(kept.with_suffix(".svg"), picture.read_bytes())
        print(f"kept: {kept}")


def commit_of(folder: Path) -> str:
    """The commit of a folder, with -dirty if files differ from it."""
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_machine() -> str:
    """Processor, cores and versions, in one line."""
    processor, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.partition(": ")[2] for line in lines
                          if line.startswith("model name")), processor)
    return (f"{processor}, {default_workers()[0]} cores, {platform.system()}, "
            f"Python {platform.python_version()}, numpy {np.__version__}")
