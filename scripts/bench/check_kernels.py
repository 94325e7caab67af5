"""Check every kernel against its formula: the first program to run on a GPU.

    python scripts/bench/check_kernels.py  # all cases, small
    python scripts/bench/check_kernels.py dequantize --large
    python scripts/bench/check_kernels.py --stand-in  # on the CPU, by tests/emulator (small only)
    compute-sanitizer python scripts/bench/check_kernels.py adam --raw

The cases are in gpu_cases.py. Prints each check that fails, and for each case the number of checks
and the largest error among those that passed. New memory is filled with 0xFF, so numbers that a
kernel does not write show as nan. --unwritten leaves memory as it is, for initcheck. --raw takes
each array from cudaMalloc, so that a memory checker sees where it ends.
"""

import argparse
import contextlib
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gpu_cases  # noqa: E402
from gpu_cases import CASES  # noqa: E402

from minilm.backend import cupy  # noqa: E402


@contextlib.contextmanager
def poisoned(cp):
    """Inside, cupy.empty returns memory full of 0xFF; a stand-in does so by itself."""
    if not hasattr(cp.ndarray, "__cuda_array_interface__"):
        yield
        return
    empty = cp.empty

    def filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        x.data.memset_async(255, x.nbytes)
        return x
    cp.empty = filled
    try:
        yield
    finally:
        cp.empty = empty


def check(name: str, large: bool) -> int:
    """Run a case; how many of its checks failed."""
    start, done, failed, worst = time.perf_counter(), 0, 0, 0.0
    try:
        for what, found, allowed in CASES[name](large):
            done += 1
            if found <= allowed:
                worst = max(worst, found)
            else:
                failed += 1
                print(f"FAIL {name}: {what}: {found:.2e}, allowed {allowed:.0e}", flush=True)
    except Exception as error:
        failed += 1
        print(f"FAIL {name} after {done}: {type(error).__name__}: {error}\n"
              f"{traceback.format_exc(limit=-6)}", flush=True)
    print(f"done {name}: {done} checks, largest good error {worst:.1e}, "
          f"{time.perf_counter() - start:.1f} s", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", help=" ".join(CASES))
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--unwritten", action="store_true")
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"there are no cases {sorted(unknown)}, only {list(CASES)}")
    stand_in, failed = contextlib.nullcontext(), 0
    if args.stand_in:
        from emulated_cupy import installed
        stand_in = installed()
    with stand_in:
        cp = cupy()
        if args.raw:
            cp.cuda.set_allocator(None)
        with contextlib.nullcontext() if args.unwritten else poisoned(cp):
            for name in args.cases or CASES:
                gpu_cases.seed(args.seed)
                failed += check(name, args.large)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
