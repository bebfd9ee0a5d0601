"""eefast: early-exit networks that answer a whole batch as fast as the arithmetic they save."""

import sys

if sys.argv[:1] == ["-m"] and "eefast" in sys.orig_argv:
    # `python -m eefast …` imports this file, and PyTorch with it, before its entry point is called.
    from eefast_command import end_on_signals

    end_on_signals()

from . import criteria, online, rules, serving, zoo
from .api import Accelerated, accelerate
from .checkpoint.loading import load
from .exporting.formats import export
from .model import EarlyExitNet
from .preprocessing import Preprocessing
from .profiles import Profile, Profiles
from .quantization.post_training import quantize
from .result import ExitOutput, ExitResult
from .scoring.calls import predict, score
from .surgery import attach
from .survivors import Partial, Survivors
from .version import __version__

__all__ = [
    "Accelerated",
    "EarlyExitNet",
    "ExitOutput",
    "ExitResult",
    "Partial",
    "Preprocessing",
    "Profile",
    "Profiles",
    "Survivors",
    "__version__",
    "accelerate",
    "attach",
    "criteria",
    "export",
    "load",
    "online",
    "predict",
    "quantize",
    "rules",
    "score",
    "serving",
    "zoo",
]
