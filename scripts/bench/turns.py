"""Contenders take turns: processes that wait, run a job once when asked to, and answer.

A contender is (side, *arguments); side is a generator of answers (see contenders.py). They take
turns, A B C A B C ..., so that a change of the machine's speed affects all of them.
"""

import contextlib
import multiprocessing
import signal
import statistics
import time
from multiprocessing import resource_tracker

from tqdm import tqdm

WARM_UP = 2  # turns that do not count


class Contender:
    """A process that waits, and sends its side's next answer when asked to."""

    def __init__(self, side, *args):
        from minilm.loop import finish_on_interrupt

        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, *args))
        resource_tracker.ensure_running()  # if it started below, it would unblock the signal
        with finish_on_interrupt() as interrupted:
            # Only this process handles Ctrl-C: the child inherits the blocked signal.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            self.process.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        if interrupted():
            self.process.terminate()
            raise KeyboardInterrupt

    def run(self):
        time.sleep(0.02)  # threads of the previous contender may still be spinning
        try:
            self.pipe.send("go")
            return self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("a contender died; its output is above") from None

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error:
            self.process.terminate()
        else:
            self.pipe.send(None)
        self.process.join()


def serve(pipe, side, *args):
    """What a contender's process does. `side` is a generator of answers."""
    answers = side(*args)
    while pipe.recv():
        pipe.send(next(answers))
    answers.close()


def in_turn(sides, rounds) -> list[tuple]:
    """The answers of each side, asked for in turn."""
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(Contender(*side)) for side in sides]
        turns = tqdm(range(rounds), unit="turn", leave=False, disable=None)
        return list(zip(*[[contender.run() for contender in contenders] for _ in turns]))


def take_turns(theirs, ours, rounds) -> list[tuple]:
    """(their answers, our answers), asked for in turn."""
    return in_turn((theirs, ours), rounds)


def compare(title, theirs, ours, rounds) -> tuple[float, float]:
    """Time both sides in turn and print a row; returns the median seconds of both."""
    times = [side[WARM_UP:] for side in take_turns(theirs, ours, rounds + WARM_UP)]
    print(line(title, *times), flush=True)
    return tuple(map(statistics.median, times))


def line(title, theirs, ours) -> str:
    """A line of the table from the seconds of both sides."""
    ratios, median = [a / b for a, b in zip(theirs, ours)], statistics.median
    def cell(times): return (f"{1e3 * median(times):.2f} ms ({1e3 * min(times):.2f} - "
                             f"{1e3 * max(times):.2f})")
    return (f"| {title} | {cell(theirs)} | {cell(ours)} | {median(theirs) / median(ours):.2f} | "
            f"{min(ratios):.2f} - {max(ratios):.2f} |")
