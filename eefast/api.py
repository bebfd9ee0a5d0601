"""The front door: check a network, plan how it runs, wrap it in a module that does so."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .engines import RUN, compact, graphs
from .engines.streaming import Batch, copied, stream, stream_merging, stream_on_cuda
from .engines.weight_watch import WeightWatch
from .model import TRACED, EarlyExitNet, check_not_traced, is_property
from .modules.contexts import isolated
from .planning.planner import Plan
from .planning.planner import plan as make_plan
from .result import ExitResult
from .system import forked

_planning = RLock()
"""One plan is made at a time: plans measure speed, and a thread that waited for one of the same module then has it."""


def _no_planning_goes_on() -> None:
    global _planning
    _planning = RLock()


forked.in_child(_no_planning_goes_on)


class _Planned(NamedTuple):
    """A plan, what notices that it no longer holds, and one of the parameters."""

    plan: Plan
    watch: WeightWatch
    weight: Tensor


def accelerate(
    net: EarlyExitNet,
    *,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    example: Tensor | None = None,
    frozen: bool = False,
    max_batch: int = 256,
) -> Accelerated:
    """A module that gives the answers of `net.eval()`, faster.

    net: stays as it is; the new module shares its parameters, buffers and state_dict keys.
    engine: "auto" (the fastest that can run; falls back and logs once why), "resident", "compact" or "reference"; one
        asked for by name raises `ValueError` if it cannot run.
    dtype: of the stages, by default that of the parameters; exits are always decided in float32.
    example: images as `module` takes them, on which speed and rounding errors are measured; by default noise.
    frozen: a promise that weights, criterion, device and dtype stay as they are. To look for changes takes 30 µs per
        call for EENet-20 and 160 µs for EENet-110, which only single images feel.
    max_batch: images for which the compact engine captures CUDA graphs; larger batches run in pieces.

    `module(x)` takes images [N, C, H, W] of any N ≥ 0 and returns an `ExitResult`; `print(module.plan)` says what runs.
    Thresholds may change at any time. Changed weights, criterion, device or dtype are noticed and planned anew.
    `module.stream(batches)` answers many batches in turn, `module.warmup()` does what a first call would.
    """
    if max_batch < 1:
        raise ValueError(f"max_batch={max_batch} must be at least 1")
    if isinstance(net, Accelerated):
        net = net.net
    if not isinstance(net, EarlyExitNet):
        raise TypeError(
            f"net is a {type(net).__name__}; give an eefast.EarlyExitNet: of eefast.zoo, or eefast.attach(net, "
            "exits), which puts exits into a backbone"
        )
    return Accelerated(net, engine, dtype, example, frozen, max_batch)


class Accelerated(nn.Module):
    """An `EarlyExitNet` run by an engine; made by `accelerate`. Attributes it lacks are the network's."""

    net: EarlyExitNet

    def __init__(
        self,
        net: EarlyExitNet,
        engine: str,
        dtype: torch.dtype | None,
        example: Tensor | None,
        frozen: bool,
        max_batch: int,
    ) -> None:
        super().__init__()
        # Sharing the dictionaries, not only the tensors, makes this module the network itself for state_dict, .to(),
        # optimisers and buffer assignment.
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        self.__dict__.update({name: net.__dict__[name] for name in shared}, net=net)
        self.engine, self.dtype, self.frozen, self.max_batch = engine, dtype, frozen, max_batch
        self._example = None if example is None else net.prepare(example, dtype).detach()
        self._planned: _Planned | None = None
        _ = self.plan  # whatever cannot run is said here, not at the first image

    @property
    def plan(self) -> Plan:
        """How the network runs now; made anew where weights, criterion, device or dtype have changed."""
        return self._now().plan

    def _now(self) -> _Planned:
        planned = self._planned
        if planned is not None and self._holds(planned):
            return planned
        del planned
        forked.check()
        with _planning:
            planned = self._planned
            if planned is None or not self._holds(planned):
                # Graphs of an old plan would hold on to their memory while those of the new one are captured.
                planned = self._planned = None
                planned = self._planned = self._plan_anew()
            return planned

    def _holds(self, planned: _Planned) -> bool:
        if self.frozen:
            return True
        return not planned.watch.changed() and planned.plan.criterion == self.net.criterion.name

    @torch.no_grad()
    def _plan_anew(self) -> _Planned:
        wishes = self.engine, self.dtype, self._example, RUN, graphs.capture, self.max_batch
        # What another thread changes meanwhile must not go unnoticed; a network that changes as it runs always does.
        for _ in range(2):
            watch = WeightWatch(self.net.stages, self.net.heads)
            # What is made in inference mode or under autocast would serve other calls badly.
            with isolated(self.net.cost.device):
                plan = make_plan(self.net, *wishes)
            if not watch.changed():
                break
        else:
            watch = WeightWatch(self.net.stages, self.net.heads)
        return _Planned(plan, watch, next(self.net.parameters()).detach())

    @torch.no_grad()
    def forward(self, x: Tensor) -> ExitResult:
        batch = self._prepared(x)
        return RUN[batch.plan.engine](batch.plan, self.net, batch.images, batch.limits)

    def warmup(self) -> Plan:
        """Do now what the first call would do besides its own work, such as planning anew and loading kernels."""
        weight = next(self.net.parameters())
        for n in (1, 2):
            self(torch.zeros(n, *self.net.input_shape, dtype=weight.dtype, device=weight.device))
        return self.plan

    def stream(self, batches: Iterable[Tensor]) -> Iterator[ExitResult]:
        """The results of many batches, in their order, one by one.

        batches: images as the module takes them. A batch is what its tensor holds when the iterable hands it out, and
        is answered by the thresholds of that moment; its memory may be written to as soon as the next one is asked for.
        The resident engine reads a few batches ahead and keeps all threads, or the whole GPU, busy across the batches'
        borders. The compact engine lets survivors wait for those of up to four more batches, so that deep stages run on
        full batches; with new thresholds it starts again. The reference engine answers one batch after the other. An
        error in a batch, or in the iterable, comes after the results of all batches before it. Closing the iterator, or
        dropping it, waits for nothing: a piece of work of up to 16 images in each thread may still end afterwards.
        """
        plan = self.plan
        if plan.engine == "reference":
            return (self(x) for x in batches)
        if plan.engine == "compact":
            return torch.no_grad()(stream_merging)(batches, self._read, compact.chunk, self._merging)
        if plan.device.type == "cuda":
            return stream_on_cuda(batches, self._read, self._answer, plan.device)
        return stream(batches, self._read, self._answer)

    @torch.no_grad()
    def _read(self, x: Tensor) -> Batch:
        """A checked batch in memory that its source does not write to."""
        batch = self._prepared(x)
        if batch.images.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            return batch
        return batch._replace(images=copied(batch.images))

    @torch.no_grad()
    def _answer(self, batch: Batch) -> ExitResult:
        """Part of a batch of a stream, on the CPU on the calling thread alone."""
        plan, net, images, limits = batch.plan, self.net, batch.images, batch.limits
        if plan.engine == "resident":
            return RUN["resident"](plan, net, images, limits, threads=1)
        return RUN[plan.engine](plan, net, images, limits)

    def _merging(
        self, plan: Plan, chunks: Iterator[Tensor], size: int, limits: Tensor
    ) -> Generator[ExitResult, None, None]:
        """Chunks of a stream that began with the compact engine; another one may be planned on the way."""
        if plan.engine == "compact":
            return compact.stream(self.net, plan, chunks, size, limits)
        return (RUN[plan.engine](plan, self.net, x, limits) for x in chunks)

    def _prepared(self, x: Tensor) -> Batch:
        """Checked images, and by what they are to be answered."""
        check_not_traced()
        if self.training:
            raise RuntimeError(
                "an accelerated network answers in eval mode only; call .eval(), or train the net itself"
            )
        forked.check()
        while True:
            planned = self._now()
            plan, weight = planned.plan, planned.weight
            limits, since = self.net.limits()
            # Thresholds belong to a criterion, and another thread may change both.
            if self.frozen or plan.criterion == self.net.criterion.name:
                break
        if plan.program is not None and plan.program.normalization is not None:
            self.net.check_images(x, plan.dtype, weight)
        else:
            x = self.net.prepare(x, plan.dtype, weight)
        return Batch(plan, x, limits, since)

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The network's mode, set by `.train()` and `.eval()` of either module."""
        return self.net.training if "net" in self.__dict__ else False

    @training.setter
    def training(self, mode: bool) -> None:
        if "net" in self.__dict__:
            self.net.training = mode

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Accelerated:
        self.net._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "net" not in self.__dict__:
                raise
        # Not in the handler: the true error should not seem to follow from one that says nothing.
        return getattr(type(self), name).__get__(self) if is_property(self, name) else getattr(self.net, name)

    def __prepare_scriptable__(self) -> Accelerated:
        raise RuntimeError(TRACED)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_planned": None}

    def extra_repr(self) -> str:
        return f"engine={self.plan.engine!r}, {self.net.extra_repr()}"
