"""Contexts in which modules are tried: another mode, no settings of the caller's, random generators reset."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """All modules in training or eval mode; each gets its flag back afterwards, since some of them may be frozen."""
    flags = [(m, m.training) for m in module.modules()]
    for m, _ in flags:
        m.training = training
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Without gradients, and without the inference mode and autocast that the caller may be in."""
    kind = device.type if device.type in ("cpu", "cuda") else "cpu"
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
        yield


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """The global random generators are reset afterwards to where they were, also for other threads."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
