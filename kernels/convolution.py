"""What the convolutions on the tensor cores share: gathered factors → their product, added to float32 sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_product(sums, left, in_left, right, in_right, UPCAST: tl.constexpr):
    """`sums` + the product of two matrices.

    left, right: pointers to the elements of both factors, [pixels, inner] and [inner, channels]; elements outside of
    `in_left` and `in_right` count as zeros.
    """
    a = tl.load(left, mask=in_left, other=0.0)
    b = tl.load(right, mask=in_right, other=0.0)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="tf32x3")


def needs_upcast(features: Tensor) -> bool:
    """Whether the factors are converted to float32 first.

    float64 is computed in float32; Triton's interpreter, on the CPU, would multiply the bit patterns of bfloat16.
    """
    interpreted = features.device.type == "cpu" and features.dtype == torch.bfloat16
    return features.dtype == torch.float64 or interpreted
