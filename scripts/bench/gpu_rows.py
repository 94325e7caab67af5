"""Rows of the benchmark on a GPU: SwiGLU and RMS norm, which Llama has between its products."""

from functools import partial

import numpy as np
from gpu_kernels import again, distinct, normal
from gpu_table import Row

from minilm import cuda


def swiglu_rows(rows=4096, width=5632, device="cuda"):
    """silu(gate) * up, and both gradients."""
    import torch

    def both(dy, gate, up): return cuda.swiglu(gate, up), *cuda.swiglu_backward(dy, gate, up)
    def formula(gate, up): return torch.nn.functional.silu(gate) * up
    return pair("swiglu", (rows, width), [(rows, width)] * 2, cuda.swiglu, both, (6, 16), formula,
                device)


def rms_norm_rows(rows=4096, width=2048, device="cuda"):
    """The norm, and its gradient for x."""
    import torch

    def forward(x, g): return cuda.rms_norm(x, g, 1e-6)[0]

    def both(dy, x, g):
        y, rstd = cuda.rms_norm(x, g, 1e-6)
        return y, cuda.rms_norm_backward(dy, x, g, rstd)

    def formula(x, g): return torch.nn.functional.rms_norm(x, (width,), g, 1e-6)
    return pair("rms_norm", (rows, width), [(rows, width), (width,)], forward, both, (4, 10),
                formula, device)


def pair(name, shape, inputs, forward, both, sizes, formula, device):
    """A row for the forward pass and one for both passes. sizes: bytes that each moves a number."""
    import torch

    count, size = distinct(2 * int(np.prod(shape))), f"{shape[0]} x {shape[1]}, bfloat16"

    def ours(call, *shapes):
        def draw():
            rng = np.random.default_rng(1)
            return again([partial(call, *(normal(rng, *s) for s in shapes)) for _ in range(count)])
        return draw

    def tensors(*shapes):
        return [torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True)
                for s in shapes]

    def torch_forward():
        return again([partial(formula, *tensors(*inputs)) for _ in range(count)])

    def torch_gradients(dy, *inputs):
        y, leaves = formula(*inputs), [t for t in inputs if t.ndim > 1]
        return y, *torch.autograd.grad(y, leaves, dy)

    def torch_both():
        return again([partial(torch_gradients, *tensors(shape, *inputs)) for _ in range(count)])

    n, (one, two) = shape[0] * shape[1], sizes
    return [Row(f"{name}, {size}", ((one * n, 0),), ours(forward, *inputs), "PyTorch",
                torch_forward),
            Row(f"{name} and its gradients, {size}", ((two * n, 0),),
                ours(both, shape, *inputs), "PyTorch", torch_both)]


GROUPS = {"swiglu": swiglu_rows, "rms_norm": rms_norm_rows}
