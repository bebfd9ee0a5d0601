"""Images or survivors → the answers so far and the survivors of a later exit, by the parts that an engine runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import fingerprints
from ..model import EarlyExitNet
from ..result import ExitResult
from ..survivors import Partial, Survivors
from ..version import __version__
from .engine import Engine, Rule
from .parts import Before, Part
from .resident import ResidentEngine


class Identity(NamedTuple):
    """Of a network, see `fingerprints`; channels: of the features after every stage."""

    structure: str
    weights: str
    num_exits: int
    num_classes: int
    channels: tuple[int, ...]


def identity(net: EarlyExitNet) -> Identity:
    channels = tuple(cost.feature_shape[0] for cost in net.stage_costs)
    return Identity(fingerprints.structure(net), fingerprints.weights(net), net.num_exits, net.num_classes, channels)


def begin(engine: Engine, of: Identity, images: Tensor, limits: Tensor, rule: Rule, exit_index: int) -> Partial:
    """Prepared images → a run that stops after the early exit `exit_index`; limits: [n] or [n, N] float32.

    rule: of `EarlyExitNet.current_rule`.
    """
    part = engine.part(images, limits, 0, exit_index, rule)
    kept = {
        "size": len(images),
        "criterion": engine.plan.criterion,
        "structure": of.structure,
        "weights": of.weights,
        "version": __version__,
        "arithmetic": engine.arithmetic(),
        "rule": rule if isinstance(rule, Tensor) else None,
    }
    return _stopped(part, limits, None, exit_index, kept)


def go_on(engine: Engine, of: Identity, survivors: Survivors, exit_index: int, elsewhere: bool) -> Partial:
    """Survivors → a run that stops after a later early exit; see `Accelerated.until`."""
    engine, survivors = _checked(engine, of, survivors, elsewhere)
    part = _part(engine, survivors, exit_index)
    names = ("size", "criterion", "structure", "weights", "version", "arithmetic", "error", "rule")
    kept = {name: getattr(survivors, name) for name in names}
    return _stopped(part, survivors.limits, survivors.positions, exit_index, kept)


def finish(engine: Engine, of: Identity, survivors: Survivors, elsewhere: bool) -> ExitResult:
    """Survivors → their answers; see `Accelerated.resume`."""
    engine, survivors = _checked(engine, of, survivors, elsewhere)
    return _part(engine, survivors, of.num_exits).result


def _part(engine: Engine, survivors: Survivors, last: int) -> Part:
    rule: Rule = survivors.rule
    if engine.net.criterion.carries and rule is None:
        rule = engine.net.criterion.step
    before = None if rule is None else Before(survivors.logits, survivors.confidence)
    features = survivors.features
    if not isinstance(engine, ResidentEngine):
        features = features.clone()  # a stage may write over its input
    return engine.part(features, survivors.limits, survivors.exit_index + 1, last, rule, before)


def _stopped(part: Part, limits: Tensor, positions: Tensor | None, exit_index: int, kept: dict[str, Any]) -> Partial:
    """positions: of the samples that the part ran on, None for 0, 1, 2 …; kept: what survivors keep of the run."""
    result = part.result
    assert part.rows is not None
    assert part.places is not None
    assert part.features is not None
    rows = part.rows
    exited = torch.ones(len(result.logits), dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)
    survivors = Survivors(
        features=_taken(part.features, part.places),
        positions=rows if positions is None else positions[rows],
        exit_index=exit_index,
        logits=result.logits.index_select(0, rows),
        confidence=result.confidence.index_select(0, rows),
        limits=limits if limits.dim() == 1 else limits[:, rows],
        **kept,
    )
    return Partial(result, exited, survivors)


def _taken(features: Tensor, places: list[int]) -> Tensor:
    """Rows of features, in their layout; without a copy where they come first and do not keep far more memory."""
    if 8 * len(places) > len(features) and places == [*range(len(places))]:
        return features[: len(places)]
    rows = torch.tensor(places, dtype=torch.int64, device=features.device)
    if features.is_contiguous(memory_format=torch.channels_last):
        return features.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return features.index_select(0, rows)


def _checked(engine: Engine, of: Identity, survivors: Survivors, elsewhere: bool) -> tuple[Engine, Survivors]:
    """The engine that computes as the survivors' one did, and the survivors on its device; else `ValueError`."""
    names = {
        "version": __version__,
        "structure": of.structure,
        "weights": of.weights,
        "criterion": engine.plan.criterion,
    }
    meanings = {
        "version": "eefast {}, this is {}: finish the run with the version that began it",
        "structure": "a network built otherwise (hash {}, this one {}): load the network that began the run",
        "weights": "the same network with other weights (hash {}, these {}): load the weights that began the run",
        "criterion": "the exit rule {!r}, the network has {!r} now: set it back with net.with_criterion",
    }
    for name, own in names.items():
        if (given := getattr(survivors, name)) != own:
            raise ValueError(f"survivors come from {meanings[name].format(given, own)}")
    shapes = survivors.limits.shape[0], survivors.logits.shape[1], survivors.features.shape[1]
    wanted = of.num_exits, of.num_classes, of.channels[survivors.exit_index] if len(survivors) else shapes[2]
    if shapes != wanted:
        raise ValueError(f"survivors have {shapes} exits, classes and channels, this network {wanted} at that exit")
    if (survivors.rule is not None) != (engine.net.criterion.carries and engine.net.criterion.step is None):
        raise ValueError(f"survivors have the exit rule {survivors.criterion!r} and no table of it, or one too many")
    mine, theirs = engine.arithmetic(), dict(survivors.arithmetic)
    if mine != theirs and isinstance(engine, ResidentEngine):
        engine = engine.with_arithmetic(theirs)
        mine = engine.arithmetic()
    if mine != theirs and not elsewhere:
        different = ", ".join(
            f"{name}={theirs.get(name)} instead of {mine.get(name)}"
            for name in dict.fromkeys([*theirs, *mine])
            if theirs.get(name) != mine.get(name)
        )
        raise ValueError(
            f"survivors were computed with {different}, which rounds otherwise; accelerate the network alike, or "
            "accept that answers near thresholds may change: resume(survivors, elsewhere=True)"
        )
    here = survivors.features.device == engine.plan.device
    return engine, survivors if here else survivors.to(engine.plan.device)
