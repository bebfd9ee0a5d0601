"""Networks by name: the EENets of the paper, and the plain ResNets without exits."""

from typing import Any

from ..deprecated import warn
from .eenets import eenet, names
from .placement import SCHEMES
from .resnets import resnet

__all__ = ["eenet", "names", "resnet"]


def __getattr__(name: str) -> Any:
    if name == "NAMES":
        warn("eefast.zoo.NAMES", "eefast.zoo.names()", 2)
        return tuple(names())
    if name == "PLACEMENTS":
        warn("eefast.zoo.PLACEMENTS", "the names themselves, such as placement='fine'", 2)
        return SCHEMES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
