"""A seed → windows of a sensor with six channels and their labels, all generated: a test set for networks on rows."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

RATE = 50.0
"""Samples per second: 128 of them are 2.56 s."""

CHANNELS, CLASSES = 6, 6


def sensor_windows(count: int, length: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Windows [count, 6, length] float32 and labels [count] int64, 0 … 5; the same for the same arguments.

    Like an accelerometer and a gyroscope on a walking body, and nothing more: no claim about real recordings. A window
    of class k is a fundamental of 1 + 0.35·k Hz and its second harmonic, with amplitudes that each class has for each
    channel, a random phase, a frequency up to 5 % off and a constant offset per channel (the direction of gravity).
    White noise has a standard deviation between 0 and 2, another one for each window, so that some windows are easy
    and others are not.
    """
    if count < 0 or length < 1:
        raise ValueError(f"count={count} and length={length} must be at least 0 and 1")
    # What belongs to classes does not depend on the seed of the windows.
    fixed = torch.Generator().manual_seed(0)
    amplitudes = torch.randn(2, CLASSES, CHANNELS, 1, generator=fixed)
    shifts = 2 * pi * torch.rand(2, CLASSES, CHANNELS, 1, generator=fixed)
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=g)
    hertz = (1 + 0.35 * labels) * (0.95 + 0.1 * torch.rand(count, generator=g))
    phase = 2 * pi * torch.rand(count, generator=g)
    turns = (2 * pi / RATE * hertz[:, None] * torch.arange(length) + phase[:, None])[:, None]
    windows = 0.5 * torch.randn(count, CHANNELS, 1, generator=g).expand(-1, -1, length)
    for harmonic, (amplitude, shift) in enumerate(zip(amplitudes, shifts, strict=True), 1):
        windows = windows + amplitude[labels] / harmonic * torch.sin(harmonic * turns + shift[labels])
    noise = torch.randn(count, CHANNELS, length, generator=g) * 2 * torch.rand(count, 1, 1, generator=g)
    return windows + noise, labels
