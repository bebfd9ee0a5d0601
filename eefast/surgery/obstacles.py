"""A backbone and names of exits → `ValueError` with the way out, before any work, where they cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..modules.copies import special_kind


def check_backbone(backbone: nn.Module) -> None:
    """`ValueError` for a backbone that cannot be cut, with the way out."""
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"backbone is a {type(backbone).__name__}; give an nn.Module that maps images to logits [N, K]"
        )
    for name, m in backbone.named_modules():
        where = f"backbone.{name}" if name else "the backbone"
        kinds = {kind.__name__ for kind in type(m).__mro__}
        if isinstance(m, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a ScriptModule, which cannot be cut; give the module that it was made from")
        if kinds & {"EarlyExitNet", "Accelerated"}:
            raise ValueError(f"{where} has exits already ({type(m).__name__}); give one without, such as net.plain()")
        if kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(f"{where} is a {type(m).__name__}; attach exits to its module first, then wrap the result")
        if ".quantized" in type(m).__module__:
            raise ValueError(f"{where} is a quantized {type(m).__name__}; attach exits first, then quantize the result")
        for key, t in chain(m.named_parameters(recurse=False), m.named_buffers(recurse=False)):
            why = _obstacle(t)
            if why:
                raise ValueError(f"{'.'.join(filter(None, ('backbone', name, key)))} {why}")


def _obstacle(t: Tensor) -> str:
    if is_lazy(t):
        return "has no shape yet; run the backbone on one image first"
    special = special_kind(t)
    if special:
        return f"is a {special}; attach exits to the backbone with plain tensors first"
    if t.is_meta:
        return "is on the meta device, without values; give it some, by .to_empty(device=...) and load_state_dict"
    if t.is_quantized:
        return "is quantized; attach exits first, then quantize the result"
    if t.layout != torch.strided:
        return f"has layout {t.layout}; make it dense by .to_dense()"
    return ""


def check_names(backbone: nn.Module, exits: Sequence[str]) -> list[str]:
    """The name of each exit in `backbone.named_modules()`, also where a module has several; `ValueError` for others."""
    if isinstance(exits, str):
        raise ValueError(f"exits={exits!r} must be a list of names: exits=[{exits!r}]")
    listed = {m: name for name, m in backbone.named_modules()}
    modules = {name: m for name, m in backbone.named_modules(remove_duplicate=False) if name}
    for name in exits:
        if name not in modules:
            inside = [other for other in modules if other.endswith(f".{name}")]
            close = " or ".join(map(repr, (inside or get_close_matches(name, modules))[:3]))
            close = close or "one of backbone.named_modules()"
            raise ValueError(f"exits={list(exits)}: the backbone has no module {name!r}; take {close}")
    return [listed[modules[name]] for name in exits]
