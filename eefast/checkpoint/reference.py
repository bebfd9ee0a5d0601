"""A file of the reference repository eksuas/eenets.pytorch → the EENet of `eefast.zoo` with its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import EarlyExitNet
from . import unpickle
from .building import build, shape_of
from .fields import is_normalization, is_number, is_shape
from .state_dict import weights as weights_in
from .state_dict import without_prefix
from .stored import quoted, read

REFERENCE = "eksuas/eenets.pytorch"


def read_reference(
    path: Path,
    input_shape: Sequence[int] | None,
    head: str | None,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
) -> EarlyExitNet:
    """The network in a file of the reference; arguments as `eefast.load`, errors are `ValueError` or `OSError`."""
    if input_shape is not None and not is_shape(input_shape):
        raise ValueError(f"input_shape={input_shape!r} must be (channels, height, width), each 1 … 65535")
    if not is_normalization(normalization):
        raise ValueError(f"normalization={normalization!r} must be (means, deviations), finite, deviations above 0")
    data = read(path, check=unpickle.check_start)
    weights, attributes, _ = weights_in(unpickle.read(data), data)
    config, weights = architecture(weights)
    check_head(config["head"], head, attributes)
    shape: Any = attributes.get("input_shape") if input_shape is None else input_shape
    if not is_shape(shape):
        raise ValueError("it does not hold the size of the images; give input_shape=(channels, height, width)")
    weights["thresholds"] = torch.full((config["num_exits"],), threshold(attributes))
    config |= {"input_shape": tuple(shape), "normalization": normalization}
    return build(config, weights, len(data))


def architecture(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of `zoo.eenet` but input_shape, and the weights under its names.

    weights: by the names of the reference or of its fork PTEENet, any version, whole modules' names included.
    Raises `ValueError` for weights of other networks.
    """
    # DataParallel puts "module." into the names, at the start or inside.
    found = {re.sub(r"(^|\.)module\.", r"\1", name): value for name, value in weights.items()}
    if len(found) < len(weights):
        raise ValueError("it has some weights twice, with and without module in their names")
    for first, converted in (("initblock.0.weight", _eenet8), ("stages.0.0.0.weight", _eenet)):
        inside = without_prefix(found, {first})
        if any(re.search(r"(^|\.)heads\.\d+\.classifier\.", name) for name in inside):
            break
        if first in inside:
            return converted(inside)
    if any(re.search(r"(^|\.)heads\.\d+\.(classifier|confidence)\.", name) for name in found):
        raise ValueError(
            "it holds weights of a network of eefast, which alone do not say its exit rule; give the folder that "
            "net.save(folder) or `eefast train` wrote, or build the network and give it the weights by load_state_dict"
        )
    names = ", ".join(quoted(name) for name in sorted(found)[:4])
    raise ValueError(f"it is no EENet of {REFERENCE}; its weights are called {names or 'nothing'} …")


def threshold(attributes: Mapping[str, Any]) -> float:
    """The float32 number that decides every float32 confidence as the module's float64 number does."""
    # Versions without `exit_threshold` compare with 0.5; their `threshold` is a list of FLOPs.
    value = attributes.get("exit_threshold", 0.5)
    if not is_number(value):
        raise ValueError(f"the module's exit_threshold is a {type(value).__name__}, not a finite number")
    rounded = torch.tensor(float(value), dtype=torch.float32)
    if float(rounded) > value:
        rounded = rounded.nextafter(torch.tensor(-torch.inf))
    return float(rounded)


def check_head(found: str, wanted: str | None, attributes: Mapping[str, Any]) -> None:
    claimed = attributes.get("exit_type")
    if isinstance(claimed, str):
        claimed = "conv1" if claimed == "conv" else claimed[:80]
        if claimed != found:
            raise ValueError(f"the module says that its exits are {claimed!r}, but its weights are those of {found!r}")
    if wanted is None or wanted == found:
        return
    if wanted == "bnpool" and not attributes:
        raise ValueError(
            "head='bnpool', but a state_dict of the reference lacks the BatchNorms of such exits; "
            "load the file that torch.save(model) wrote"
        )
    raise ValueError(f"head={wanted!r}, but the exits of this file are {found!r}")


# Stem's kernel, residual blocks, whether they are bottlenecks → layers of the network.
_DEPTHS = {
    **{(3, (depth - 2) // 2, False): depth for depth in (20, 32, 44, 56, 110)},
    **{(7, 8, False): 18, (7, 16, False): 34, (7, 16, True): 50, (7, 33, True): 101, (7, 50, True): 152},
}


def _eenet(weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and our weights of an `EENet` of the reference, any version.

    The oldest ends 6n+2 networks in an 8×8 average pooling, which at the sizes it can take is ours over the whole map.
    """
    exits = {int(found[1]) for name in weights if (found := re.match(r"exits\.(\d{1,3})\.", name))}
    if exits != set(range(len(exits))) or not exits:
        raise ValueError(f"its early exits are {sorted(exits)}; they must be numbered from 0")
    n = len(exits)
    weights = _without_alias(weights, n)
    blocks = [len({name.split(".")[2] for name in weights if name.startswith(f"stages.{i}.")}) for i in range(n + 1)]
    blocks[0] -= 1  # The stem.
    bottleneck = any(re.match(r"stages\.\d+\.\d+\.conv3\.", name) for name in weights)
    stem = shape_of(weights, "stages.0.0.0.weight", 4)
    if (layers := _DEPTHS.get((stem[3], sum(blocks), bottleneck))) is None:
        raise ValueError(f"{sum(blocks)} residual blocks after a {stem[2]}×{stem[3]} stem are no EENet of eefast.zoo")
    num_classes, features = shape_of(weights, "exits.0.classifier.0.weight", 2)
    (channels,) = shape_of(weights, f"stages.0.{blocks[0]}.bn{3 if bottleneck else 2}.weight", 1)
    config = {
        "name": f"eenet{layers}",
        "num_exits": n,
        "placement": list(accumulate(blocks[:-1])),
        "head": _exit_type(weights) or ("pool" if features == channels else "plain"),
        "num_classes": num_classes,
    }
    rules = (
        (r"(stages\..+)", r"\1"),
        (r"exits\.(\d+)\.(classifier|confidence)\.0\.(.+)", r"heads.\1.\2.\3"),
        (r"exits\.(\d+)\.layers\.0\.([a-z_]+)", r"heads.\1.norm.\2"),
        *((rf"exits\.(\d+)\.layers\.0\.{k}\.(.+)", rf"heads.\1.convs.{k // 3}.{k % 3}.\2") for k in (0, 1, 3, 4, 6, 7)),
        (r"(?:classifier\.0|fully_connected|fc)\.(.+)", rf"heads.{n}.classifier.\1"),
        (r"confidence\.0\.(.+)", rf"heads.{n}.confidence.\1"),
    )
    return config, _completed(_renamed(weights, rules), n)


def _without_alias(weights: dict[str, Tensor], last: int) -> dict[str, Tensor]:
    """The reference holds its last stage twice, as `stages.n` and as the `layers` that it was collected in."""
    for name in [name for name in weights if name.startswith("layers.")]:
        original = weights.get(f"stages.{last}.{name[7:]}")
        if original is None or not _same(original, weights[name]):
            raise ValueError(f"{quoted(name)} differs from the last stage, whose second name it is")
    return {name: value for name, value in weights.items() if not name.startswith("layers.")}


def _same(a: Tensor, b: Tensor) -> bool:
    # Shared memory first: a NaN does not equal itself.
    return a.data_ptr() == b.data_ptr() or (a.dtype == b.dtype and a.equal(b))


def _exit_type(weights: Mapping[str, Tensor]) -> str | None:
    if "exits.0.layers.0.weight" in weights:
        return "bnpool"
    convs = [weights[name] for k in (0, 3, 6) if (name := f"exits.0.layers.0.{k}.weight") in weights]
    if convs and convs[0].dim() == 1:
        raise ValueError(
            "its exits are PTEENet's bnpool, which has a ReLU that EENet's does not have; "
            "eefast has no such head, train with another exit type"
        )
    return f"conv{len(convs)}" if convs else None


def _eenet8(weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and our weights of a `CustomEENet` of the reference, or of the `EENet` in its first version."""
    num_classes, _ = shape_of(weights, "exit0_classifier.0.weight", 2)
    config = {
        "name": "eenet8",
        "num_exits": 2,
        "placement": [1, 2],
        "head": "pool",
        "num_classes": num_classes,
        "filters": shape_of(weights, "initblock.0.weight", 4)[0],
    }
    rules = (
        (r"initblock\.(.+)", r"stages.0.0.\1"),
        (r"basicblock1\.(.+)", r"stages.0.1.residual.\1"),
        (r"basicblock2\.(.+)", r"stages.1.0.residual.\1"),
        (r"basicblock3\.(.+)", r"stages.2.0.residual.\1"),
        (r"conv2d_6\.(.+)", r"stages.1.0.shortcut.\1"),
        (r"conv2d_9\.(.+)", r"stages.2.0.shortcut.\1"),
        (r"finalblock\.(.+)", r"stages.2.1.\1"),
        (r"exit([01])_(classifier|confidence)\.0\.(.+)", r"heads.\1.\2.\3"),
        (r"classifier\.0\.(.+)", r"heads.2.classifier.\1"),
    )
    return config, _completed(_renamed(weights, rules), 2)


def _renamed(weights: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        ours = next((re.sub(rule, to, name) for rule, to in rules if re.fullmatch(rule, name)), None)
        if ours is None:
            raise ValueError(f"{quoted(name)} is no weight of an EENet of {REFERENCE}")
        if ours in renamed:
            raise ValueError(f"{quoted(name)} is in the file twice, under different names")
        renamed[ours] = value
    return renamed


def _completed(weights: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """With zeros for what old versions lack and no answer needs: batch counters, the final exit's confidence row."""
    for name in [name for name in weights if name.endswith(".running_mean")]:
        weights.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    if not any(name.startswith(f"heads.{n}.confidence.") for name in weights):
        _, features = shape_of(weights, f"heads.{n}.classifier.weight", 2)
        like = weights[f"heads.{n}.classifier.weight"]
        weights[f"heads.{n}.confidence.weight"] = like.new_zeros(1, features)
        weights[f"heads.{n}.confidence.bias"] = like.new_zeros(1)
    return weights
