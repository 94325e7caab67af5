"""Sums over rows are right, and warn of nothing, whatever lies on the stack."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from minilm.arrays import row_sum

FILL = """#include <alloca.h>
extern "C" void fill(int n, unsigned bits) {
    volatile unsigned *p = static_cast<unsigned *>(alloca(4 * n));
    for (int i = 0; i < n; i++) p[i] = bits;
}
"""


@pytest.fixture(scope="module")
def fill(tmp_path_factory):
    """fill(n, bits) leaves n words of these bits on the stack."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("fill")
    (folder / "fill.cpp").write_text(FILL)
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", "fill.so", "fill.cpp"], cwd=folder,
                   check=True)
    return ctypes.CDLL(folder / "fill.so").fill


@pytest.mark.parametrize("rows", range(1, 9))
def test_a_row_sum_does_not_see_the_stack(fill, rows):
    """Signaling NaN there made (2, 5) @ (5,) warn of an invalid value, with AVX-512."""
    for columns in range(1, 9):
        x = np.arange(1, 1 + rows * columns, dtype=np.float32).reshape(rows, columns)
        for words in 256, 2048, 16384:
            fill(words, ctypes.c_uint32(0x7FA00001))
            assert (row_sum(x)[:, 0] == x.sum(-1)).all()
