"""Weights of unknown origin → the network they are claimed to be of: compared before there is memory for it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .. import zoo
from ..model import EarlyExitNet
from .fields import check_channels
from .stored import FLOATS, check_finite, quoted


def build(config: Mapping[str, Any], weights: Mapping[str, Tensor], size: int) -> EarlyExitNet:
    """The network of `zoo.eenet(**config)` with `weights`, all of them checked before one is copied.

    size: bytes of the file that they come from; nothing larger is built or copied.
    """
    channels, *sides = config["input_shape"]
    pixels = prod(sides)
    check_channels(config["normalization"], config["input_shape"])
    _, found_channels, *_ = shape_of(weights, "stages.0.0.0.weight", 2 + len(sides))
    found_classes, _ = shape_of(weights, "heads.0.classifier.weight", 2)
    checks = [("input_shape", channels, found_channels), ("num_classes", config["num_classes"], found_classes)]
    if config["name"] == "eenet8":
        widest = shape_of(weights, f"stages.2.{'stage.' * ('carry' in config)}0.residual.5.weight", 4)
        checks.append(("filters", config["filters"], min(widest[:2]) // 4))
    for key, value, found in checks:
        if value != found:
            raise ValueError(f"{key}={config[key]} does not fit the weights, where it is {found}")
    kinds = [config["head"]] if isinstance(config["head"], str) else config["head"]
    for i, kind in enumerate(kinds):
        _, features = shape_of(weights, f"heads.{i}.classifier.weight", 2)
        if kind == "plain" and (features < pixels or features % pixels):
            raise ValueError(f"input_shape={config['input_shape']} does not fit plain exits of {features} features")
    # Shapes are compared before memory is taken, since a small file may describe a large network.
    net = zoo.eenet(**config, device="meta")
    put(net, weights, size, config["name"])
    net.check_thresholds()
    return net.eval()


def shape_of(weights: Mapping[str, Any], name: str, dims: int) -> tuple[int, ...]:
    """Shape of the weight called `name`; `ValueError` unless it has `dims` dimensions."""
    if name not in weights or weights[name].dim() != dims:
        raise ValueError(f"the weight {name} is missing or does not have {dims} dimensions")
    return tuple(weights[name].shape)


def first_names(net: nn.Module) -> dict[str, str]:
    """Name in the state_dict → the first name of the same tensor: modules may have several, of which files hold one."""
    found: dict[int, str] = {}
    return {name: found.setdefault(id(value), name) for name, value in net.state_dict(keep_vars=True).items()}


def put(net: nn.Module, weights: Mapping[str, Tensor], size: int, owner: str) -> None:
    """Give `net`, whose parameters have no memory yet, copies of `weights`, in their dtypes.

    size: bytes of the file that they come from; no more is copied. owner: what `net` is called, for errors.
    Raises `ValueError` unless every name, shape and kind of dtype fits, and every number is finite.
    """
    firsts, state = first_names(net), net.state_dict()
    expected = {name: state[name] for name in firsts.values()}
    for what, names in (("lacks", expected.keys() - weights.keys()), ("has unknown", weights.keys() - expected.keys())):
        if names:
            named = ", ".join(quoted(name)[1:-1] for name in sorted(names)[:4])
            raise ValueError(f"{owner} {what} weights, {len(names)} of them: {named} …")
    for name, value in expected.items():
        got, exact = weights[name], name == "thresholds" or not value.is_floating_point()
        if got.shape != value.shape or got.dtype not in ((value.dtype,) if exact else FLOATS):
            has, needs = (f"{tuple(t.shape)} {t.dtype}" for t in (got, value))
            raise ValueError(f"{name} is {has}, but {owner} needs {needs}")
    if sum(value.numel() * value.element_size() for value in weights.values()) > size:
        raise ValueError(f"its weights claim more than the {size} bytes of the file")
    check_finite(weights)
    copies = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    net.load_state_dict({name: copies[first] for name, first in firsts.items()}, assign=True)
