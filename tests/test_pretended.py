"""The real CuPy without a card (tests/pretended): training, QLoRA, paged states and generation.

Every launch of these goes through CuPy 14.2 and NVRTC; losses, gradients and texts are the CPU's.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pretended
import pytest
from op_table import TOLERANCE

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not pretended.available(), reason='needs pip install -e ".[kernels]", gcc '
                       "and Python's headers"),
]
ROOT = Path(__file__).resolve().parents[1]
KERNELS = {  # of ours, that a path cannot do without
    "training": {"rms_norm", "swiglu_backward", "adamw"},
    "gpt2": {"adamw"},
    "qlora": {"nf4_dequantize", "nf4_matmul", "attention_forward", "attention_dq",
              "attention_dk_dv", "rms_norm_backward", "adamw"},
    "paged": {"nf4_dequantize", "adamw"},
    "codes": {"rms_norm"},
    "int8": {"attention_forward"},
}
MOST = {"training": 400, "gpt2": 560, "qlora": 380, "paged": 580, "codes": 820, "int8": 440}


def run(*words):
    """The last line that a process with the pretended card prints, from JSON."""
    done = subprocess.run([sys.executable, *words], env=pretended.environment(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", KERNELS)
def test_a_path_is_the_cpus(path, record_property):
    found = run("-m", "pretended", path)
    assert found["not_compared"] == {} and found["faults"] == []
    half = path in ("gpt2", "qlora", "int8")
    allowed = TOLERANCE["bfloat16" if half else "float32"]
    for ours, theirs in found["losses"]:
        assert abs(ours - theirs) <= allowed * theirs
    assert found["losses"][-1][0] < found["losses"][0][0]
    assert found["error"] <= (2 if half else 1) * allowed
    assert found["texts"][0] == found["texts"][1]
    assert KERNELS[path] <= set(found["kernels"])
    count = sum(found["launches"].values())
    record_property("launches", count)
    record_property("milliseconds", found["milliseconds"])
    assert count <= MOST[path], found["launches"]  # of one step of two blocks


REFUSED = """
import json
import numpy as np
from pretended.card import installed
card = installed()
import cupy as cp
from minilm import cuda
from minilm.backend import to_device

def kernel(code, grid=(1,), name="k"):
    module = cp.RawModule(code=code, options=("-std=c++17",))
    module.get_function(name)(grid, (32,), (cp.zeros(4, np.float32),))

GOOD = '#line 1 "k.cu"\\nextern "C" __global__ void k(float* x) { x[0] = 1; }'
half = cp.zeros((2, 3, 3), "bfloat16")
found = {}
for name, call in {
        "a name": lambda: cp.vecdot(half, half), "an argument": lambda: half.max(initial=0),
        "a step": lambda: cp.arange(3, -1, -1, dtype=np.uint8),
        "a stack": lambda: half @ half, "a mixture": lambda: cp.zeros(3) + np.zeros(3),
        "a dtype of ours": lambda: cuda.swiglu(cp.zeros(4, int), cp.zeros(4, int)),
        "source": lambda: kernel(GOOD.replace("x[0]", "y[0]")),
        "a kernel's name": lambda: kernel(GOOD, name="other"),
        "a grid": lambda: kernel(GOOD, (1, 1 << 17)), "nothing": lambda: kernel(GOOD)}.items():
    try:
        call()
        found[name] = ""
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
x = cp.empty(1 << 20, np.float32)  # more than the pool has
found["unwritten"] = bool(cp.isnan(x).all())
print(json.dumps(found))
"""


def test_what_cupy_or_a_card_refuses_is_refused():
    found = run("-c", REFUSED)
    assert found.pop("nothing") == "" and found.pop("unwritten") is True
    for name, said in {
            "a name": "AttributeError.*vecdot", "an argument": "TypeError.*initial",
            "a step": "OverflowError", "a stack": "TypeError.*data type 'E' not understood",
            "a mixture": "TypeError: Unsupported type.*numpy.ndarray",
            "a dtype of ours": "TypeError: swiglu computes in .*int64",
            "source": 'CompileException.*identifier "y" is undefined',
            "a kernel's name": "RuntimeError: .*no kernel.*other",
            "a grid": "RuntimeError: no launch of a grid of 1 x 131072 x 1"}.items():
        assert re.search(said, found[name], re.S), found.pop(name)
        del found[name]
    assert not found


@pytest.mark.parametrize("file", ["paged", "cuda_path", "adamw_kernel", "eightbit"])
def test_the_tests_that_take_cupy_pass_on_it(file):
    chosen = "real and not there"  # CuPy's sort needs a card
    done = subprocess.run(
        [sys.executable, "-m", "pytest", ROOT / "tests" / f"test_{file}.py", "-k", chosen, "-q",
         "-o", "addopts=", "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True,
        env=pretended.environment() | {"HYPOTHESIS_PROFILE": "few"})
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1])
