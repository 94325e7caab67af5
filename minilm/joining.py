"""How a training program joins the ranks that it was started as.

    mpiexec -n 4 python scripts/pretrain.py --stage 2
    mpiexec -n 4 python scripts/pretrain.py --stage 2 --device cuda

--stage is no setting of a run, since it decides no bit of it: the run may go on with other ranks,
in another stage, and if its settings allow it without any. What does decide, is kept: a rank is one
worker, and a step has as many micro-batches as there are ranks, unless --accumulate says otherwise.

Nor is --device: a run may go on elsewhere, with other roundings. With cuda each rank has a GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from minilm.adapting import OWN_RULE
from minilm.command import many, typed
from minilm.loop import refuse_unused, resumed
from minilm.optim import AdamW
from minilm.parallel.comm import Comm, connect
from minilm.parallel.nccl import on_cards
from minilm.parallel.zero import Zero, require_host
from minilm.ranges import check, optional, whole
from minilm.ranks import RankRun, require_even
from minilm.run import RunDirectory

Device = Literal["cpu", "cuda"]
Connected = tyro.conf.Suppress[Comm | None]  # the type of a program's parameter `comm`


class Ranks(NamedTuple):
    """The ranks that a program trains on, the stage in which they share the work, and where."""

    comm: Comm
    stage: int
    device: Device = "cpu"


def joined(stage: int | None, comm: Comm | None = None, device: Device = "cpu") -> Ranks | None:
    """The ranks that this process is one of, those that mpiexec started; None without a stage.

    ValueError for a stage that there is not, or not on this device. RuntimeError if there are no
    ranks on it.
    """
    check({"stage": optional(whole(0, 3))}, stage=stage)
    if device == "cpu":
        return None if stage is None else Ranks(comm or connect(ordered=True), stage)
    if stage is None:
        raise ValueError("--device cuda needs --stage: take 0 for one GPU")
    require_host(stage)
    return Ranks(on_cards(comm or connect(ordered=True)), stage, device)


def begun(ranks: Ranks | None, settings, resume: Path | None, given):
    """`resumed`, for these ranks: (the run to go on with, or None; the settings).

    ValueError for settings that ranks cannot train by.
    """
    if ranks:
        refuse_unused(given, ("workers", "threads"), "with --stage each rank is one worker")
        settings = replace(settings, workers=1)
    run, s = resumed(settings, resume, given)
    if ranks:
        n = ranks.comm.size
        if run and s.accumulate % n:
            raise ValueError(f"a step of this run has {s.accumulate} micro-batches, which {n} "
                             "ranks cannot share evenly: go on with as many ranks as divide "
                             f"{s.accumulate}")
        if not run and s.accumulate == 1 and "accumulate" not in given:
            if s.batch < n:
                raise ValueError(f"batch is {s.batch}, but each of {n} ranks needs a row")
            s = replace(s, accumulate=n)
        require_even(s.accumulate, ranks.comm)
        rule = "mezo" if getattr(s, "optimizer", "") == "mezo" else s.method
        if rule in ("mezo", *OWN_RULE):
            raise ValueError(f"{rule} has an update rule that needs all parameters in one place: "
                             "train it without --stage")
        run = run and RankRun(run.path, ranks.comm)
    if not 1 <= s.accumulate <= max(1, s.batch):
        raise ValueError(f"accumulate must be 1 to the batch's {s.batch} rows, got {s.accumulate}")
    return run, s


def new_run(ranks: Ranks | None, *described) -> RunDirectory:
    """RunDirectory.create, by one of the ranks for all."""
    if not ranks:
        return RunDirectory.create(*described)
    path = RunDirectory.create(*described).path if ranks.comm.rank == 0 else ""
    return RankRun(heard(ranks.comm, str(path)), ranks.comm)


def heard(comm: Comm, text: str) -> str:
    """The text that rank 0 has."""
    said = text.encode("utf-8", "surrogateescape")
    size = int(comm.numbers(len(said))[0, 0])
    said = comm.numbers(*(said if comm.rank == 0 else bytes(size)))[0]
    return bytes(said.astype(np.uint8)).decode("utf-8", "surrogateescape")


def adamw_of(ranks: Ranks | None, model) -> Callable:
    """AdamW; of ranks a Zero with the settings of an AdamW, whose units are the model's blocks.

    The model moves to the device of the ranks.
    """
    if not ranks:
        return AdamW
    model.to(ranks.device)
    return lambda params, *settings, **named: Zero(model, model.blocks, ranks.comm, ranks.stage,
                                                   *settings, **named)


def crew(ranks: Ranks | None, s) -> str:
    """Who trains, in words."""
    if not ranks:
        return many(s.workers, "worker")
    where = " on GPUs" * (ranks.device == "cuda")
    return f"{many(ranks.comm.size, 'rank')} in stage {ranks.stage}{where}"


def again(ranks: Ranks | None, program: str | Path, run: RunDirectory) -> str:
    """What to type to go on with a run."""
    if not ranks:
        return typed(program, resume=run.path)
    on = {"device": ranks.device} if ranks.device != "cpu" else {}
    words = typed(program, resume=run.path, stage=ranks.stage, **on)
    return words if ranks.comm.size == 1 else f"mpiexec -n {ranks.comm.size} {words}"
