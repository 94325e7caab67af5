"""A launcher for each CUDA kernel. It checks shapes, makes the result arrays and launches.

All launchers use raw.py, which compiles a kernel and checks dtypes, layout and alignment.
"""

from minilm.cuda.attention import attention_backward, attention_forward
from minilm.cuda.codes import Codes, nf4_dequantize, nf4_matmul, nf4_quantize
from minilm.cuda.dropout import dropout, kept, philox
from minilm.cuda.lora import lora_backward, lora_forward
from minilm.cuda.optimizer import adamw, gather
from minilm.cuda.raw import COMPUTES, DTYPES, KERNELS, REAL, Kernel, aligned, kernel, read
from minilm.cuda.rows import (
    rms_norm,
    rms_norm_backward,
    rotary,
    scatter_add,
    swiglu,
    swiglu_backward,
)

__all__ = [
    "COMPUTES", "DTYPES", "KERNELS", "REAL", "Codes", "Kernel", "adamw", "aligned",
    "attention_backward", "attention_forward", "dropout", "gather", "kept", "kernel",
    "lora_backward", "lora_forward", "nf4_dequantize", "nf4_matmul", "nf4_quantize", "philox",
    "read", "rms_norm", "rms_norm_backward", "rotary", "scatter_add", "swiglu", "swiglu_backward",
]
