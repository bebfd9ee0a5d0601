"""The front door: check a network, plan how it runs, wrap it in a module that does so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .engines import RUN, compact, graphs
from .model import TRACED, EarlyExitNet, check_not_traced, is_property
from .plan import Plan
from .plan import plan as make_plan
from .result import ExitResult
from .stream import Answer, stream, stream_merging, stream_on_cuda
from .twin import aside
from .watch import WeightWatch


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
            f"net is a {type(net).__name__}; give an eefast.EarlyExitNet: of eefast.zoo, or eefast.surgery.attach(net, "
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
        self._plan: Plan | None = None
        self._watch: WeightWatch | None = None
        self._weight: Tensor | None = None
        self._checked: tuple[Tensor, int] | None = None
        _ = self.plan  # whatever cannot run is said here, not at the first image

    @property
    def plan(self) -> Plan:
        """How the network runs now; made anew where weights, criterion, device or dtype have changed."""
        plan, watch = self._plan, self._watch
        if self.frozen and plan is not None:
            return plan
        if plan is None or watch is None or watch.changed() or plan.criterion != self.net.criterion.name:
            # What is made in inference mode or under autocast would serve other calls badly.
            with aside(self.net.cost.device):
                # Graphs of an old plan would hold on to their memory while those of the new one are captured.
                plan = self._plan = None
                wishes = self.engine, self.dtype, self._example, RUN, graphs.capture, self.max_batch
                plan = self._plan = make_plan(self.net, *wishes)
            self._watch = WeightWatch(self.net.stages, self.net.heads)
            self._weight = next(self.net.parameters()).detach()
        return plan

    @torch.no_grad()
    def forward(self, x: Tensor) -> ExitResult:
        plan, x = self._prepared(x)
        return RUN[plan.engine](plan, self.net, x)

    def warmup(self) -> Plan:
        """Do now what the first call would do besides its own work, such as planning anew and loading kernels."""
        weight = next(self.net.parameters())
        for n in (1, 2):
            self(torch.zeros(n, *self.net.input_shape, dtype=weight.dtype, device=weight.device))
        return self.plan

    def stream(self, batches: Iterable[Tensor]) -> Iterator[ExitResult]:
        """The results of many batches, in their order, one by one.

        batches: images as the module takes them. The resident engine reads a few batches ahead and keeps all threads,
        or the whole GPU, busy across the batches' borders. The compact engine lets survivors wait for those of up to
        four more batches, so that deep stages run on full batches. The reference engine answers one batch after the
        other. An error in a batch, or in the iterable, comes after the results of all batches before it.
        """
        plan = self.plan
        if plan.engine == "reference":
            return map(self, batches)
        if plan.engine == "compact":
            merged = partial(compact.stream, self.net)
            return torch.no_grad()(stream_merging)(batches, self._prepared, compact.chunk, merged)
        if plan.device.type == "cuda":
            return stream_on_cuda(batches, self, plan.device)

        def prepare(x: Tensor) -> tuple[Answer, Tensor]:
            with torch.no_grad():
                plan, x = self._prepared(x)
            return partial(RUN[plan.engine], plan, self.net, threads=1), x

        return stream(batches, prepare)

    def _prepared(self, x: Tensor) -> tuple[Plan, Tensor]:
        """The plan and checked images."""
        check_not_traced()
        if self.training:
            raise RuntimeError(
                "an accelerated network answers in eval mode only; call .eval(), or train the net itself"
            )
        self._check_thresholds()
        plan = self.plan
        if plan.program is not None and plan.program.normalization is not None:
            self.net.check_images(x, plan.dtype, self._weight)
            return plan, x
        return plan, self.net.prepare(x, plan.dtype, self._weight)

    def _check_thresholds(self) -> None:
        """On a GPU only where they have changed: to look at them there waits for all work before."""
        thresholds = self.net.thresholds
        known = self._checked
        if known is not None and known[0] is thresholds and known[1] == thresholds._version:
            return
        self.net.check_thresholds()
        if thresholds.is_cuda:
            self._checked = thresholds, thresholds._version

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
        return {**self.__dict__, "_plan": None, "_watch": None, "_weight": None, "_checked": None}

    def extra_repr(self) -> str:
        return f"engine={self.plan.engine!r}, {self.net.extra_repr()}"
