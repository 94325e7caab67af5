"""QLoRA's layer as one op: frozen codes, and beside them a trained update of low rank.

Dettmers et al. 2023, arXiv:2305.14314, section 3, with lora.py's A and B for the paper's L1 and L2:

    Y = X doubleDequant(c1, c2, W^NF4) + scale X A^T B^T                      (5)

quantized_linear followed by add_low_rank gives the same values. As one op, the small product is
written first and the large one adds to it, forward and backward. So no output is written twice.
"""

from minilm.arrays import one_dtype, rows
from minilm.blas import matmul as product
from minilm.graph import once
from minilm.quantize.linear import product_with_codes
from minilm.tensor import op


@op
def quantized_lora(x, W, A, B, b=None, *, scale):  # (..., I), (O, I), (r, I), (O, r) -> (..., O)
    """x dequant(W)^T + b + scale x A^T B^T. W is a FourBit or Int8; all else has one dtype."""
    one_dtype("quantized_lora", x=x, A=A, B=B)
    lead, x = x.shape[:-1], rows(x)
    h = product(x, A.T, alpha=scale)  # (N, r)
    y = product_with_codes(x, W, h, B)  # eq. (5)
    if b is not None:
        y += b

    dy_rows = once(rows)  # (N, O)

    @once
    def dh(dy): return product(dy_rows(dy), B, alpha=scale)  # (N, r)

    def dx(dy):
        small = product(dh(dy), A)
        return product(dy_rows(dy), W.dequantize(x.dtype), add_to=small).reshape(*lead, -1)
    def dA(dy): return product(dh(dy).T, x)
    def dB(dy): return product(dy_rows(dy).T, h)
    return y.reshape(*lead, -1), dx, None, dA, dB, lambda dy: dy
