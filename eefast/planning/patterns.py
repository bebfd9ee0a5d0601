"""Node of a stage's graph → what it computes, however it is spelled: an addition, a ReLU, nothing; in place or not."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..ops import Activation

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MULTIPLICATIONS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_MEANS = (torch.mean, "mean")
_FLATTENS = (torch.flatten, "flatten", "reshape", "view", torch.reshape)
_RELUS = (torch.relu, torch.relu_, F.relu, "relu", "relu_")
_ACTIVATIONS: dict[Activation, tuple[Any, ...]] = {
    Activation.RELU: (nn.ReLU, *_RELUS),
    Activation.RELU6: (nn.ReLU6, F.relu6),
    Activation.SILU: (nn.SiLU, F.silu),
    Activation.HARDSWISH: (nn.Hardswish, F.hardswish),
    Activation.HARDSIGMOID: (nn.Hardsigmoid, F.hardsigmoid),
    Activation.SIGMOID: (nn.Sigmoid, F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"),
    Activation.GELU: (nn.GELU, F.gelu),
}
_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


def computes_as(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a module computes exactly what one of `kinds` does: no other forward in its class or itself, no hooks."""
    if not isinstance(module, kinds) or module._forward_hooks or module._forward_pre_hooks:
        return False
    names = "forward", "_conv_forward", "__call__"
    if any(name in module.__dict__ for name in names):
        return False
    return any(
        isinstance(module, kind)
        and all(getattr(type(module), name, None) is getattr(kind, name, None) for name in names)
        for kind in kinds
    )


def called(module: fx.GraphModule, node: fx.Node) -> Any:
    """The submodule, the function or the name of the method that a node calls; None for inputs, outputs, attributes."""
    if node.op == "call_module":
        return module.get_submodule(cast(str, node.target))
    return node.target if node.op in ("call_function", "call_method") else None


def describe(module: fx.GraphModule, node: fx.Node) -> str:
    """What a node calls or reads, for error texts."""
    found = called(module, node)
    if isinstance(found, nn.Module | str):
        return str(found)
    return getattr(found, "__name__", str(node.target))


def path_of(node: fx.Node) -> str:
    """The module that a node calls or is called in, by its path below the module that `fold_stage` was given."""
    stack = list(node.meta.get("nn_module_stack") or {})
    path = str(node.target) if node.op == "call_module" else str(stack[-1]) if stack else ""
    return path.partition(".")[2]  # `fold_stage` traces it inside of an nn.Sequential


def is_addition(called: Any) -> bool:
    return called in _ADDITIONS


def is_relu(called: Any) -> bool:
    return computes_as(called, nn.ReLU) or called in _RELUS


def activation_of(called: Any) -> Activation | None:
    """The activation that a call computes, None where it computes something else."""
    for activation, spelled in _ACTIVATIONS.items():
        modules = tuple(s for s in spelled if isinstance(s, type))
        if called in spelled or computes_as(called, *modules):
            return None if getattr(called, "approximate", "none") != "none" else activation
    return None


def is_multiplication(called: Any) -> bool:
    return called in _MULTIPLICATIONS


def is_join(called: Any) -> bool:
    """Whether a call concatenates a list of maps."""
    return called in _JOINS


def is_flattening(called: Any) -> bool:
    """Whether a call only gives its input another shape."""
    return called in _FLATTENS or computes_as(called, nn.Flatten)


def is_switched_off(called: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a call of torchvision's stochastic depth is told that it does not train, and returns its input."""
    names = dict(zip(("p", "mode", "training"), arguments, strict=False)) | named
    return getattr(called, "__name__", "") == "stochastic_depth" and names.get("training", True) is False


def is_mean(called: Any, arguments: dict[str, Any]) -> bool:
    """Whether a call averages a map over all of its pixels; arguments: those after the map, by name."""
    if computes_as(called, nn.AdaptiveAvgPool2d):
        return called.output_size in (1, (1, 1))
    if called is F.adaptive_avg_pool2d:
        return arguments.get("output_size") in (1, (1, 1), [1, 1])
    axes = arguments.get("dim")
    if called not in _MEANS or not isinstance(axes, tuple | list) or not all(isinstance(a, int) for a in axes):
        return False
    return sorted(a % 4 for a in axes) == [2, 3]


def is_identity(called: Any) -> bool:
    """Whether a module in eval mode returns its input."""
    return computes_as(called, nn.Identity, nn.Dropout, nn.Dropout2d)


def writes_in_place(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change its first argument, or what `out` names."""
    found = called(module, node)
    if found is None or isinstance(found, nn.Module):
        return bool(getattr(found, "inplace", False))
    asked = "out" in node.kwargs or node.kwargs.get("inplace", any(a is True for a in node.args))
    name = found if isinstance(found, str) else getattr(found, "__name__", "")
    return bool(asked) or found in _IN_PLACE_OPERATORS or name.endswith("_")
