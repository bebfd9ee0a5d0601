"""The ops that the engines call: each with schema, reference, fake and FLOP formula; C++ and Triton run them."""

from . import exit_conv_head, exit_head, gather_survivors, indexed_conv, resident_forward, resident_int8
from .exit_head import MAX_CLASSES_ON_CUDA
from .flops import register_flops
from .library import CPP_MISSING
from .on_cuda import TRITON_MISSING, exit_kernels
from .resident_forward import cuda_missing, instruction_set, resident_network, resident_shared_memory
from .resident_int8 import int8_instruction_set
from .resident_steps import Activation, Kind

CUDA_MISSING = CPP_MISSING or cuda_missing()
"""None where the CUDA kernels are loaded, else the reason why not."""

__all__ = [
    "CPP_MISSING",
    "CUDA_MISSING",
    "MAX_CLASSES_ON_CUDA",
    "TRITON_MISSING",
    "Activation",
    "Kind",
    "exit_conv_head",
    "exit_head",
    "exit_kernels",
    "gather_survivors",
    "indexed_conv",
    "instruction_set",
    "int8_instruction_set",
    "register_flops",
    "resident_forward",
    "resident_int8",
    "resident_network",
    "resident_shared_memory",
]
