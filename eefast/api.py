"""The front door: check a network, plan how it runs, wrap it in a module that does so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .engines import RUN
from .model import EarlyExitNet
from .plan import Plan
from .plan import plan as make_plan
from .result import ExitResult
from .watch import WeightWatch


def accelerate(net: EarlyExitNet, *, engine: str = "auto", dtype: torch.dtype | None = None) -> Accelerated:
    """A module that gives the answers of `net.eval()`, faster.

    net: stays as it is; the new module shares its parameters, buffers and state_dict keys.
    engine: "auto" (the fastest that can run; falls back and logs once why), "compact" or "reference"; one asked for by
        name raises `ValueError` if it cannot run.
    dtype: of the stages, by default that of the parameters; exits are always decided in float32.

    `module(x)` takes images [N, C, H, W] of any N ≥ 0 and returns an `ExitResult`; `print(module.plan)` says what runs.
    Thresholds may change at any time. Changed weights, criterion, device or dtype are noticed and planned anew.
    """
    if isinstance(net, Accelerated):
        net = net.net
    if not isinstance(net, EarlyExitNet):
        raise TypeError(f"net is a {type(net).__name__}; give an eefast.EarlyExitNet, for instance of eefast.zoo")
    return Accelerated(net, engine, dtype)


class Accelerated(nn.Module):
    """An `EarlyExitNet` run by an engine; made by `accelerate`. Attributes it lacks are the network's."""

    net: EarlyExitNet

    def __init__(self, net: EarlyExitNet, engine: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        # Sharing the dictionaries, not only the tensors, makes this module the network itself for state_dict, .to(),
        # optimisers and buffer assignment.
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        self.__dict__.update({name: net.__dict__[name] for name in shared}, net=net)
        self.engine, self.dtype = engine, dtype
        self._plan: Plan | None = None
        self._watch: WeightWatch | None = None
        _ = self.plan  # whatever cannot run is said here, not at the first image

    @property
    def plan(self) -> Plan:
        """How the network runs now; made anew where weights, criterion, device or dtype have changed."""
        plan, watch = self._plan, self._watch
        if plan is None or watch is None or watch.changed() or plan.criterion != self.net.criterion.name:
            with torch.no_grad():
                plan = self._plan = make_plan(self.net, self.engine, self.dtype)
            self._watch = WeightWatch(self.net.stages, self.net.heads)
        return plan

    @torch.no_grad()
    def forward(self, x: Tensor) -> ExitResult:
        if self.training:
            raise RuntimeError(
                "an accelerated network answers in eval mode only; call .eval(), or train the net itself"
            )
        self.net.check_thresholds()
        plan = self.plan
        return RUN[plan.engine](plan, self.net, self.net.prepare(x, plan.dtype))

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
            return getattr(self.net, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None, "_watch": None}

    def extra_repr(self) -> str:
        return f"engine={self.plan.engine!r}, {self.net.extra_repr()}"
