"""Decide once which engine runs a network: network and options → the engine, with its plan."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..engines.engine import Engine
from ..engines.program import Plan, StagePlan
from ..engines.reference import ReferenceEngine
from ..model import EarlyExitNet
from ..modules.contexts import isolated
from ..runtimes import RUNTIMES
from ..system.progress import Late, Progress
from . import probe, trial
from .compact_steps import build_compact
from .compact_steps import obstacle as compact_obstacle
from .engine_times import Times, measure
from .errors import SlowerError, UnsupportedError
from .folding import SIMULATED
from .integer_lowering import is_quantized
from .patterns import computes_as
from .resident_program import build_resident, lowered
from .rows import network_on_maps
from .stage_runtimes import PYTORCH, STAGES, libraries
from .trial import Subject

ENGINES = ("auto", "reference", "compact", "resident")

CACHEABLE_MEGABYTES = 128
"""Float32 weights up to which "auto" considers the resident engine; it was faster up to there (EENet-50)."""

BY_NAME = "asked for by name"

log = logging.getLogger("eefast")


@dataclass(frozen=True)
class Options:
    """What the user asked for, see `eefast.accelerate`; example_inputs: prepared images or None."""

    engine: str = "auto"
    dtype: torch.dtype | None = None
    example_inputs: Tensor | None = None
    max_batch_size: int = 256
    stages: str = "auto"


def build(net: EarlyExitNet, options: Options) -> Engine:
    """Choose the engine and prepare what it runs.

    Whatever an engine would run is first tried on a few images against the network's answers, see `planning.trial`.
    An engine asked for by name raises `ValueError` if it cannot run; "auto" falls back and logs once why.
    """
    check_engine(options.engine, options.stages)
    # What is made in inference mode or under autocast would serve other calls badly.
    with isolated(net.cost.device):
        engine = _built(net, options)
        if engine.plan.engine != "resident":
            engine.copies_images = trial.writes_to_images(engine.net, probe.images(engine.net))
    return engine


def _built(net: EarlyExitNet, options: Options) -> Engine:
    name = "compact" if options.stages in RUNTIMES else options.engine
    with closing(Late()) as progress:
        ops.register_flops()
        _check_own(net)
        _check_classes(net)
        _check_quantized(net, options.dtype)
        if name == "reference":
            return _reference(net, options.dtype, BY_NAME)
        try:
            subject = _subject(*_on_maps(net, options), progress)
        except UnsupportedError as obstacle:
            if name == "auto":
                return _fallen_back(net, options.dtype, obstacle)
            raise _refused(name, obstacle, "reference") from obstacle
        if name == "auto":
            return _auto(subject, options.dtype)
        try:
            return _because(_compact(subject) if name == "compact" else _resident(subject)[0], BY_NAME)
        except UnsupportedError as obstacle:
            raise _refused(name, obstacle, {"resident": "compact"}.get(name, "reference")) from obstacle


def _on_maps(net: EarlyExitNet, options: Options) -> tuple[EarlyExitNet, Options]:
    """A network on rows, and its examples, as one on maps; `UnsupportedError` where that gives other answers."""
    if len(net.input_shape) != 2:
        return net, options
    examples = options.example_inputs
    return network_on_maps(net), replace(options, example_inputs=None if examples is None else examples.unsqueeze(2))


def check_engine(engine: str, stages: str) -> None:
    """`ValueError` where no engine has this name, nothing of this name runs its stages, or that is not installed."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    if stages not in STAGES:
        raise ValueError(f"stages={stages!r} is unknown; choose one of {', '.join(STAGES)}")
    if stages != "auto" and engine in ("resident", "reference"):
        raise ValueError(f"stages={stages!r} is for engine='compact', not for engine={engine!r}; leave one of them out")
    if stages in RUNTIMES and (missing := RUNTIMES[stages].missing()):
        raise ValueError(f"stages={stages!r} cannot run: {missing}; use stages={PYTORCH!r} or 'auto'")


def _auto(subject: Subject, dtype: torch.dtype | None) -> Engine:
    try:
        resident, geometry = _resident(subject, largest=CACHEABLE_MEGABYTES)
    except UnsupportedError as why_not:
        large = isinstance(why_not, _TooLargeError)
        try:
            reason = str(why_not) if large else f"the resident engine cannot run: {why_not}"
            return _alone(subject, _compact(subject), reason)
        except UnsupportedError as obstacle:
            return _fallen_back(subject.net, dtype, obstacle)
    return _faster(subject, resident, geometry)


def _subject(net: EarlyExitNet, options: Options, progress: Progress) -> Subject:
    """`UnsupportedError` where only the reference engine can run the network."""
    # Noise, since images that are alike would not show what depends on the batch.
    noise, weight = probe.images(net), next(net.parameters())
    trial.check_modes(net, noise)
    if weight.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"engines run on the CPU and on CUDA devices, the network is on {weight.device}")
    expected, dtype = trial.expected(net, noise), options.dtype or weight.dtype
    more = options.example_inputs, options.max_batch_size, options.stages, progress
    return Subject(net, weight.device, dtype, expected, *more)


def _reference(net: EarlyExitNet, dtype: torch.dtype | None, reason: str) -> Engine:
    weight = next(net.parameters())
    if dtype not in (None, weight.dtype):
        raise ValueError(f"dtype={dtype}: the reference engine runs in the network's dtype; use net.to({dtype})")
    stages = tuple(
        StagePlan(cost.feature_shape, share, "PyTorch", "unchanged")
        for cost, share in zip(net.stage_costs, trial.shares(net), strict=True)
    )
    return ReferenceEngine(net, Plan("reference", weight.device, weight.dtype, net.criterion.name, (reason,), stages))


def _fallen_back(net: EarlyExitNet, dtype: torch.dtype | None, obstacle: Exception) -> Engine:
    log_once(f"engine='auto' runs the reference engine: {obstacle}")
    return _reference(net, dtype, str(obstacle))


def _compact(subject: Subject) -> Engine:
    with _exceptions_as_obstacles():
        engine = build_compact(subject)
    if any(row.note.startswith(SIMULATED) for row in engine.plan.stages):
        log_once("stages in INT8 run in PyTorch, slower than in float32: pip install onnx onnxruntime openvino")
    return engine


def _resident(subject: Subject, largest: float = float("inf")) -> tuple[Engine, Any]:
    """The engine, and all of the network's geometry that its speed depends on; largest: megabytes of weights."""
    with _exceptions_as_obstacles():
        subject.progress("planning the resident engine", 0, 1)
        found = lowered(subject)
        megabytes = found.nbytes / 1e6
        if megabytes > largest and not compact_obstacle(subject.net, subject.device):
            raise _TooLargeError(megabytes)
        return build_resident(subject, found), found.geometry


speeds: dict[Any, Times] = {}
"""Of the resident and of the compact engine, for each geometry of a network; none is measured twice."""


hopeless: dict[Any, str] = {}
"""Why the resident engine runs, for the geometries where the compact one was slower before it was whole."""


def _rival(subject: Subject, resident: Engine) -> tuple[float, ...]:
    """Seconds of an image to each exit; () where all of the compact engine is planned quickly, or has no choices."""
    net = subject.net
    if subject.device.type != "cpu" or not probe.is_large(net):
        return ()
    images = probe.images(net, subject.example_inputs)
    images = images[torch.arange(max(len(images) // 2, torch.get_num_threads())) % len(images)]
    runs = [partial(resident.run, images, probe.thresholds(net, i)) for i in range(net.num_exits + 1)]
    return tuple(seconds / len(images) for seconds in probe.seconds_on_cpu(runs, rounds=1))


def _faster(subject: Subject, resident: Engine, geometry: Any) -> Engine:
    """The faster of the resident and the compact engine, measured on images that all go to the final exit."""
    around = subject.device, subject.dtype, ops.instruction_set(), torch.get_num_threads()
    key = geometry, *around, libraries(subject.stages)
    compact: Engine | None = None
    try:
        if key not in hopeless and (key not in speeds or speeds[key].least[0] > speeds[key].least[1]):
            compact = _compact(replace(subject, rival=() if key in speeds else _rival(subject, resident)))
    except SlowerError as error:
        hopeless[key] = f"faster than the compact engine, of which {error}"
    except UnsupportedError as error:
        return _alone(subject, resident, f"the compact engine cannot run: {error}")
    if key in hopeless:
        return _because(resident, hopeless[key])
    if compact is not None and key not in speeds:
        subject.progress("comparing engines", 0, 1)
        speeds[key] = measure(subject, (resident, compact))
    known = speeds[key]
    chosen, number = (resident, 0) if known.least[0] <= known.least[1] else (compact, 1)
    assert chosen is not None
    return _because(chosen, known.sentence(("resident", "compact"), number) or "")


def _alone(subject: Subject, engine: Engine, reason: str) -> Engine:
    """The only engine that can run, for this reason, and how fast it is beside the network without exits."""
    if not probe.is_large(subject.net):
        told = measure(subject, (engine,), probe.ROUNDS).sentence((engine.plan.engine,), 0)
        engine = _because(engine, told) if told else engine
    return _because(engine, reason)


def _because(engine: Engine, reason: str) -> Engine:
    """The engine with the reason for which it was chosen, before all that its builder found out."""
    engine.plan = replace(engine.plan, reasons=(reason, *engine.plan.reasons))
    return engine


class _TooLargeError(UnsupportedError):
    def __init__(self, megabytes: float) -> None:
        what = f"weights of {megabytes:.0f} MB are more than what caches hold"
        super().__init__(f"{what}, so the resident engine was not tried")


def _refused(engine: str, obstacle: Exception, other: str) -> ValueError:
    return ValueError(f"engine={engine!r} cannot run: {obstacle}; use engine={other!r} or 'auto'")


@contextmanager
def _exceptions_as_obstacles() -> Iterator[None]:
    """Errors in arguments and settings, which are ValueErrors, come through."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # a first run raises whatever it does
        raise UnsupportedError(trial.brief(error)) from error


def _check_own(net: EarlyExitNet) -> None:
    if not computes_as(net, EarlyExitNet):
        raise ValueError(
            "the network itself has forward hooks or a forward of its own, which no engine calls; register hooks on "
            "what eefast.accelerate(net) returns, or put the computation into a module around it"
        )


def _check_classes(net: EarlyExitNet) -> None:
    for i, head in enumerate(net.heads):
        net.check_classes(i, getattr(getattr(head, "classifier", None), "out_features", net.num_classes))


def _check_quantized(net: EarlyExitNet, dtype: torch.dtype | None) -> None:
    if not is_quantized(net):
        return
    weight = next(net.parameters()).dtype
    if weight != torch.float32:
        raise ValueError(f"the heads of this quantised network are {weight}; use net.float(), its stages are integers")
    if dtype not in (None, torch.float32):
        raise ValueError(
            f"dtype={dtype}: a quantised network computes in integers, its images and logits are float32; leave dtype "
            "out, or accelerate the network that was quantised"
        )


@cache
def log_once(message: str) -> None:
    log.warning(message)
