"""Node of a stage's graph → what it computes, however it is spelled: an addition, a ReLU, nothing; in place or not."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (torch.relu, torch.relu_, F.relu, "relu", "relu_")
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
