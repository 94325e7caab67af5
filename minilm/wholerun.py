"""The whole run: every experiment in full and the other commands, in the order of the lectures.

run.toml, beside the lectures' files, has what each one is given, and how many minutes of one core
it takes. All of it leaves a folder:

    NAME-1/         the run of an experiment, see experiment.py
    NAME/           what a command leaves; it is made anew if the command was stopped
    NAME.txt        what a command prints, once it has ended
    NAME.log        what the last attempt has printed
    times.json      name -> the minutes of one core that it took, over all attempts

What is done is known by these files, so a run that was stopped goes on where it was.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from minilm.files import FormatError, read_json, write_atomically, write_json
from minilm.lectures import Lecture, read_toml
from minilm.results import Result
from minilm.stored import fits, revive

LONGEST = 60_000  # characters of an output that are kept
TIMES = "times.json"
PLACE = re.compile(r"{([^}]+)}")


@dataclass(frozen=True)
class Job:
    """An experiment, or a command; `run` is what follows `python`, `quick` the same in seconds."""

    name: str
    experiment: bool
    run: str
    quick: str  # empty: it is left out of a quick run
    minutes: float  # of one core
    alone: bool = False  # its seconds are part of its result

    @property
    def needs(self) -> list[str]:
        """The names of the commands whose folders it reads."""
        return [name for name in PLACE.findall(self.run) if name != self.name]


@dataclass(frozen=True)
class Settings:
    """What run.toml says of an experiment."""

    minutes: float
    base: str = ""
    seeds: tuple[int, ...] = ()
    alone: bool = False


def read_jobs(folder: Path) -> dict[str, Job]:
    """The jobs of run.toml in a folder, by name, with the minutes of times.json there, if any.

    FormatError names the field.
    """
    path, jobs = folder / "run.toml", {}
    stored = read_toml(path)
    for name, own in stored.get("commands", {}).items():
        own = {"name": name, "experiment": False, "quick": "", "alone": False} | own
        jobs[name] = revive(Job, own, path, f"commands.{name}")
    for name, own in stored.get("experiments", {}).items():
        own = {"base": "", "seeds": [], "alone": False} | own
        s = revive(Settings, own, path, f"experiments.{name}")
        if s.base not in (bases := {"": ""} | stored.get("bases", {})):
            raise FormatError(path, f"experiments.{name}: there is no base {s.base!r}")
        file, seeds = f"scripts/experiments/{name}.py", " ".join(map(str, s.seeds))
        words = " ".join(filter(None, [file, seeds and f"--seeds {seeds}", bases[s.base]]))
        jobs[name] = Job(name, True, words, f"{file} --quick --seeds 0", s.minutes, s.alone)
    for job in jobs.values():
        if unknown := {*job.needs} - jobs.keys():
            raise FormatError(path, f"{job.name}: there is no command {min(unknown)!r}")
    times = times_in(folder)
    return {name: replace(job, minutes=times.get(name, job.minutes)) for name, job in jobs.items()}


def times_in(folder: Path) -> dict[str, float]:
    """Minutes of one core by job, as times.json in this folder has them; {} without one.

    FormatError for anything else.
    """
    times = read_json(file) if (file := folder / TIMES).exists() else {}
    if not fits(times, dict[str, float]):
        raise FormatError(file, f"is {times!r:.100}, expected minutes by job")
    return times


def in_order(jobs: dict[str, Job], lectures: Iterable[Lecture], only: Iterable[str] = ()
             ) -> list[Job]:
    """The jobs as the lectures' lines come to them, each after what it needs; then all others.

    only: these alone, and what they need. FormatError if a line names a job that is not there,
    ValueError if `only` does.
    """
    found = {}

    def take(name):
        if name not in found:
            for other in jobs[name].needs:
                take(other)
            found[name] = jobs[name]

    for lecture in lectures:
        for line in lecture.lines:
            for name in [*line.claims, *line.commands]:
                if name not in jobs or jobs[name].experiment != (name in line.claims):
                    kind = "experiment" if name in line.claims else "command"
                    raise FormatError(f"{lecture.number}.toml",
                                      f"{line.id}: run.toml has no {kind} {name!r}")
                take(name)
    for name in jobs:
        take(name)
    order, found = list(found), {}
    if unknown := {*only} - {*order}:
        raise ValueError(f"there is no {min(unknown)!r} to run, only {', '.join(sorted(order))}")
    for name in only or order:
        take(name)
    return [jobs[name] for name in order if name in found]


def quickly(jobs: Iterable[Job]) -> list[Job]:
    """The same in seconds; the numbers mean nothing. Jobs that cannot be quick are left out."""
    return [replace(job, run=job.quick, minutes=0, alone=False) for job in jobs if job.quick]


class WholeRun:
    """The folder of a whole run. root: the repository, where all commands run."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root = Path(os.path.abspath(folder)), root
        inside = self.folder.is_relative_to(root)
        self.shown = str(self.folder.relative_to(root) if inside else self.folder)

    def words(self, job: Job) -> list[str]:
        """What follows `python`: a run that is there goes on."""
        words = shlex.split(filled(job.run, self.shown))
        if job.experiment:
            run = f"{self.shown}/{job.name}-1"
            words += ["--resume", run] if (self.root / run).exists() else ["--out", self.shown]
        return words

    def result(self, job: Job) -> Path:
        return self.folder / f"{job.name}-1" / "result.json"

    def output(self, job: Job) -> Path:
        return self.folder / f"{job.name}.txt"

    def done(self, job: Job) -> bool:
        """Whether it has ended: an experiment with verdicts, a command with its output."""
        if not job.experiment:
            return self.output(job).exists()
        return self.result(job).exists() and bool(Result.load(self.result(job)).claims)

    def times(self) -> dict[str, float]:
        """Minutes of one core by job, over all attempts."""
        return times_in(self.folder)

    def run(self, jobs: list[Job], at_once: int = 1, tell=print) -> list[str]:
        """Run what is not done yet, `at_once` jobs at a time, each on a core of its own.

        The names of those that failed; the others run in spite of it. After Ctrl-C every process
        is told to stop, and has stopped when KeyboardInterrupt comes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting, cores = [job for job in jobs if not self.done(job)], sorted(available())
        running, failed = {}, []  # running: the job on each slot
        try:
            while waiting or running:
                for job in list(waiting):  # what it needs stands before it
                    if {*job.needs} & {*failed}:
                        waiting.remove(job)
                        failed.append(job.name)
                if len(running) < at_once and (job := following(waiting, running)):
                    waiting.remove(job)
                    slot = min({*range(at_once)} - running.keys())
                    whole = job.alone or at_once == 1
                    own = cores if whole else cores[slot % len(cores) :][:1]
                    running[slot] = job, self.start(job, own), time.monotonic()
                    continue
                time.sleep(0.02)
                for slot, (job, process, since) in list(running.items()):
                    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                    if pid:
                        del running[slot]
                        process.returncode = os.waitstatus_to_exitcode(status)
                        well = self.ended(job, process.returncode, usage.ru_utime + usage.ru_stime)
                        failed += [] if well else [job.name]
                        left = [*waiting, *(job for job, _, _ in running.values())]
                        tell(self.told(job, well, time.monotonic() - since, left))
        finally:
            for _, process, _ in running.values():
                process.send_signal(signal.SIGINT)
            for _, process, _ in running.values():
                process.wait()
        return failed

    def start(self, job: Job, cores: list[int]) -> subprocess.Popen:
        """A process on these cores that writes the job's log."""
        if not job.experiment:
            shutil.rmtree(self.folder / job.name, ignore_errors=True)
            (self.folder / job.name).mkdir()

        def on_cores():
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, cores)

        paths = os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
        with (self.folder / f"{job.name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *self.words(job)], cwd=self.root, env=os.environ | {
                    "PYTHONPATH": paths}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=on_cores, start_new_session=True)  # Ctrl-C is passed on, once

    def ended(self, job: Job, code: int, seconds: float) -> bool:
        """Note the time and a command's output. Whether all is well."""
        times = self.times()
        times[job.name] = round(times.get(job.name, 0) + seconds / 60, 4)
        write_json(self.folder / TIMES, times)
        if code == 0 and not job.experiment:
            log = (self.folder / f"{job.name}.log").read_text(encoding="utf-8", errors="replace")
            log = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in log.expandtabs())
            write_atomically(self.output(job), log[-LONGEST:].encode())
        return code == 0 and self.done(job)

    def told(self, job: Job, well: bool, seconds: float, left: list[Job]) -> str:
        """A line on a job that has ended, and on what is left."""
        how = lasted(seconds) if well else f"FAILED, see {self.shown}/{job.name}.log"
        minutes = sum(other.minutes for other in left)
        more = f", about {lasted(60 * minutes)} of one core" if minutes else ""
        return f"{job.name}: {how}" + (f"; {len(left)} left{more}" if left else "")

    def keep(self, jobs: list[Job], experiments: Path, lectures: Path):
        """Leave what is done beside the experiments and the lectures, for the page."""
        for job in filter(self.done, jobs):
            files = [(self.output(job), lectures / f"{job.name}.txt")]
            if job.experiment:
                result, kept = self.result(job), experiments / f"{job.name}.json"
                files = [(f.with_suffix(end), kept.with_suffix(end)) for f, end in [
                    (result, ".json"), (result, ".svg")] if f.with_suffix(end).exists()]
            for file, kept in files:
                write_atomically(kept, file.read_bytes())
        write_json(lectures / TIMES, times_in(lectures) | self.times())


def filled(words: str, folder: str) -> str:
    """A command of run.toml whose {NAME} are folders in `folder`.

    >>> filled("scripts/quantize.py --model {bias-0}/pretrain-1/model", "runs/lectures")
    'scripts/quantize.py --model runs/lectures/bias-0/pretrain-1/model'
    """
    return PLACE.sub(lambda name: f"{folder}/{name[1]}", words)


def following(waiting: list[Job], running: dict) -> Job | None:
    """The first job that can start beside those that run; None if it has to wait."""
    beside = [job for job, _, _ in running.values()]
    names = {job.name for job in [*waiting, *beside]}
    ready = next((job for job in waiting if not {*job.needs} & names), None)
    if ready and beside and (ready.alone or any(job.alone for job in beside)):
        return None
    return ready


def available() -> set[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def lasted(seconds: float) -> str:
    """A time as one reads it.

    >>> lasted(4.2), lasted(600), lasted(40000)
    ('4 s', '10 min', '11.1 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
