"""The kernels pass their tests under AddressSanitizer, UBSan and ThreadSanitizer, and bugs planted
in them are caught: so the checks are known to be able to fail.
"""

import os
import re
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import emulator
import numpy as np
import pytest
from planted_bugs import BUGS

from minilm import cuda

pytestmark = pytest.mark.skipif(not emulator.available() and "CI" not in os.environ,
                                reason="needs g++")


TESTS = ["test_nf4_kernels.py", "test_lora_kernels.py", "test_adamw_kernel.py",
         "test_attention_kernel.py", "test_row_kernels.py", "test_counted_kernels.py"]


@pytest.mark.parametrize("build", [None, "address", "thread"])
def test_kernels_are_clean_and_planted_bugs_are_caught(build):
    environment = emulator.sanitized_environment(build) if build else dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    program = Path(__file__).with_name("planted_bugs.py")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    ended = dict(line.split("\t") for line in done.stdout.splitlines())
    kernels = {path.name for path in cuda.KERNELS.glob("*.cu")}
    bugs = {bug.name: bug.says for bug in BUGS if bug.build == build}
    assert set(ended) == kernels | set(bugs)
    for name in kernels:
        assert literal_eval(ended[name]) == "clean", f"{name}: {literal_eval(ended[name])}"
    for name, says in bugs.items():
        assert re.search(says, literal_eval(ended[name])), f"{name}: {literal_eval(ended[name])}"


@pytest.mark.parametrize("build", ["address", "thread"])
def test_the_kernels_tests_pass_under_sanitizers(build):
    few = {"HYPOTHESIS_PROFILE": "few", "OMP_NUM_THREADS": "1"}  # PyTorch's threads are not watched
    environment = emulator.sanitized_environment(build) | few
    folder = Path(__file__).parent
    files = [folder / name for name in TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-n", "0", "-p", "no:cacheprovider", *files],
        env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_wrong_argument_width_is_caught(cupy, monkeypatch):
    monkeypatch.setitem(cuda.DTYPES, "long long", "int32")
    arrays = [cupy.zeros(4, np.float32) for _ in range(4)]
    with pytest.raises(TypeError, match="argument 4, int32, has 4 bytes, expected 8"):
        cuda.Kernel("adamw.cu", "adamw")((1,), (256,), *arrays, 4, 1, 1, 1, 1, 1, 1)
