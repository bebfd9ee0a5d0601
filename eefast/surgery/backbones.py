"""The name of a network in torchvision or timm → the backbone that exits are attached to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from torch import nn

_ORIGIN = "eefast_origin"


def backbone(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    """The network called "torchvision:NAME" or "timm:NAME": images [N, channels, H, W] → logits [N, num_classes].

    Its weights are random; nothing is ever downloaded. A network with exits attached to it can be saved by `net.save`.
    channels: torchvision's networks take 3 only.
    Raises `ValueError` for unknown names, with similar ones; `ImportError` without the library.
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
    # Survives deepcopy and pickling.
    network.__dict__[_ORIGIN] = name, _layers(network)
    return network


def origin(network: nn.Module) -> str | None:
    """The name under which `backbone` made the network, None for others and where its layers were changed since."""
    name, layers = network.__dict__.get(_ORIGIN, (None, ""))
    return name if layers == _layers(network) else None


def _layers(network: nn.Module) -> str:
    """Modules and names of weights: some changes, such as weight_norm, show in these alone."""
    return f"{network}{[name for name, _ in network.named_parameters()]}"


def _classifies(builder: Callable[..., nn.Module]) -> bool:
    """Not those in torchvision.models.detection and the like, which would download weights without being asked."""
    return not re.match(r"torchvision\.models\.\w+\.", builder.__module__)


def _check_name(name: str, model: str, known: Sequence[str]) -> None:
    if model not in known:
        library = name.partition(":")[0]
        close = get_close_matches(model, known) or known[:5]
        raise ValueError(f"backbone={name!r} is unknown to {library}; similar names: {', '.join(close)}")
