"""How fast a policy's answers are drawn: in a batch with the cache, and without.

    python scripts/bench/rollout_speed.py --model runs/pretrain-1/model

Prints answers a second for 64 prompts of 12 to 20 tokens: in one batch with the cache (what PPO
does), in one batch without it, and one after another without it.
"""

import sys
import time
from pathlib import Path

import numpy as np

from minilm import align
from minilm.command import command
from minilm.interop import load_model
from minilm.peft import add_lora
from minilm.ranges import check, whole

RANGES = {"rows": whole(1), "tokens": whole(1), "repeats": whole(1)}


def main(model: Path, rows: int = 64, tokens: int = 24, repeats: int = 3):
    """Print how fast a policy's answers are drawn.

    Args:
        model: Hugging Face folder; the policy is LoRA of rank 8 on it.
        rows: answers of a batch.
        tokens: of an answer.
        repeats: runs, of which the fastest counts.
    """
    check(RANGES, rows=rows, tokens=tokens, repeats=repeats)
    policy, rng = add_lora(load_model(model).eval(), 8, 16, "all-linear"), np.random.default_rng(0)
    prompts = [rng.integers(0, policy.config.vocab_size, n) for n in rng.integers(12, 21, rows)]
    draw = align.draw_answers
    fast = timed(lambda: draw(policy, prompts, tokens, None), repeats)
    print(f"{'one batch with the cache':36}{rows / fast:10.1f} answers/s")
    rollouts = sys.modules["minilm.align.rollouts"]  # the package has a function of this name
    cached, rollouts.caches = rollouts.caches, lambda model: False
    try:
        slow = timed(lambda: draw(policy, prompts, tokens, None), repeats)
        few = prompts[:4]
        alone = timed(lambda: [draw(policy, [p], tokens, None) for p in few], repeats) / len(few)
    finally:
        rollouts.caches = cached
    for name, seconds in (("one batch without it", slow), ("one by one without it", rows * alone)):
        print(f"{name:36}{rows / seconds:10.1f} answers/s, the first is {seconds / fast:.1f} times "
              "as fast")


def timed(work, repeats: int) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    command(main)
