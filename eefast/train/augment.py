"""A batch of training images → the same batch, randomly changed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Every image moved by another random offset of at most `pixels` in each direction, zeros where nothing was.

    images: [N, C, H, W]; returns a new tensor of that shape, dtype and device. Equivalent to zero padding by `pixels`
    and a random crop of the old size per image.
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4)
    offset = torch.randint(0, 2 * pixels + 1, (2, n, 1), device=images.device)
    rows = (offset[0] + torch.arange(height, device=images.device)).view(n, 1, height, 1)
    columns = (offset[1] + torch.arange(width, device=images.device)).view(n, 1, 1, width)
    sample = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    return padded[sample, channel, rows, columns]


def random_flip(images: Tensor) -> Tensor:
    """Every image mirrored left to right with probability 1/2.

    images: [N, C, H, W]; returns a new tensor of that shape, dtype and device.
    """
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)
