"""The engines: functions that run a plan on a batch; all of them give the same answers."""

from collections.abc import Callable

from ..result import ExitResult
from . import compact, reference, resident

RUN: dict[str, Callable[..., ExitResult]] = {
    "compact": compact.run,
    "reference": reference.run,
    "resident": resident.run,
}

__all__ = ["RUN"]
