"""Quantization: numbers in 8 bits or fewer, and layers that keep their weights in this form."""

from minilm.quantize.fourbit import FourBit, quantize_4bit
from minilm.quantize.int8 import Int8, int8_matmul_outliers, quantize_int8
from minilm.quantize.kept import dequantized
from minilm.quantize.linear import QuantizedLinear, is_quantized, quantize_model

__all__ = [
    "FourBit", "Int8", "QuantizedLinear", "dequantized", "int8_matmul_outliers", "is_quantized",
    "quantize_4bit", "quantize_int8", "quantize_model",
]
