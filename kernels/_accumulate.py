"""A matrix product added to an accumulator, with float32 summed by blocks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accumulate(left, right, acc, PRECISION: tl.constexpr):
    """acc + left @ right, [rows, columns] float32."""
    if left.dtype == tl.float32 and PRECISION == "ieee":
        # One chain of additions over the whole contraction would round worse than cuBLAS. The compiler merges
        # dot(left, right) + acc into such a chain; it leaves an fma alone.
        product = tl.dot(left, right, input_precision="ieee")
        return tl.fma(product, tl.full(acc.shape, 1.0, tl.float32), acc)
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)
