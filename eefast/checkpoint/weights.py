"""A file with the weights of any network → a network that takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..model import EarlyExitNet
from . import WEIGHTS_FILE, unpickle
from .state_dict import weights as weights_in
from .state_dict import without_prefix
from .stored import check_finite, read, read_safetensors


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Put the state_dict in `path` into `network`; `ValueError` unless every name and shape fits."""
    _load(network, without_prefix(read_weights(path), network.state_dict()), path)


def load_backbone(network: nn.Module, path: str | Path) -> str | None:
    """As `load_weights`, but the last linear keeps its weights where those in `path` are for another number of classes.

    Returns the name of this linear, None where all weights were taken.
    """
    initial = network.state_dict()
    found = without_prefix(read_weights(path), initial)
    other = {name for name, value in found.items() if name in initial and value.shape != initial[name].shape}
    names = {name.rpartition(".")[0] for name in other}
    if len(names) != 1 or not _differ_in_classes(network.get_submodule(name := names.pop()), name, found, other):
        _load(network, found, path)
        return None
    _load(network, {**found, **{key: initial[key] for key in other}}, path)
    return name


def _differ_in_classes(layer: nn.Module, name: str, found: dict[str, Tensor], other: set[str]) -> bool:
    """Whether the linear `name` differs from the weights found in the number of its answers alone."""
    if not isinstance(layer, nn.Linear) or other != {f"{name}.{key}" for key, _ in layer.named_parameters()}:
        return False
    weight = found[f"{name}.weight"]
    return weight.dim() == 2 and weight.shape[1] == layer.in_features


def load_network(network: EarlyExitNet, path: str | Path) -> list[int]:
    """As `load_weights`, but early exits keep their weights where those in `path` are of another kind of head.

    Returns these exits.
    """
    initial = network.state_dict()
    found = without_prefix(read_weights(path), {name for name in initial if not name.startswith("heads.")})
    others = []
    for i in range(network.num_exits):
        prefix = f"heads.{i}."
        here, there = ({k: v.shape for k, v in weights.items() if k.startswith(prefix)} for weights in (initial, found))
        if there and here != there:
            others.append(i)
            found = {k: v for k, v in found.items() if k not in there} | {k: initial[k] for k in here}
    _load(network, found, path)
    return others


def _load(network: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"weights={str(path)!r} do not fit the network: {error}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a .safetensors file, in a folder with model.safetensors, or in a file of `torch.save`.

    The latter may be a checkpoint that holds more, see `checkpoint.state_dict.weights`; no code in it is run. A common
    prefix of the names, such as "module.", stays, see `eefast.checkpoint.state_dict.without_prefix`.
    Raises `FileNotFoundError`, or `ValueError` for what is no state_dict, for weights that are NaN or infinite, and for
    those of a quantised network.
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
    if any(value.dtype == torch.int8 for value in found.values()):
        raise ValueError(
            f"weights={str(path)!r} is a quantised network, which is not trained; give the float network that it was "
            "made of, and quantise the trained one again"
        )
    return found
