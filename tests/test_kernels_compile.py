"""Every kernel compiles with NVRTC for three generations of cards, within what its file declares.

No GPU and no driver is needed, only the wheels of the extra `kernels`.
"""

import re

import nvrtc
import pytest

from minilm import cuda

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not nvrtc.installed(), reason='needs pip install -e ".[kernels]"'),
]


def variants():
    """(file, options) of each way in which a file is compiled."""
    for path in sorted(cuda.KERNELS.glob("*.cu")):
        text = path.read_text()
        if "attention.cuh" in text:
            options = [f"-DHEAD_WIDTH={width}" for width in range(16, 129, 16)]
        else:
            options = [f"-DREAL={real}" for real in cuda.REAL.values()] if "REAL" in text else [""]
        yield from ((path.name, option) for option in options)


def kernels_of(source):
    """The names of a source's kernels."""
    return re.findall(
        r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(', source)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("file, option", list(variants()))
def test_kernels_keep_everything_in_registers(file, option, arch):
    source = cuda.read(file)
    budget = int(re.search(r"^// Registers: at most (\d+)$", source, re.M)[1])
    found = nvrtc.compile_cuda(source, file, arch, *filter(None, [option]))
    assert sorted(found) == sorted(kernels_of(source)) != []
    for name, kernel in found.items():
        assert kernel.stack == kernel.spills == 0, name
        assert kernel.registers <= budget, name
        assert kernel.shared <= 48 * 1024, name


def test_too_few_registers_spill():
    source = cuda.read("lora_matmul.cu").replace("_bounds__(256)", "_bounds__(256, 8)")
    kernel = nvrtc.compile_cuda(source, "k.cu", "sm_90", "-DREAL=float")["lora_matmul"]
    assert kernel.registers == 32 and kernel.spills > 0


def test_an_array_that_is_indexed_at_run_time_takes_stack():
    source = ('extern "C" __global__ void k(float* x, int i, int j)'
              "{ float y[64]; for (int n = 0; n < 64; n++) y[(n * j) & 63] = x[n]; x[0] = y[i]; }")
    assert nvrtc.compile_cuda(source, "k.cu", "sm_90")["k"].stack == 256


def test_an_error_and_a_warning_name_the_kernels_file_and_line():
    source = cuda.read("nf4_dequantize.cu")
    lines = (cuda.KERNELS / "nf4_dequantize.cu").read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "unsigned word[4], code[4];" in text)
    with pytest.raises(RuntimeError, match=rf"nf4_dequantize.cu\({line}\): error"):
        nvrtc.compile_cuda(source.replace("unsigned word[4], code[4];", "unsinged word[4], code[4];"),
                           "nf4_dequantize.cu", "sm_90", "-DREAL=float")
    with pytest.raises(RuntimeError, match=rf"nf4_dequantize.cu\({line}\): warning"):
        nvrtc.compile_cuda(source.replace("unsigned word[4], code[4];", "unsigned word[4], code[4]; int spare;"),
                           "nf4_dequantize.cu", "sm_90", "-DREAL=float")
