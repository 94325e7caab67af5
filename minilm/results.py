"""The result of an experiment: numbers by arm and seed, the lecture's numbers, and verdicts."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

from minilm.files import FormatError, read_json, write_json
from minilm.measure.verdict import FAILS, HOLDS, OPEN, Verdict
from minilm.stored import fits, revive


class Spread(NamedTuple):
    """A number over the seeds."""

    mean: float
    low: float  # the lowest
    high: float


@dataclass(frozen=True)
class Result:
    """Everything that a table and a page need; it is stored as JSON."""

    name: str
    question: str
    command: str
    quick: bool
    slide: dict[str, dict[str, float]]  # source -> arm -> the lecture's number
    measures: dict[str, int]  # what was measured, with its unit -> decimals that are shown
    date: str = ""  # of the last row, UTC
    commit: str = ""  # of the source; several, if the run went on with another source
    machine: str = ""
    rows: tuple[dict, ...] = ()  # {"arm": name, "seed": seed, measure: number, ...}; NaN, in
    # the file null, for a number that is not finite
    claims: tuple[dict, ...] = ()  # {"claim": text, "likely": why it does not hold,
    # if that is known, and the fields of Verdict}

    @classmethod
    def load(cls, path: str | Path):
        """Read what `save` wrote. Raises FormatError, naming the field, and FileNotFoundError."""
        result = revive(cls, read_json(path), path)
        kinds = {"arm": str, "seed": int} | dict.fromkeys(result.measures, float)
        for i, row in enumerate(result.rows):
            row.update({name: math.nan for name, x in row.items() if x is None and name not in (
                "arm", "seed")})
            for name, kind in kinds.items():
                if not fits(row.get(name), kind):
                    raise FormatError(path, f"rows[{i}]: {name} is {row.get(name)!r:.100}, "
                                      f"expected {kind.__name__}")
        for measure, decimals in result.measures.items():
            if not 0 <= decimals <= 20:
                raise FormatError(path, f"measures: {measure} is {decimals}, expected 0 to 20")
        for i, claim in enumerate(result.claims):
            _check_claim(claim, path, f"claims[{i}]")
        return result

    def save(self, path: str | Path):
        """Write JSON; what is not finite becomes null."""
        rows = [{name: None if isinstance(x, float) and not math.isfinite(x) else x
                 for name, x in row.items()} for row in self.rows]
        write_json(path, asdict(self) | {"rows": rows})

    @property
    def arms(self) -> list[str]:
        """The arms that have a row, in the order in which they first ran."""
        return list(dict.fromkeys(row["arm"] for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows})

    def spread(self, arm: str, measure: str) -> Spread:
        """A measure of an arm over its seeds; NaN if it is not finite on one of them."""
        values = [row[measure] for row in self.rows if row["arm"] == arm]
        if not np.isfinite(values).all():
            return Spread(math.nan, math.nan, math.nan)
        return Spread(float(mean(values)), min(values), max(values))  # exact: no sum overflows


def _check_claim(claim: dict, path, where: str):
    if not fits(claim.get("claim"), str):
        raise FormatError(path, f"{where}: claim is {claim.get('claim')!r:.100}, expected str")
    if not fits(claim.get("likely", ""), str):
        raise FormatError(path, f"{where}: likely is {claim['likely']!r:.100}, expected str")
    verdict = {name: value for name, value in claim.items() if name not in ("claim", "likely")}
    said = revive(Verdict, verdict, path, where)
    if said.verdict not in (known := (HOLDS, FAILS, OPEN)):
        raise FormatError(path, f"{where}: verdict is {said.verdict!r:.100}, expected of {known}")
    if said.at_least is said.at_most is None:
        raise FormatError(path, f"{where}: at_least and at_most are null, expected a bound")
    if said.low is not None and None in (said.mean, said.high):
        raise FormatError(path, f"{where}: mean or high is null, but low is not")


def number(x: float, decimals: int) -> str:
    """1234.5 -> 1,234.5; beyond 10^15, which nobody reads digit by digit, 3.4028e+38."""
    return f"{x:,.{decimals}f}" if abs(x) < 1e15 else f"{x:.5g}"


def slide_text(x: float) -> str:
    """A number of a slide as it stands there; a whole one from 10,000 on as `number` has it.

    >>> slide_text(9999.0), slide_text(1e4), slide_text(65504), slide_text(3.40282e38)
    ('9999.0', '10,000', '65,504', '3.40282e+38')
    """
    return number(x, 0) if 1e4 <= abs(x) < 1e15 and x == int(x) else str(x)


def spread_text(spread: Spread, decimals: int) -> str:
    """The mean, and the lowest and the highest if they differ from it when rounded."""
    mean, low, high = (number(x, decimals) for x in spread)
    return mean if low == mean == high else f"{mean} ({low} - {high})"


def table(result: Result, width: int = 100) -> str:
    """Lines of text: a row an arm. Columns that do not fit in the width follow in a second block.
    """
    arms = result.arms
    columns = [[measure, *(spread_text(result.spread(arm, measure), decimals) for arm in arms)]
               for measure, decimals in result.measures.items()]
    columns += [[source, *(slide_text(numbers[arm]) if arm in numbers else "" for arm in arms)]
                for source, numbers in result.slide.items()]
    seeds, edge = ", ".join(map(str, result.seeds)), max(map(len, ["", *arms]))
    lines, room = [f"mean (lowest - highest) of seeds {seeds}"], 0
    for column in columns:
        size = 2 + max(map(len, column))
        if size > room:  # the next block
            block = [f"{name:{edge}}" for name in ["", *arms]]
            lines += ["", *block]
            room = width - edge
        for i, cell in enumerate(column, len(lines) - len(column)):
            lines[i] += f"{cell:>{size}}"
        room -= size
    return "\n".join(line.rstrip() for line in lines)


def verdicts(result: Result) -> str:
    """A line for each claim, and below it what the verdict rests on."""
    lines = []
    for claim in result.claims:
        lines.append(f"{claim['claim']}: {claim['verdict']}")
        if claim["low"] is not None:
            lines.append(f"    {claim['about']}: {found(claim)}; claimed: {claimed(claim)}")
        if "likely" in claim:
            lines.append(f"    likely: {claim['likely']}")
    return "\n".join(lines)


def found(claim: dict) -> str:
    """The mean and its interval."""
    return "{mean:.3g}, 95 % interval {low:.3g} to {high:.3g}".format(**claim)


def claimed(claim: dict) -> str:
    """The bounds."""
    low, high = claim["at_least"], claim["at_most"]
    if low is None:
        return f"below {high:g}"
    return f"above {low:g}" if high is None else f"between {low:g} and {high:g}"
