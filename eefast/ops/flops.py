"""FLOP formulas of the ops for torch's FLOP counter."""

from __future__ import annotations

from functools import cache

import torch

from .exit_conv_head import flops as exit_conv_head_flops
from .exit_head import flops as exit_head_flops
from .indexed_conv import flops as indexed_conv_flops


@cache
def register_flops() -> None:
    """Not done on import, since the counter imports triton."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.eefast.exit_head)(exit_head_flops)
    register_flop_formula(torch.ops.eefast.exit_conv_head)(exit_conv_head_flops)
    register_flop_formula(torch.ops.eefast.indexed_conv)(indexed_conv_flops)
