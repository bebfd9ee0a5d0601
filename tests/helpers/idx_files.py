"""Arrays as bytes in the idx layout, in which MNIST is published."""

import struct

import numpy as np


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
