"""The name of a network in torchvision or timm and a file of weights → the backbone that exits are attached to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model import ATTACHED_FILE, WEIGHTS_FILE, EarlyExitNet
from ..surgery import attach


def backbone(name: str, num_classes: int, channels: int = 3, weights: str | Path | None = None) -> nn.Module:
    """The network called "torchvision:NAME" or "timm:NAME": images [N, channels, H, W] → logits [N, num_classes].

    channels: torchvision's networks take 3 only.
    weights: file with its state_dict, see `read_weights`; fresh weights without one. Nothing is ever downloaded.
    Raises `ValueError` for unknown names, with near ones, and for weights that do not fit; `ImportError` without timm.
    """
    library, _, model = name.partition(":")
    if library == "torchvision":
        from torchvision import models

        _check_name(name, model, models.list_models())
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


def _check_name(name: str, model: str, known: Sequence[str]) -> None:
    if model not in known:
        library = name.partition(":")[0]
        close = get_close_matches(model, known) or known[:5]
        raise ValueError(f"backbone={name!r} is unknown to {library}; near are {', '.join(close)}")


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Put the state_dict in `path` into `network`; `ValueError` unless every name and shape fits."""
    _load(network, read_weights(path), path)


def load_network(network: EarlyExitNet, path: str | Path) -> list[int]:
    """As `load_weights`, but early exits keep their own weights where those in `path` are of another kind of head.

    Returns the exits that did.
    """
    found, own = read_weights(path), network.state_dict()
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

    The latter may hold it under "state_dict" or "model" and with "module." before the names; no code in it is run.
    Raises `FileNotFoundError`, or `ValueError` for what is no state_dict.
    """
    path = Path(path).expanduser()
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(path)!r}: there is no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever the bytes lead to
        raise ValueError(f"weights={str(path)!r} is no file of torch.save(model.state_dict()) ({error})") from error
    for key in ("state_dict", "model"):
        found = found.get(key, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"weights={str(path)!r} holds no state_dict; save one with torch.save(model.state_dict(), …)")
    return {key.removeprefix("module."): value for key, value in found.items()}


def save_attached(net: EarlyExitNet, folder: str | Path, name: str, exits: Sequence[str], head: str) -> None:
    """`EarlyExitNet.save` of a network that was not built by `eefast.zoo`; `load_attached` reads it.

    name, exits, head: as given to `backbone` and `eefast.surgery.attach`.
    """
    net.attached = {"backbone": name, "exits": list(exits), "head": head}
    net.save(folder)


def load_attached(folder: str | Path) -> EarlyExitNet:
    """The network that `save_attached` wrote, on the CPU, in eval mode."""
    folder = Path(folder)
    if not (folder / ATTACHED_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {ATTACHED_FILE}; eefast.load reads folders of EENets")
    try:
        description = json.loads((folder / ATTACHED_FILE).read_text())
        shape, classes = description["input_shape"], description["num_classes"]
        name, exits = description["backbone"], description["exits"]
        more = {key: description[key] for key in ("head", "criterion", "normalization")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{ATTACHED_FILE} is not what eefast train wrote ({error!r})") from error
    net = attach(backbone(name, classes, shape[0]).eval(), exits, num_classes=classes, input_shape=shape, **more)
    load_weights(net, folder)
    net.attached = {"backbone": name, "exits": list(exits), "head": description["head"]}
    return net.eval()
