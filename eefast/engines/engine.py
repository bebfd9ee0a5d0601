"""What every engine does: images → prepared images → their answers, for one batch or a stream of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import criteria
from ..model import EarlyExitNet
from ..result import ExitResult
from .parts import Before, Part
from .program import Plan

Rule = Tensor | criteria.Step | None
"""Of a call, see `EarlyExitNet.current_rule`."""


class Batch(NamedTuple):
    """A batch of a stream.

    images: prepared, [N, C, H, W], in memory that nothing else writes to. thresholds: [n] or [n, N] float32, by which
    they are answered, see `eefast.profiles`; since: the same object for as long as batches may run together. rule: of
    `EarlyExitNet.current_rule`, the same object for as long as they may, too.
    """

    images: Tensor
    thresholds: Tensor
    since: object
    rule: Rule = None


class Engine(Protocol):
    """Runs a network as its plan says; of any number of threads at a time.

    net: that it runs. plan: describes how. criterion: the plan's. survives_fork: whether it runs in a process that was
    forked after planning. copies_images: whether stages run on a copy of the images, since the first one writes over
    what it gets.
    """

    net: EarlyExitNet
    plan: Plan
    criterion: criteria.Criterion
    copies_images: bool

    @property
    def survives_fork(self) -> bool: ...

    def prepare(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] as the network takes them → checked, as `run` takes them.

        Raises `TypeError` or `ValueError` as `EarlyExitNet.check_images`.
        """

    def run(self, images: Tensor, thresholds: Tensor, rule: Rule = None) -> ExitResult:
        """The answers to prepared images [N, C, H, W], N ≥ 0.

        thresholds: [n] or [n, N] float32, those of this one call, see `eefast.profiles`. rule: likewise, of
        `EarlyExitNet.current_rule`; None: that of the network now, if its criterion carries.
        """

    def stream(self, batches: Iterable[Batch]) -> Iterator[ExitResult]:
        """The answers to batches, in their order, see `Accelerated.stream`."""

    def part(
        self, x: Tensor, thresholds: Tensor, first: int, last: int, rule: Rule = None, before: Before | None = None
    ) -> Part:
        """Stages first … last with their exits.

        x: prepared images where `first` is 0, else features before stage `first`, as `Part` has them.
        thresholds: [n] or [n, N] float32, of all early exits. rule: where the criterion carries, of all exits.
        before: what exit `first` - 1 said, for a rule. Raises `ValueError` where the engine cannot stop there.
        """

    def arithmetic(self) -> dict[str, str]:
        """What the answers' bits depend on besides weights and images."""


class PlannedEngine:
    """What the engines share: a network, its plan, and the check of images.

    weight: one of the network's parameters, whose dtype and device images are held to; looking for it takes time.
    criterion: the plan's.
    """

    def __init__(self, net: EarlyExitNet, plan: Plan) -> None:
        self.net, self.plan, self.copies_images = net, plan, False
        self.weight = next(net.parameters()).detach()
        self._rows = net.rows_as_maps
        self._taken: tuple[torch.Size, torch.dtype, torch.device] | None = None
        # Another thread may have changed it since.
        self.criterion = net.criterion if net.criterion.name == plan.criterion else criteria.get(plan.criterion)

    @property
    def survives_fork(self) -> bool:
        return True

    def arithmetic(self) -> dict[str, str]:
        plan = self.plan
        dtype = str(plan.dtype).removeprefix("torch.")
        return {"engine": plan.engine, "device": plan.device.type, "dtype": dtype}

    def prepare(self, x: Tensor) -> Tensor:
        """Images of the shape, dtype and device of those before are not checked again: that takes 2 to 40 µs."""
        known = self._taken
        if known is not None and type(x) is Tensor and (x.shape, x.dtype, x.device) == known:
            return x.unsqueeze(2) if self._rows else x
        prepared = self.prepared(x)
        unchanged = prepared is x or self._rows
        as_they_are = unchanged and type(x) is Tensor and x.dtype in (self.weight.dtype, self.plan.dtype)
        if as_they_are and not self.net.looks_at_pixels(x):
            self._taken = x.shape, x.dtype, x.device
        return prepared

    def prepared(self, x: Tensor) -> Tensor:
        """As `prepare`, checking them one by one."""
        return self.net.prepare(x, self.plan.dtype, self.weight)

    def own(self, images: Tensor) -> Tensor:
        """Images in the plan's dtype, which a stage may write over."""
        own = images.to(self.plan.dtype)
        return own.clone() if self.copies_images and own is images else own

    def rule_of(self, rule: Rule) -> Rule:
        """The rule of a call: the one given, else that of the network now, None where the plan's criterion has none."""
        if not self.criterion.carries:
            return None
        return self.net.current_rule() if rule is None else rule
