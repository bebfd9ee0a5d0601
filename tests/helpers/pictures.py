"""Images made for tests of image files."""

import numpy as np
from PIL import Image


def ramp(height: int, width: int, most: int) -> np.ndarray:
    """0 … most, every step of equal height."""
    return np.linspace(0, most, height * width).reshape(height, width)


def photograph(height: int = 30, width: int = 41, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
