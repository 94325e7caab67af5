"""Which kernels each side multiplies matrices with: this decides half of a benchmark.

    python scripts/bench/which_kernels.py torch    # or ours, or jax: what a side says of itself

`lines` asks each side in a process of its own, which multiplies two matrices and says how fast.
oneMKL says which instructions it takes only while it multiplies. On CPUs that are not Intel's it
names none: "Intel(R) Architecture processors".
"""

import os
import re
import subprocess
import sys
import time

import numpy as np

SIZE, SECONDS = 1024, 0.1
CHOSEN = ("OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE",
          "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "XLA_FLAGS")


def lines(sides) -> list[str]:
    """A line for each of the sides "ours", "torch" and "jax", and one for each variable that
    chooses kernels."""
    told = [asked(side) for side in sides]
    chosen = [f"{name}={os.environ[name]}" for name in CHOSEN if os.environ.get(name)]
    return told + [f"warning: {setting} is set, so these may not be the kernels that a user has"
                   for setting in chosen]


def asked(side: str) -> str:
    """What a side says of itself."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, side], capture_output=True,
                          text=True, env=os.environ | {"MKL_VERBOSE": "1"})
    if done.returncode:
        return f"{side}: {(done.stderr.splitlines() or ['it died'])[-1]}"
    mkl = re.search(r"MKL_VERBOSE (oneMKL .*?) Product .*?architecture (.*?),", done.stdout)
    *_, said = done.stdout.splitlines()
    return said.replace("oneMKL", f"{mkl[1]} for {mkl[2]}") if mkl else said


def of_numpy() -> str:
    """NumPy's BLAS."""
    from threadpoolctl import threadpool_info

    blas = ", ".join(f"{found['internal_api']} {found['version']}, kernels "
                     f"{found.get('architecture')}" for found in threadpool_info()
                     if found["user_api"] == "blas")
    x = matrix()
    return f"minilm: NumPy {np.__version__}, {blas or 'BLAS unknown'}; {rate(lambda: x @ x)}"


def of_torch() -> str:
    """PyTorch's: oneMKL for products, and the vector instructions of its own loops."""
    import torch

    x = torch.from_numpy(matrix())
    blas = "oneMKL" if torch.backends.mkl.is_available() else "no oneMKL"
    return (f"PyTorch {torch.__version__}, {blas}, its own loops for "
            f"{torch.backends.cpu.get_cpu_capability()}; {rate(lambda: x @ x)}")


def of_jax() -> str:
    """JAX's: what XLA makes of a product."""
    import jax

    x = jax.numpy.asarray(matrix())
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    text, found = product.as_text(), "XLA's own (Eigen)"
    for sign, library in {"ynn_fusion": "YNNPACK", "onednn": "oneDNN"}.items():
        found = library if sign in text else found
    return f"JAX {jax.__version__}, {found}; {rate(lambda: product(x).block_until_ready())}"


def matrix():
    return np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32)


def rate(product) -> str:
    """The fastest of some products."""
    product()
    fastest, start = float("inf"), time.perf_counter()
    while (now := time.perf_counter()) - start < SECONDS:
        product()
        fastest = min(fastest, time.perf_counter() - now)
    return f"{2e-9 * SIZE**3 / fastest:.0f} GFLOP/s with all of its threads"


if __name__ == "__main__":
    print({"ours": of_numpy, "torch": of_torch, "jax": of_jax}[sys.argv[1]]())
