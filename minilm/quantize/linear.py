"""Linear layers that hold only codes and constants, and a model made of them.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 3, for W of NF4 and an adapter L1, L2:

    Y = X doubleDequant(c1, c2, W^NF4) + X L1 L2                              (5)

The weight exists in the compute dtype only while it is used. The forward pass makes it and lets it
go, and so does the backward pass, which needs dY dequant(W) for dX. A frozen W has no gradient.
This file has the first term; minilm/peft/ has the second.
"""

from dataclasses import fields, replace

import numpy as np

from minilm import cuda
from minilm.arrays import rows
from minilm.backend import array_module
from minilm.blas import matmul as product
from minilm.nn import Linear, Module
from minilm.quantize.codebooks import bits_of
from minilm.quantize.fourbit import FourBit, quantize_4bit
from minilm.quantize.int8 import Int8, finite, int8_matmul_outliers, quantize_int8
from minilm.tensor import Tensor, op

KINDS = ("nf4", "fp4", "nf3", "nf2", "int4", "int3", "int2", "int8", "llm.int8")
COMPUTE = ("float32", "bfloat16", "float16", "float64")


@op
def quantized_linear(x, W, b=None, compute_dtype=None, threshold=None):  # (..., I) -> (..., O)
    """x dequant(W)^T + b, for W a FourBit or Int8 (O, I); the result has x's dtype.

    compute_dtype: of x and W in the product; by default x's. threshold: multiply as LLM.int8()
    does, with this threshold for outliers. The backward pass dequantizes in any case.
    """
    if x.shape[-1] != W.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the quantized W {W.shape} takes "
                         f"{W.shape[1]}")
    shape, dtype = x.shape, x.dtype
    inner = dtype if compute_dtype is None else compute_dtype

    def dx(dy):  # makes the weight again: keeping it since the forward pass would cost memory
        dy = rows(dy).astype(inner, copy=False)
        return product(dy, W.dequantize(inner)).astype(dtype, copy=False).reshape(shape)

    if threshold is None:
        y = product_with_codes(rows(x).astype(inner, copy=False), W)  # eq. (5)
    else:
        y = int8_matmul_outliers(rows(x), W, threshold)
    y = y.astype(dtype, copy=False).reshape(*shape[:-1], -1)
    if b is not None:
        y += b
    return y, dx, None, lambda dy: dy


def product_with_codes(x, W, h=None, B=None):  # (N, I), (O, I), (N, r), (O, r) -> (N, O)
    """x dequant(W)^T, plus h B^T if h is given.

    On a GPU, kernels/nf4_matmul.cu multiplies a few rows of bfloat16 with the codes directly.
    Otherwise the weight is dequantized. The small product comes first, so that the large one can
    add to it while it is written.
    """
    if _few_rows(x, W):
        return cuda.nf4_matmul(cuda.aligned(x), W.on_card(), h, B)
    y = None if h is None else product(h, B.T)
    return product(x, W.dequantize(x.dtype).T, add_to=y)


def _few_rows(x, W):
    return (0 < len(x) <= 16 and array_module(x) is not np and x.dtype == "bfloat16"
            and isinstance(W, FourBit) and bits_of(W.codebook) == 4 and W.block_size == 64
            and W.shape[1] % 64 == 0)


class QuantizedLinear(Module):
    """x dequant(W)^T + b, in place of a Linear: (..., I) -> (..., O).

    weight: W (O, I). Its arrays are also frozen tensors of the module, so they are saved, and
    loaded in place. compute_dtype and threshold: as in quantized_linear. With a threshold, outliers
    are sought among all rows of a call. Generating with a cache has fewer rows in a call, so its
    results differ by the rounding to 8 bits.
    """

    tokenwise = True

    def __init__(self, weight: FourBit | Int8, bias: Tensor | None = None, compute_dtype=None,
                 threshold=None):
        arrays = arrays_of(weight)
        self.weight, self.arrays = weight, tuple(arrays)
        for name, array in arrays.items():
            setattr(self, name, Tensor(array))
        self.bias, self.compute_dtype, self.threshold = bias, compute_dtype, threshold

    def to(self, device):
        """Move the arrays, and put the weight together from the moved ones."""
        super().to(device)
        moved = {name: getattr(self, name).data for name in self.arrays}
        self.weight = replace(self.weight, **moved)
        return self

    def forward(self, x):
        return quantized_linear(x, self.weight, self.bias, compute_dtype=self.compute_dtype,
                                threshold=self.threshold)

    def plain(self) -> Linear:
        """A Linear of the dequantized weight."""
        return Linear.of(Tensor(self.weight.dequantize()), self.bias)

    def astype(self, dtype):
        """Convert the bias; the codes mean nothing in another dtype."""
        if self.bias is not None:
            self.bias.become(self.bias.data.astype(dtype))
        return self


def arrays_of(weight: FourBit | Int8) -> dict:
    """name -> array, for each array of a quantized weight."""
    given = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in given.items() if hasattr(value, "dtype")}


def quantize_model(model: Module, kind: str = "nf4", double_quant: bool | str = True,
                   compute_dtype=None, skip=("head",), block_size: int = 64) -> Module:
    """Replace every Linear of the model by a QuantizedLinear; returns the model.

    kind: a codebook of fourbit.py, "int8" (one constant an output) or "llm.int8" (the same, with
    products in 8 bits and outliers apart). compute_dtype: of the products, by default the input's.
    skip: layers with one of these in their path stay as they are, such as "head", "attention.q"
    or "blocks.0". double_quant and block_size: as in quantize_4bit. ValueError if a weight is not
    finite, skip names what is not there, or nothing is left to quantize; the model is then as it
    was. The weights that are replaced are frozen: an optimizer that holds them says so.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if compute_dtype is not None and str(np.dtype(compute_dtype)) not in COMPUTE:
        raise ValueError(f"compute_dtype must be one of {COMPUTE}, got {compute_dtype!r}")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    def skipped(path): return any(f".{part}." in f".{path}." for part in skip)
    layers = {path: m for path, m in model.named_modules()
              if type(m) is Linear and not skipped(path)}
    if not layers:
        already = ": the model is quantized already" if is_quantized(model) else ""
        raise ValueError(f"there is no Linear to quantize outside of {skip}{already}")
    # Whatever is wrong is found before the first layer is replaced, also what int8 does not need.
    quantize_4bit(np.zeros(1, np.float32), block_size=block_size, double_quant=double_quant)
    inside = [f".{path}." for path, _ in model.named_modules()]
    if wrong := [s for s in skip if s != "head" and not any(f".{s}." in path for path in inside)]:
        raise ValueError(f"skip {wrong} names no layer of this model")
    gone = []
    for path, layer in layers.items():
        finite(layer.weight.data, path)
    for path, layer in layers.items():
        weight = quantize_weight(layer.weight.data, kind, double_quant, block_size)
        gone.append(layer.weight)
        threshold = 6.0 if kind == "llm.int8" else None
        model.replace(path, QuantizedLinear(weight, layer.bias, compute_dtype, threshold))
    kept = {id(t) for _, t in model.named_tensors()}  # a tied head's weight is the embedding's
    for tensor in gone:
        if id(tensor) not in kept:
            tensor.node = None  # so that an optimizer that holds it says that it does not train
    return model


def is_quantized(model: Module) -> bool:
    """Whether a layer of the model has its weight in codes."""
    return any(isinstance(m, QuantizedLinear) for _, m in model.named_modules())


def quantize_weight(W, kind: str, double_quant: bool | str = True, block_size: int = 64):
    """W (O, I) in the form of this kind of layer: an Int8 with a constant a row, or a FourBit."""
    if kind in ("int8", "llm.int8"):
        return quantize_int8(W, axis=-1)
    return quantize_4bit(W, kind, block_size, double_quant)
