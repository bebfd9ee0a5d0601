"""An engine that runs stage by stage → a function per stage: features and limits of some rows → which of them exit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import criteria
from ..engines import CompactEngine, Engine, ReferenceEngine
from ..engines.stores import Results, exit_at


class StageResult(NamedTuple):
    """features: [N, C, H, W] after the stage. logits: [N, K], confidence: [N] float32, valid for rows that exit.

    survivors: numbers of the rows that do not exit, ascending.
    """

    features: Tensor
    logits: Tensor
    confidence: Tensor
    survivors: list[int]


StageCall = Callable[[Tensor, Tensor], StageResult]
"""(features [N, C, H, W] before a stage, limits [N] at its exit, of any values at the final exit) → its result."""


def stage_calls(engine: Engine) -> list[StageCall] | None:
    """One per exit, 0 … n; None for an engine that carries images to their exits in one call.

    None also where the exit rule carries the answer so far, which these functions do not hand on.
    """
    if engine.criterion.carries:
        return None
    if isinstance(engine, CompactEngine):
        return [partial(_compact, engine, i) for i in range(len(engine.steps))]
    if isinstance(engine, ReferenceEngine):
        return [partial(_reference, engine, i) for i in range(len(engine.net.stages))]
    return None


def _compact(engine: CompactEngine, i: int, features: Tensor, limits: Tensor) -> StageResult:
    step, n = engine.steps[i], len(features)
    features = features.to(engine.plan.dtype) if i else engine.own(features)
    features, seen = step.run(features.contiguous(memory_format=step.layout))
    results = Results.empty(n, engine.net)
    order = torch.arange(n, dtype=torch.int32, device=features.device)
    count = torch.full((1,), n, dtype=torch.int32, device=features.device)
    threshold = limits if i < len(engine.steps) - 1 else None
    rows, _, live = exit_at(step, i, engine.plan.criterion, threshold, seen, (order, order, count), results)
    return StageResult(features, results.logits, results.confidence, rows[: int(live)].tolist())


def _reference(engine: ReferenceEngine, i: int, features: Tensor, limits: Tensor) -> StageResult:
    net, rule = engine.net, criteria.get(engine.plan.criterion)
    features = net.stages[i](features if i else engine.own(features))
    out = net.heads[i](features)
    net.check_classes(i, out.logits.shape[1])
    confidence = rule.confidence(out.logits, out.confidence_logit)
    exits = criteria.exits_by(rule, confidence, limits) if i < net.num_exits else torch.ones_like(confidence).bool()
    return StageResult(features, out.logits.float(), confidence, (~exits).nonzero()[:, 0].tolist())
