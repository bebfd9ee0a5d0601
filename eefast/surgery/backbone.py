"""The name of a network in torchvision or timm and a file of weights → the backbone that exits are attached to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoint import unpickle
from ..checkpoint.state_dict import put, without_prefix
from ..checkpoint.state_dict import weights as weights_in
from ..checkpoint.stored import (
    Field,
    check_channels,
    check_fields,
    check_finite,
    is_int,
    is_normalization,
    is_shape,
    quoted,
    read,
    read_json,
    read_safetensors,
)
from ..criteria import CRITERIA
from ..heads import HEADS
from ..model import ATTACHED_FILE, WEIGHTS_FILE, EarlyExitNet
from .attachment import rebuild

MOST_EXITS = 64


def backbone(name: str, num_classes: int, channels: int = 3, weights: str | Path | None = None) -> nn.Module:
    """The network called "torchvision:NAME" or "timm:NAME": images [N, channels, H, W] → logits [N, num_classes].

    channels: torchvision's networks take 3 only.
    weights: file with its state_dict, see `read_weights`; fresh weights without one. Nothing is ever downloaded.
    Raises `ValueError` for unknown names, with near ones, and for weights that do not fit; `ImportError` without timm.
    """
    library, _, model = name.partition(":")
    if library == "torchvision":
        from torchvision import models

        _check_name(name, model, [n for n in models.list_models() if _classifies(models.get_model_builder(n))])
        network = models.get_model(model, weights=None, num_classes=num_classes)
    elif library == "timm":
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"backbone={name!r} needs timm: pip install timm") from error
        _check_name(name, model, timm.list_models())
        network = timm.create_model(model, pretrained=False, num_classes=num_classes, in_chans=channels)
    else:
        raise ValueError(f"backbone={name!r} must be torchvision:NAME or timm:NAME, such as torchvision:resnet18")
    if weights is not None:
        load_weights(network, weights)
    return network


def _classifies(builder: Callable[..., nn.Module]) -> bool:
    """Not those in torchvision.models.detection and the like: these would download weights unasked."""
    return not re.match(r"torchvision\.models\.\w+\.", builder.__module__)


def _check_name(name: str, model: str, known: Sequence[str]) -> None:
    if model not in known:
        library = name.partition(":")[0]
        close = get_close_matches(model, known) or known[:5]
        raise ValueError(f"backbone={name!r} is unknown to {library}; near are {', '.join(close)}")


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Put the state_dict in `path` into `network`; `ValueError` unless every name and shape fits."""
    _load(network, without_prefix(read_weights(path), network.state_dict()), path)


def load_network(network: EarlyExitNet, path: str | Path) -> list[int]:
    """As `load_weights`, but early exits keep their own weights where those in `path` are of another kind of head.

    Returns the exits that did.
    """
    own = network.state_dict()
    found = without_prefix(read_weights(path), {name for name in own if not name.startswith("heads.")})
    anew = []
    for i in range(network.num_exits):
        prefix = f"heads.{i}."
        here, there = ({k: v.shape for k, v in weights.items() if k.startswith(prefix)} for weights in (own, found))
        if there and here != there:
            anew.append(i)
            found = {k: v for k, v in found.items() if k not in there} | {k: own[k] for k in here}
    _load(network, found, path)
    return anew


def _load(network: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"weights={str(path)!r} do not fit the network: {error}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a .safetensors file, in a folder with model.safetensors, or in a file of `torch.save`.

    The latter may be a checkpoint that holds more, see `checkpoint.state_dict.weights`; no code in it is run. What all
    names begin with, such as "module.", stays, see `eefast.checkpoint.state_dict.without_prefix`.
    Raises `FileNotFoundError`, or `ValueError` for what is no state_dict, and for weights that are NaN or infinite.
    """
    path = Path(path).expanduser()
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"weights={str(path)!r}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            found, _ = read_safetensors(path)
        else:
            data = read(path, check=unpickle.check_start)
            found, _, _ = weights_in(unpickle.read(data), data)
            if not found:
                raise ValueError("it holds no tensors")
        check_finite(found)
    except ValueError as error:
        raise ValueError(
            f"weights={str(path)!r} holds no state_dict of a network ({error}); "
            "save one with torch.save(model.state_dict(), …)"
        ) from error
    return found


def save_attached(net: EarlyExitNet, folder: str | Path, name: str, exits: Sequence[str], head: str) -> None:
    """`EarlyExitNet.save` of a network that was not built by `eefast.zoo`; `load_attached` reads it.

    name, exits, head: as given to `backbone` and `eefast.surgery.attach`.
    """
    net.attached = {"backbone": name, "exits": list(exits), "head": head}
    net.save(folder)


_ATTACHED: dict[str, Field] = {
    "format": (lambda v: type(v) is int and v == 1, "1, the format that this eefast reads; a newer eefast may read it"),
    "backbone": (lambda v: _is_name(v) and v.startswith(("torchvision:", "timm:")), "torchvision:NAME or timm:NAME"),
    "exits": (
        lambda v: isinstance(v, list) and len(v) <= MOST_EXITS and all(map(_is_name, v)) and len({*v}) == len(v),
        f"a list of at most {MOST_EXITS} names of modules, none of them twice",
    ),
    "head": (lambda v: isinstance(v, str) and v in HEADS, f"one of {', '.join(HEADS)}"),
    "num_classes": (lambda v: is_int(v, 2**31 - 1), "a number of classes"),
    "input_shape": (is_shape, "[channels, height, width], each 1 … 65535"),
    "normalization": (is_normalization, "null or [means, deviations], finite, deviations above 0"),
    "criterion": (lambda v: isinstance(v, str) and v in CRITERIA, f"one of {', '.join(CRITERIA)}"),
}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200


def load_attached(folder: str | Path) -> EarlyExitNet:
    """The network that `save_attached` wrote, on the CPU, in eval mode, in the dtype that it was saved in.

    Shapes are compared before there is memory for them: the backbone is built and cut on the meta device.
    Raises `FileNotFoundError`, or `ValueError` for a description or weights that are not in order or do not fit.
    """
    folder = Path(folder)
    if not (folder / ATTACHED_FILE).exists():
        raise FileNotFoundError(f"{folder} has no {ATTACHED_FILE}; eefast.load reads folders of EENets")
    if not (folder / WEIGHTS_FILE).exists():
        raise ValueError(f"{WEIGHTS_FILE} is missing; give the folder that eefast train wrote")
    description = read_json(folder / ATTACHED_FILE)
    check_fields(description, _ATTACHED, ATTACHED_FILE)
    check_channels(description["normalization"], description["input_shape"])
    weights, size = read_safetensors(folder / WEIGHTS_FILE)
    del description["format"]
    name, exits, shape = description.pop("backbone"), description.pop("exits"), description["input_shape"]

    def made() -> nn.Module:
        return backbone(name, description["num_classes"], shape[0]).eval()

    with _Shapes():
        empty = made()
    _check_against(weights, size, empty, name, len(exits))
    net = rebuild(empty, exits, **description)
    put(net, weights, size, name)
    _fill(net, made)
    net.check_thresholds()
    net.attached = {"backbone": name, "exits": list(exits), "head": description["head"]}
    return net.eval()


def _check_against(weights: dict[str, Tensor], size: int, empty: nn.Module, name: str, exits: int) -> None:
    """`ValueError` where `weights` cannot be those of the backbone `empty` with so many exits, before it is cut.

    Its linear and what its answers do not need is not under its names; that may not be most of it.
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
            raise ValueError(f"{ATTACHED_FILE} says {exits} exits, but {WEIGHTS_FILE} has no weights of heads.{i}")


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


def _fill(net: EarlyExitNet, made: Callable[[], nn.Module]) -> None:
    """Give `net` the tables that its backbone computes and does not save, such as the positions in a window."""
    empty = [name for name, value in net.named_buffers() if value.is_meta]
    if not empty:
        return
    with torch.random.fork_rng(devices=[]), _Unset():
        whole = made()
    dtype = next(net.parameters()).dtype
    for name in empty:
        path, _, last = name.rpartition(".")
        value = whole.get_buffer(name.split(".", 2)[2])
        net.get_submodule(path)._buffers[last] = value.to(dtype) if value.is_floating_point() else value
