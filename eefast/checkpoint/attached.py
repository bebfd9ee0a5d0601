"""Weights of unknown origin → the backbone of torchvision or timm with exits that they are claimed to be of.

The backbone is built and cut without memory for its weights, so that shapes are compared before there is any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..model import EarlyExitNet
from ..surgery.attachment import rebuild
from ..surgery.backbones import backbone
from . import CONFIG_FILE, WEIGHTS_FILE
from .building import put
from .fields import check_channels
from .stored import quoted


def build_attached(config: Mapping[str, Any], weights: dict[str, Tensor], size: int) -> EarlyExitNet:
    """The backbone called `config["backbone"]` with exits and `weights`, in eval mode.

    config: also the arguments of `eefast.attach`, checked.
    size: bytes of the file that the weights come from; nothing larger is built or copied.
    Raises `ValueError` for a backbone that is unknown, or that the weights do not fit; `ImportError` without timm.
    """
    name, exits = config["backbone"], config["exits"]
    theirs = {_unjoined(key, config): value for key, value in weights.items()}
    net, made = empty_network(config, lambda empty: _check_against(theirs, size, empty, name, len(exits)))
    put(net, weights, size, name)
    fill(net, made)
    net.check_thresholds()
    return net.eval()


def empty_network(
    config: Mapping[str, Any], check: Callable[[nn.Module], None] = lambda empty: None
) -> tuple[EarlyExitNet, Callable[[], nn.Module]]:
    """The network without memory for its weights, and what makes its backbone with some.

    check: looks at the backbone before it is cut.
    """
    check_channels(config["normalization"], config["input_shape"])
    arguments = {**config}
    name, exits = arguments.pop("backbone"), arguments.pop("exits")

    def made() -> nn.Module:
        return backbone(name, config["num_classes"], config["input_shape"][0]).eval()

    with _Shapes():
        empty = made()
    check(empty)
    return rebuild(empty, exits, **arguments), made


def _check_against(weights: dict[str, Tensor], size: int, empty: nn.Module, name: str, exits: int) -> None:
    """`ValueError` where `weights` cannot be those of the backbone `empty` with this number of exits, before it is cut.

    Its last linear, and what its logits do not depend on, have other names or none in a network with exits; the rest
    must be there.
    """
    theirs = empty.state_dict()
    found = {key.split(".", 2)[2]: value for key, value in weights.items() if re.match(r"stages\.\d+\.", key)}
    for key, value in found.items():
        if key in theirs and value.shape != theirs[key].shape:
            has, needs = (tuple(t.shape) for t in (value, theirs[key]))
            raise ValueError(f"{quoted(key)} is {has} in {WEIGHTS_FILE}, but {name} needs {needs}")
    if sum(value.numel() * value.element_size() for key, value in theirs.items() if key not in found) > size:
        missing = ", ".join(sorted(theirs.keys() - found.keys())[:4])
        raise ValueError(f"{WEIGHTS_FILE} has no weights of {name}, or of another number of classes: {missing} …")
    for i in range(exits + 1):
        if f"heads.{i}.classifier.weight" not in weights:
            raise ValueError(f"{CONFIG_FILE} says {exits} exits, but {WEIGHTS_FILE} has no weights of heads.{i}")


def _unjoined(name: str, config: Mapping[str, Any]) -> str:
    """The name of a weight as it is where no features are carried, see `eefast.carrying.JoinedStage`."""
    last = f"stages.{len(config.get('exits', ()))}."
    return name.replace(f"{last}stage.", last, 1) if "carry" in config and name.startswith(f"{last}stage.") else name


class _Shapes(TorchFunctionMode):
    """Parameters made inside have shapes, but no memory; the numbers that sizes are computed from are there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class _Unset(TorchFunctionMode):
    """Parameters made inside are not filled with random numbers, which takes long and would be overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_", "erfinv_", "kaiming_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def fill(net: EarlyExitNet, made: Callable[[], nn.Module]) -> None:
    """Give `net` the tables that its backbone computes and does not save, such as the positions in a window."""
    empty = [name for name, value in net.named_buffers() if value.is_meta]
    if not empty:
        return
    with torch.random.fork_rng(devices=[]), _Unset():
        whole = made()
    dtype = next(net.parameters()).dtype
    for name in empty:
        path, _, last = name.rpartition(".")
        value = whole.get_buffer(re.sub(r"^stages\.\d+\.(graph\.0\.)?", "", _unjoined(name, net.config or {})))
        net.get_submodule(path)._buffers[last] = value.to(dtype) if value.is_floating_point() else value
