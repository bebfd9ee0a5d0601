"""The package's PyTorch ops: schema, reference, fake and FLOP formula each; C++ and Triton stand behind them."""

from .exit_head import exit_head, register_flops
from .library import load_cpp

CPP_MISSING = load_cpp()
"""None where the C++ kernels are loaded, else the reason why the references run instead."""

__all__ = ["CPP_MISSING", "exit_head", "register_flops"]
