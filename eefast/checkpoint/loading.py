"""A checkpoint on disk → a network: a folder that `EarlyExitNet.save` wrote, or a file of the reference repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import criteria, zoo
from ..heads import HEADS
from ..model import ATTACHED_FILE, CONFIG_FILE, WEIGHTS_FILE, EarlyExitNet
from ..surgery.backbone import load_attached
from . import unpickle
from .record import read as read_record
from .reference import REFERENCE, architecture, check_head, shape_of, threshold
from .state_dict import put
from .state_dict import weights as weights_in
from .stored import (
    Field,
    check_channels,
    check_fields,
    is_int,
    is_normalization,
    is_shape,
    read,
    read_json,
    read_safetensors,
)


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
    Weights of a checkpoint that holds more may stand under "state_dict", "model" and the like, see
    `eefast.checkpoint.state_dict.weights`, with "module.", "_orig_mod." or "model." in front of their names.
    Files may come from anybody: at most 4 times their size and 200 MB are taken, no more than 2 s and 1 s per 100 MB.
    Raises `CheckpointError` for everything that is not one of these, whole and in order, and for weights that are NaN
    or infinite.
    """
    path = Path(path)
    try:
        return _load(path, input_shape, head, normalization)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # what a file makes Python or torch raise is the file's fault
        text = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{path}: it cannot be loaded ({type(error).__name__}: {text})") from error


def _load(
    path: Path,
    input_shape: Sequence[int] | None,
    head: str | None,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
) -> EarlyExitNet:
    if path.is_file() and path.name in (CONFIG_FILE, ATTACHED_FILE, WEIGHTS_FILE):
        raise ValueError("give the folder in which this file stands")
    if not path.is_dir():
        return _from_reference(path, input_shape, head, normalization)
    if not (input_shape is None and head is None and normalization is None):
        raise ValueError(f"input_shape, head and normalization are for files of {REFERENCE}; a folder says its own")
    net = load_attached(path) if (path / ATTACHED_FILE).exists() else _from_folder(path)
    net.record = read_record(path, net.name, net.num_classes, net.input_shape)
    return net


def _from_folder(folder: Path) -> EarlyExitNet:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).exists():
            raise ValueError(f"{name} is missing; give the folder that net.save(folder) wrote")
    config = read_json(folder / CONFIG_FILE)
    check_fields(config, _CONFIG if config.get("name") == "eenet8" else _CONFIG_OF_OTHERS, CONFIG_FILE)
    del config["format"]
    net = _build(config, *read_safetensors(folder / WEIGHTS_FILE))
    for key in ("num_exits", "placement"):
        if config[key] != net.config[key]:  # type: ignore[index]
            raise ValueError(f"{CONFIG_FILE} says {key}={config[key]}, but the network has {net.config[key]}")  # type: ignore[index]
    return net


_CONFIG: dict[str, Field] = {
    "format": (lambda v: type(v) is int and v == 1, "1, the format that this eefast reads; a newer eefast may read it"),
    "name": (lambda v: isinstance(v, str) and v in zoo.NAMES, f"one of {', '.join(zoo.NAMES)}"),
    "num_exits": (is_int, "a number of early exits"),
    "placement": (
        lambda v: isinstance(v, list) and len(v) <= 64 and all(map(is_int, v)),
        "a list of at most 64 numbers of blocks",
    ),
    "head": (lambda v: isinstance(v, str) and v in HEADS, f"one of {', '.join(HEADS)}"),
    "num_classes": (lambda v: is_int(v, 2**31 - 1), "a number of classes"),
    "input_shape": (is_shape, "[channels, height, width], each 1 … 65535"),
    "normalization": (is_normalization, "null or [means, deviations], finite, deviations above 0"),
    "criterion": (lambda v: isinstance(v, str) and v in criteria.CRITERIA, f"one of {', '.join(criteria.CRITERIA)}"),
    "filters": (is_int, "a number of channels"),
}
_CONFIG_OF_OTHERS = {key: field for key, field in _CONFIG.items() if key != "filters"}


def _build(config: Mapping[str, Any], weights: Mapping[str, Tensor], size: int) -> EarlyExitNet:
    """The network of `zoo.eenet(**config)` with `weights`, all of them checked before one is taken.

    size: bytes of the file that they come from; nothing larger is built or copied.
    """
    channels, height, width = config["input_shape"]
    check_channels(config["normalization"], config["input_shape"])
    _, found_channels, _, _ = shape_of(weights, "stages.0.0.0.weight", 4)
    found_classes, features = shape_of(weights, "heads.0.classifier.weight", 2)
    checks = [("input_shape", channels, found_channels), ("num_classes", config["num_classes"], found_classes)]
    if config["name"] == "eenet8":
        widest = shape_of(weights, "stages.2.0.residual.5.weight", 4)
        checks.append(("filters", config["filters"], min(widest[:2]) // 4))
    for key, said, found in checks:
        if said != found:
            raise ValueError(f"{key}={config[key]} does not fit the weights, which say {found}")
    if config["head"] == "plain" and (features < height * width or features % (height * width)):
        raise ValueError(f"input_shape={config['input_shape']} does not fit plain exits of {features} features")
    # Shapes are compared before there is memory for any, since a small file may describe a large network.
    net = zoo.eenet(**config, device="meta")
    put(net, weights, size, config["name"])
    net.check_thresholds()
    return net.eval()


def _from_reference(
    path: Path,
    input_shape: Sequence[int] | None,
    head: str | None,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
) -> EarlyExitNet:
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
        raise ValueError("it does not say the size of the images; give input_shape=(channels, height, width)")
    weights["thresholds"] = torch.full((config["num_exits"],), threshold(attributes))
    config |= {"input_shape": tuple(shape), "normalization": normalization}
    return _build(config, weights, len(data))
