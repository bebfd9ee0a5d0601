"""Module → a copy for inference, which shares nothing with it; weights that were computed at every call are fixed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..modules.tree_copy import TreeCopy


def inference_copy(module: nn.Module, evaluating: bool = True) -> nn.Module:
    """A copy that computes what `module` does and shares no tensor with it.

    evaluating: in eval mode; else every module keeps its flag.
    Weights that `weight_norm`, `spectral_norm`, `prune` or `parametrize` compute at every call are computed once.
    """

    def copy_tensor(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied

    with torch.inference_mode(False), torch.no_grad():
        copied = TreeCopy(module, copy_tensor).of(module)
        copied = copied.eval() if evaluating else copied
        for part in list(copied.modules()):
            _fix_computed_weights(part)
    return copied


def _fix_computed_weights(module: nn.Module) -> None:
    """Replace weights that are computed at every call by their values."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if is_computing_hook(hook):
            hook(module, ())
            del module._forward_pre_hooks[key]
            name: str = hook._tensor_name if isinstance(hook, BasePruningMethod) else cast(Any, hook).name
            module.register_parameter(name, nn.Parameter(module.__dict__.pop(name).detach(), requires_grad=False))
    if parametrize.is_parametrized(module):
        lists = cast(nn.ModuleDict, module.parametrizations)
        values = {name: (getattr(module, name).detach().clone(), list(p.parameters())) for name, p in lists.items()}
        # `remove_parametrizations` would change the class, which the original shares.
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
        for name, (value, parameters) in values.items():
            if parameters:
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                module.register_buffer(name, value)


def is_computing_hook(hook: Any) -> bool:
    """Whether a forward-pre-hook only computes a weight from parameters, as PyTorch's normalisations do."""
    return isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod)


def plain_norms(module: nn.Module) -> nn.Module:
    """A copy for inference in which timm's BatchNorm with an activation is PyTorch's, followed by the activation.

    Its own code asks for shapes, which no graph of layers has.
    """
    copied = nn.Sequential(inference_copy(module))
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ != "BatchNormAct2d" or not isinstance(child, nn.BatchNorm2d):
                continue
            norm = nn.BatchNorm2d(child.num_features, child.eps, affine=child.affine, device="meta")
            norm.__dict__.update({k: v for k, v in child.__dict__.items() if k != "_modules"})
            children: dict[str, Any] = {"norm": norm, **dict(child.named_children())}
            setattr(parent, name, nn.Sequential(OrderedDict(children)).eval())
    return cast(nn.Module, copied[0])


def channels_last(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same module in `dtype`, its weights of four dimensions channels-last."""
    for tensor in module.to(dtype).parameters():
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module
