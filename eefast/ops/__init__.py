"""The package's PyTorch ops: schema, reference, fake and FLOP formula each; C++ and Triton stand behind them."""

from .compact import compact
from .exit_conv_head import exit_conv_head
from .exit_head import MAX_CLASSES_ON_CUDA, exit_head
from .flops import register_flops
from .indexed_conv import indexed_conv
from .library import TRITON_MISSING, exit_kernels, implement_twins, load_cpp
from .resident_forward import (
    Kind,
    cuda_missing,
    instruction_set,
    resident_forward,
    resident_network,
    resident_shared_memory,
)

CPP_MISSING = load_cpp()
"""None where the C++ kernels are loaded, else the reason why the references run instead."""

implement_twins()

CUDA_MISSING = CPP_MISSING or cuda_missing()
"""None where the CUDA kernels are loaded, else the reason why not."""

__all__ = [
    "CPP_MISSING",
    "CUDA_MISSING",
    "MAX_CLASSES_ON_CUDA",
    "TRITON_MISSING",
    "Kind",
    "compact",
    "exit_conv_head",
    "exit_head",
    "exit_kernels",
    "indexed_conv",
    "instruction_set",
    "register_flops",
    "resident_forward",
    "resident_network",
    "resident_shared_memory",
]
