"""eefast: early-exit networks that answer a whole batch as fast as the arithmetic they save."""

from . import criteria, zoo
from .api import Accelerated, accelerate
from .checkpoint import load
from .model import EarlyExitNet
from .result import ExitOutput, ExitResult
from .version import __version__

__all__ = [
    "Accelerated",
    "EarlyExitNet",
    "ExitOutput",
    "ExitResult",
    "__version__",
    "accelerate",
    "criteria",
    "load",
    "zoo",
]
