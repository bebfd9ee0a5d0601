"""A checkpoint on disk → a network: a folder that `EarlyExitNet.save` wrote, or a file of the reference repository."""

from __future__ import annotations

import json
import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import criteria, unpickle, zoo
from .heads import HEADS
from .model import ATTACHED_FILE, CONFIG_FILE, WEIGHTS_FILE, EarlyExitNet
from .record import read as read_record
from .train.backbone import load_attached

REFERENCE = "eksuas/eenets.pytorch"
LARGEST = 65_535
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file, what is wrong with it and what to do."""


def load(
    path: str | Path,
    *,
    input_shape: Sequence[int] | None = None,
    head: str | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> EarlyExitNet:
    """The network in `path`, on the CPU, in eval mode, in the dtype that it was saved in.

    path: a folder written by `EarlyExitNet.save`, or by `eefast train --backbone`; or a file of the reference
        implementation of EENets (eksuas/eenets.pytorch, and its fork PTEENet), either `torch.save(model)` or
        `torch.save(model.state_dict())`, in the format of any torch version. No code in the file is ever run.

    The rest is for files of the reference only:
    input_shape: (C, H, W) of the images; needed where the file does not say it: every state_dict, every EENet-8.
    head: the exit type that you expect, see `eefast.heads.ExitHead`; an error where the file has another. Name "bnpool"
        for a state_dict: without its BatchNorms, which stand in the pickled module only, it looks like "pool".
    normalization: (mean, std) of the training images, see `EarlyExitNet`.

    Thresholds come with a folder; of a reference file they are the module's `exit_threshold`, else 0.5.
    The reference left the BatchNorms of `bnpool` exits in training mode; here they use their running statistics.
    Raises `CheckpointError` for everything that is not one of these, whole and in order.
    """
    path = Path(path)
    try:
        if path.is_file() and path.name in (CONFIG_FILE, WEIGHTS_FILE):
            raise ValueError("give the folder in which this file stands")
        if not path.is_dir():
            return _from_reference(path.read_bytes(), input_shape, head, normalization)
        if not (input_shape is None and head is None and normalization is None):
            raise ValueError(f"input_shape, head and normalization are for files of {REFERENCE}; a folder says its own")
        net = load_attached(path) if (path / ATTACHED_FILE).is_file() else _from_folder(path)
        net.record = read_record(path, net.name, net.num_classes, net.input_shape)
        return net
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _from_folder(folder: Path) -> EarlyExitNet:
    from safetensors.torch import load as read_weights

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing; give the folder that net.save(folder) wrote")
    config = _config((folder / CONFIG_FILE).read_bytes())
    data = (folder / WEIGHTS_FILE).read_bytes()
    try:
        weights = read_weights(data)
    # The reader's own error class, and KeyError for dtypes that this torch lacks.
    except Exception as error:
        raise ValueError(f"{WEIGHTS_FILE} is damaged ({error}); save the network again") from error
    net = _build(config, weights, len(data))
    for key in ("num_exits", "placement"):
        if config[key] != net.config[key]:  # type: ignore[index]
            raise ValueError(f"{CONFIG_FILE} says {key}={config[key]}, but the network has {net.config[key]}")  # type: ignore[index]
    return net


def _is_int(value: Any, most: int = LARGEST) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 3 and all(map(_is_int, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max


def _is_normalization(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(p, list) and all(map(_is_number, p)) for p in value)
    )


_CONFIG: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda v: type(v) is int and v == 1, "1, the format that this eefast reads; a newer eefast may read it"),
    "name": (lambda v: v in zoo.NAMES, f"one of {', '.join(zoo.NAMES)}"),
    "num_exits": (_is_int, "a number of early exits"),
    "placement": (lambda v: isinstance(v, list) and all(map(_is_int, v)), "a list of numbers of blocks"),
    "head": (lambda v: v in HEADS, f"one of {', '.join(HEADS)}"),
    "num_classes": (lambda v: _is_int(v, 2**31 - 1), "a number of classes"),
    "input_shape": (_is_shape, f"[channels, height, width], each 1 … {LARGEST}"),
    "normalization": (_is_normalization, "null or [means, deviations]"),
    "criterion": (lambda v: v in list(criteria.CRITERIA), f"one of {', '.join(criteria.CRITERIA)}"),
    "filters": (_is_int, "a number of channels"),
}


def _config(text: bytes) -> dict[str, Any]:
    """Arguments of `zoo.eenet`, every one of them checked."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_FILE} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} holds no JSON object")
    expected = {key for key in _CONFIG if key != "filters" or config.get("name") == "eenet8"}
    if difference := expected ^ config.keys():
        kind = {True: "lacks", False: "has the unknown key"}
        raise ValueError(f"{CONFIG_FILE} " + ", ".join(f"{kind[k in expected]} {k!r}" for k in sorted(difference)))
    for key, value in config.items():
        check, wanted = _CONFIG[key]
        if not check(value):
            raise ValueError(f"{CONFIG_FILE} says {key}={reprlib.repr(value)}; it must be {wanted}")
    return {key: value for key, value in config.items() if key != "format"}


def _build(config: Mapping[str, Any], weights: Mapping[str, Any], size: int) -> EarlyExitNet:
    """The network of `zoo.eenet(**config)` with `weights`, all of them checked before one is taken.

    size: bytes of the file that they come from; nothing larger is built or copied.
    """
    _check_plain(weights, size)
    channels, height, width = config["input_shape"]
    _, found_channels, _, _ = _shape(weights, "stages.0.0.0.weight", 4)
    found_classes, features = _shape(weights, "heads.0.classifier.weight", 2)
    checks = [("input_shape", channels, found_channels), ("num_classes", config["num_classes"], found_classes)]
    if config["name"] == "eenet8":
        widest = _shape(weights, "stages.2.0.residual.5.weight", 4)
        checks.append(("filters", config["filters"], min(widest[:2]) // 4))
    for key, said, found in checks:
        if said != found:
            raise ValueError(f"{key}={config[key]} does not fit the weights, which say {found}")
    if config["head"] == "plain" and (features < height * width or features % (height * width)):
        raise ValueError(f"input_shape={config['input_shape']} does not fit plain exits of {features} features")
    # The network is initialised only to be overwritten; the caller's random numbers must not notice.
    with torch.random.fork_rng(devices=[]):
        net = zoo.eenet(**config)
    expected = net.state_dict()
    for what, names in (("lacks", expected.keys() - weights.keys()), ("has unknown", weights.keys() - expected.keys())):
        if names:
            raise ValueError(f"{config['name']} {what} weights, {len(names)} of them: {', '.join(sorted(names)[:4])} …")
    for name, value in expected.items():
        got, exact = weights[name], name == "thresholds" or not value.is_floating_point()
        if got.shape != value.shape or got.dtype not in ((value.dtype,) if exact else FLOATS):
            has, needs = (f"{tuple(t.shape)} {t.dtype}" for t in (got, value))
            raise ValueError(f"{name} is {has}, but {config['name']} needs {needs}")
    copies = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    net.load_state_dict(copies, assign=True)
    net.check_thresholds()
    return net.eval()


def _check_plain(weights: Mapping[str, Any], size: int) -> None:
    for name, value in weights.items():
        if not unpickle.is_plain(value):
            raise ValueError(f"{name[:80]!r} is a {type(value).__name__}, but no dense tensor in memory")
        if value.numel() * value.element_size() > size:
            raise ValueError(f"{name[:80]!r} claims shape {tuple(value.shape)}, more than the file holds")


def _shape(weights: Mapping[str, Any], name: str, dims: int) -> tuple[int, ...]:
    if name not in weights or weights[name].dim() != dims:
        raise ValueError(f"the weight {name} is missing or has not {dims} dimensions")
    return tuple(weights[name].shape)


def _from_reference(
    data: bytes,
    input_shape: Sequence[int] | None,
    head: str | None,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
) -> EarlyExitNet:
    content, attributes = unpickle.read(data), {}
    if isinstance(content, unpickle.Inert):
        attributes, content = vars(content), unpickle.tensors(content)
    if type(content) not in (dict, OrderedDict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"it holds a {type(content).__name__}, neither a module of {REFERENCE} nor a state_dict")
    _check_plain(content, len(data))
    # DataParallel puts "module." into the names, in front of all or inside.
    weights = {re.sub(r"(^|\.)module\.", r"\1", name): value for name, value in content.items()}
    if "initblock.0.weight" in weights:
        config, weights = _eenet8(weights)
    elif "stages.0.0.0.weight" in weights:
        config, weights = _eenet(weights)
    else:
        names = ", ".join(name[:40] for name in sorted(weights)[:4])
        raise ValueError(f"it is no EENet of {REFERENCE}; its weights are called {names or 'nothing'} …")
    _check_head(config["head"], head, attributes)
    shape: Any = attributes.get("input_shape") if input_shape is None else input_shape
    if not _is_shape(shape):
        if input_shape is not None:
            raise ValueError(f"input_shape={input_shape!r} must be (channels, height, width), each 1 … {LARGEST}")
        raise ValueError("it does not say the size of the images; give input_shape=(channels, height, width)")
    weights["thresholds"] = torch.full((config["num_exits"],), _threshold(attributes))
    config |= {"input_shape": tuple(shape), "normalization": normalization}
    return _build(config, weights, len(data))


def _threshold(attributes: Mapping[str, Any]) -> float:
    """The float32 number that decides every float32 confidence as the module's own number does."""
    # Versions without `exit_threshold` compare with 0.5; their `threshold` is a list of FLOPs.
    value = attributes.get("exit_threshold", 0.5)
    if not _is_number(value):
        raise ValueError(f"the module's exit_threshold is a {type(value).__name__}, not a finite number")
    rounded = torch.tensor(float(value), dtype=torch.float32)
    if float(rounded) > value:
        rounded = rounded.nextafter(torch.tensor(-torch.inf))
    return float(rounded)


def _check_head(found: str, wanted: str | None, attributes: Mapping[str, Any]) -> None:
    said = attributes.get("exit_type")
    if isinstance(said, str):
        said = "conv1" if said == "conv" else said[:80]
        if said != found:
            raise ValueError(f"the module says that its exits are {said!r}, but its weights are those of {found!r}")
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
    stem = _shape(weights, "stages.0.0.0.weight", 4)
    if (layers := _DEPTHS.get((stem[3], sum(blocks), bottleneck))) is None:
        raise ValueError(f"{sum(blocks)} residual blocks after a {stem[2]}×{stem[3]} stem are no EENet of eefast.zoo")
    num_classes, features = _shape(weights, "exits.0.classifier.0.weight", 2)
    (channels,) = _shape(weights, f"stages.0.{blocks[0]}.bn{3 if bottleneck else 2}.weight", 1)
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
        twin = weights.get(f"stages.{last}.{name[7:]}")
        if twin is None or not _same(twin, weights[name]):
            raise ValueError(f"{name[:80]} differs from the last stage, whose second name it is")
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
            "its exits are PTEENet's bnpool, which has a ReLU that EENet's has not; "
            "eefast has no such head, train with another exit type"
        )
    return f"conv{len(convs)}" if convs else None


def _eenet8(weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and our weights of a `CustomEENet` of the reference, or of the `EENet` in its first version."""
    num_classes, _ = _shape(weights, "exit0_classifier.0.weight", 2)
    config = {
        "name": "eenet8",
        "num_exits": 2,
        "placement": [1, 2],
        "head": "pool",
        "num_classes": num_classes,
        "filters": _shape(weights, "initblock.0.weight", 4)[0],
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
            raise ValueError(f"{name[:80]!r} is a weight that no EENet of {REFERENCE} has")
        if ours in renamed:
            raise ValueError(f"{name[:80]!r} is there twice under different names")
        renamed[ours] = value
    return renamed


def _completed(weights: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """With zeros for what old versions lack and no answer depends on: batch counters, the final exit's confidence."""
    for name in [name for name in weights if name.endswith(".running_mean")]:
        weights.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    if not any(name.startswith(f"heads.{n}.confidence.") for name in weights):
        _, features = _shape(weights, f"heads.{n}.classifier.weight", 2)
        like = weights[f"heads.{n}.classifier.weight"]
        weights[f"heads.{n}.confidence.weight"] = like.new_zeros(1, features)
        weights[f"heads.{n}.confidence.bias"] = like.new_zeros(1)
    return weights
