"""The GPT-2 of contenders.py under torch.compile: forward pass, loss and backward pass.

The optimizer is not compiled: it is the fused AdamW, as without torch.compile. The first step
compiles, with g++ or clang++, for up to a minute.
"""

import shutil

from contenders import CORES, timed, torch_gpt, torch_step


def why_not() -> str | None:
    """Why it cannot run here; None if it can."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        return "torch.compile needs g++ or clang++"
    return None


def compiled_step(shape):
    """A function that makes a training step and returns its loss."""
    import torch
    from torch._inductor import config

    config.compile_threads = 1  # or processes that compile would stay
    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    step, _ = torch_step(torch_gpt(shape), shape, torch.compile)
    return step


def side(shape):
    """Seconds of a training step."""
    yield from timed(compiled_step(shape))
