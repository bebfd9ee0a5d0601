"""Engines, the network without exits → seconds for the same images, in turns, and what a plan says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engines.engine import Engine
from . import probe
from .integer_lowering import is_quantized
from .trial import Subject

PLAIN = "PyTorch without exits"


@dataclass(frozen=True)
class Times:
    """Seconds for `count` images that all go to the final exit.

    least, usual: of each engine, the least and the median of all rounds. plain: the median of the network without
    exits, run by PyTorch; None where that was not measured.
    """

    count: int
    least: tuple[float, ...]
    usual: tuple[float, ...]
    plain: float | None

    def sentence(self, names: Sequence[str], chosen: int) -> str | None:
        """How many times as fast the engine number `chosen` is, by medians; None where there is no other."""
        others = [pair for i, pair in enumerate(zip(names, self.usual, strict=True)) if i != chosen]
        if self.plain is not None:
            others.append((PLAIN, self.plain))
        if not others:
            return None
        own = self.usual[chosen]
        ratios = ", ".join(f"{seconds / own:.1f}× as fast as {name}" for name, seconds in others)
        times = ", ".join(f"{1e3 * seconds:.1f}" for _, seconds in others)
        return f"{ratios} ({self.count} images to the final exit, medians: {1e3 * own:.1f} ms, {times})"


def measure(subject: Subject, engines: Sequence[Engine], rounds: int | None = None) -> Times:
    """rounds: by default as many as decide between engines."""
    net, device = subject.net, subject.device
    # A GPU needs more to be busy, and of large networks fewer take long enough.
    count = 32 if device.type == "cuda" else 1 if probe.is_large(net) else 2
    images = torch.cat([probe.images(net, subject.example_inputs)] * count).to(device)
    thresholds = probe.thresholds(net, net.num_exits).to(device)

    def waited(run: Callable[[], Any]) -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    runs = [partial(waited, partial(engine.run, images, thresholds)) for engine in engines]
    runs += [partial(waited, run) for run in _plain(subject, images)]
    take_turns = probe.turns_on_cpu if device.type == "cpu" else probe.turns
    found = take_turns(runs) if rounds is None else take_turns(runs, rounds)
    usual = tuple(map(probe.usual, found))
    n = len(engines)
    return Times(len(images), tuple(map(min, found[:n])), usual[:n], usual[n] if len(usual) > n else None)


def _plain(subject: Subject, images: Tensor) -> list[Callable[[], Any]]:
    """The network without exits; [] where it takes long, or where its final head has no classifier."""
    net = subject.net
    if is_quantized(net) or probe.is_large(net):
        return []
    try:
        plain = net.plain()
    except ValueError:
        return []
    return [partial(plain, images.to(next(net.parameters()).dtype))]
