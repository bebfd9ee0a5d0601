"""A compact engine with stages in other libraries → the fastest of its forms beside OpenMP's threads.

These spin for milliseconds after every stage, exit and copy that PyTorch runs, and take the cores from the next stage's
library. No stage shows that alone, so whole engines are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ..engines.compact import CompactEngine
from ..system import openmp
from . import probe
from .stage_runtimes import CHUNK, LIBRARIES, PYTORCH, has_large_images, uses_openmp
from .trial import Subject

ROUNDS, PATIENCE = 7, 4.0
"""Of the comparison, see `probe.seconds_on_cpu`: engines differ less than stages."""

GAIN = 0.85
"""Score ÷ that of exits in one thread from which on they run in all; where that is better, much is in PyTorch."""

NO_STAGE = "no stage in PyTorch, whose threads would take the cores from other libraries"
ALL_STAGES = "all stages in PyTorch, whose threads would take the cores from other libraries"


def fastest_beside_openmp(
    subject: Subject, engine: CompactEngine, build: Callable[[Subject], CompactEngine]
) -> CompactEngine:
    """The fastest on single images and on images of which some leave at every exit.

    engine: as `build` makes it; what is returned where no library runs a stage, and on one thread. Compared are exits
    in all threads and in one; of small images and where some of the stages run in PyTorch also all in other libraries,
    and all in PyTorch.
    """
    in_pytorch = [uses_openmp(step.stage) for step in engine.steps]
    if all(in_pytorch) or not openmp.adjustable():
        return engine
    engines = [engine]
    if any(in_pytorch) and subject.stages == "auto" and not has_large_images(subject.net):
        for stages, why in ((LIBRARIES, NO_STAGE), (PYTORCH, ALL_STAGES)):
            plan = (made := build(replace(subject, stages=stages, rival=()))).plan
            plan = replace(plan, reasons=(*engine.plan.reasons, why))
            engines.append(CompactEngine(made.net, plan, made.steps))
    quiet = [CompactEngine(e.net, e.plan, e.steps, in_one_thread=True) for e in engines]
    scores = _scores(subject, [*quiet, *engines])
    of_quiet, of_loud = scores[: len(quiet)], scores[len(quiet) :]
    if min(of_loud) < GAIN * min(of_quiet):
        return engines[of_loud.index(min(of_loud))]
    return quiet[of_quiet.index(min(of_quiet))]


def _scores(subject: Subject, engines: list[CompactEngine]) -> list[float]:
    """Products of the seconds of single images and of several, which count alike, as for stages; the least is best."""
    net, large = subject.net, probe.is_large(subject.net)
    images = probe.images(net, subject.example_inputs)
    if not large:
        images = torch.cat([images] * max(min(CHUNK, subject.max_batch_size) // len(images), 1))
    scores = [1.0] * len(engines)
    for n in (len(images),) if large else (1, len(images)):
        # Survivors are copied, which wakes these threads, too.
        limits = probe.thresholds(net, net.num_exits) if n == 1 else probe.thresholds_of_each(net, n)
        runs = [partial(engine.run, images[:n], limits) for engine in engines]
        seconds = probe.seconds_on_cpu(runs, ROUNDS, PATIENCE)
        scores = [score * value for score, value in zip(scores, seconds, strict=True)]
    return scores
