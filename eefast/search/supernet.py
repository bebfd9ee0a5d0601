"""A network or backbone → a network with heads of several kinds at every place, and one of any subset of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import zoo
from ..heads import ExitHead
from ..model import EarlyExitNet
from ..surgery import attach
from ..surgery import backbone as library_backbone
from ..surgery.places import find_places
from .candidates import Subset


@dataclass(frozen=True)
class Supernet:
    """All candidates as early exits of one network, whose features are computed once for all heads at a place.

    net: stages between heads at the same place are `nn.Identity`; trained like any other network.
    places: of each candidate, the name of the module or the number of residual blocks before it.
    kinds: of each candidate, that of its head.
    body: the backbone, whose modules `net` shares; None for a network of `eefast.zoo`.
    """

    net: EarlyExitNet
    places: tuple[str | int, ...]
    kinds: tuple[str, ...]
    body: nn.Module | None

    def network(self, subset: Subset, criterion: str, thresholds: Sequence[float]) -> EarlyExitNet:
        """The network with these candidates only, as `eefast.zoo.eenet` or `eefast.attach` makes it, in eval mode.

        It has the weights, classes, preprocessing and record of `net`; those of a backbone are shared.
        """
        places, kinds = [self.places[e] for e in subset], [self.kinds[e] for e in subset]
        arguments: dict[str, Any] = {
            "head": kinds,
            "num_classes": self.net.num_classes,
            "input_shape": self.net.input_shape,
            "criterion": criterion,
            "thresholds": thresholds,
            "normalization": self.net.normalization,
        }
        if self.body is None:
            found = zoo.eenet(self.net.name, placement=[int(place) for place in places], **arguments)
            _copy_layers(self.net, found)
        else:
            found = attach(self.body, [str(place) for place in places], **arguments)
        for head, e in zip(found.heads, (*subset, len(self.places)), strict=True):
            head.load_state_dict(self.net.heads[e].state_dict())
        found.preprocessing, found.classes, found.record = self.net.preprocessing, self.net.classes, self.net.record
        weight = next(self.net.parameters())
        return found.to(weight.device, weight.dtype).eval()

    @property
    def place_numbers(self) -> list[int]:
        """Of each candidate, the number of its place."""
        return [list(dict.fromkeys(self.places)).index(place) for place in self.places]

    def parameters(self) -> list[int]:
        """Of the head of each candidate, and of all that every network of a subset has."""
        heads = [sum(p.numel() for p in head.parameters()) for head in self.net.heads[:-1]]
        return [*heads, sum(p.numel() for p in self.net.parameters()) - sum(heads)]


def of_network(net: EarlyExitNet, kinds: Sequence[str], places: Sequence[str | int] | None, most: int) -> Supernet:
    """The supernet of a network with exits, whose early ones are replaced; it has copies of the other weights.

    kinds: of heads; those that a place is too small or too deep for are left out there.
    places: names of modules or numbers of residual blocks; None for all, but not more than `most`, evenly by cost.
    Raises `ValueError` for a network that was not made by `eefast.zoo.eenet` or `eefast.attach`, and for EENet-8.
    """
    config = net.config or {}
    if "carry" in config:
        raise ValueError(
            f"{net.name} carries features from its last early exit; search with the network that was made without "
            f"carry={config['carry']!r}"
        )
    if config.get("kind") == "attached":
        body = library_backbone(config["backbone"], net.num_classes, net.input_shape[0])
        body.load_state_dict(_weights_of_body(net, body))
        made = of_backbone(body, net.input_shape, net.normalization, kinds, places, most)
        confidence = made.net.heads[-1].confidence
        assert isinstance(confidence, nn.Module)
        confidence.load_state_dict(net.heads[-1].confidence.state_dict())  # type: ignore[union-attr]
        return made
    name = str(config.get("name"))
    if config.get("kind") == "quantized":
        raise ValueError(f"{net.name} is quantised; search with the float network that it was made of")
    if config.get("kind") != "eenet" or name == "eenet8":
        what = "has its two exits" if name == "eenet8" else f"was built from {net.built_from}"
        raise ValueError(f"{net.name} {what}; search needs another network of eefast.zoo, or one of eefast.attach")
    blocks = len(_layers(net)) - 1
    wanted = list(range(1, blocks)) if places is None else _block_numbers(places)
    base = zoo.eenet(
        name,
        placement=wanted,
        num_classes=net.num_classes,
        input_shape=net.input_shape,
        normalization=net.normalization,
    )
    kept = _evenly(base, most if places is None else len(wanted))
    base = base.without_exits([i for i in range(base.num_exits) if i not in kept])
    _copy_layers(net, base)
    base.heads[-1].load_state_dict(net.heads[-1].state_dict())
    return _with_kinds(base, [wanted[i] for i in kept], kinds, None)


def of_backbone(
    body: nn.Module,
    input_shape: Sequence[int],
    normalization: tuple[Sequence[float], Sequence[float]] | None,
    kinds: Sequence[str],
    places: Sequence[str | int] | None,
    most: int,
) -> Supernet:
    """The supernet of a backbone, whose modules it shares; arguments as `of_network` and `eefast.attach`."""
    names = find_places(body, input_shape) if places is None else list(map(str, places))
    base = attach(body, names, input_shape=input_shape, normalization=normalization)
    if len(names) > most and places is None:
        names = [names[i] for i in _evenly(base, most)]
        base = attach(body, names, input_shape=input_shape, normalization=normalization)
    return _with_kinds(base, names, kinds, body)


def _with_kinds(base: EarlyExitNet, places: Sequence[str | int], kinds: Sequence[str], body: Any) -> Supernet:
    """Heads of all kinds in the place of the early heads of `base`."""
    stages: list[nn.Module] = []
    heads: list[nn.Module] = []
    found: list[tuple[str | int, str]] = []
    like, waiting = next(base.parameters()), list[nn.Module]()
    why = ""
    for place, stage, cost in zip(places, base.stages, base.stage_costs, strict=False):
        waiting.append(stage)
        for kind in kinds:
            try:
                head = ExitHead(kind, cost.feature_shape, base.num_classes, base.input_shape)
            except ValueError as error:
                why = str(error)
                continue
            stages.append(_joined(waiting))
            heads.append(head.to(like))
            found.append((place, kind))
            waiting = []
    if not found:
        raise ValueError(f"no kind of head of {', '.join(kinds)} fits at any place: {why}")
    stages.append(_joined([*waiting, base.stages[-1]]))
    net = EarlyExitNet(
        stages,
        [*heads, base.heads[-1]],
        input_shape=base.input_shape,
        criterion="max_probability",
        normalization=base.normalization,
        config=base.config,
    )
    net.train(base.training)
    return Supernet(net, tuple(place for place, _ in found), tuple(kind for _, kind in found), body)


def _joined(stages: Sequence[nn.Module]) -> nn.Module:
    """One stage of several; of none, one that does nothing."""
    if len(stages) == 1:
        return stages[0]
    layers = [layer for stage in stages for layer in (stage if type(stage) is nn.Sequential else [stage])]
    return nn.Sequential(*layers) if layers else nn.Identity()


def _evenly(base: EarlyExitNet, most: int) -> list[int]:
    """At most `most` early exits, those nearest to costs that are evenly spaced; first and last included."""
    reach = [0]
    for cost in base.stage_costs[:-1]:
        reach.append(reach[-1] + cost.stage_macs)
    reach = reach[1:]
    if len(reach) <= most:
        return list(range(len(reach)))
    steps = [reach[0] + (reach[-1] - reach[0]) * i / max(most - 1, 1) for i in range(most)]
    return sorted({min(range(len(reach)), key=lambda e: abs(reach[e] - step)) for step in steps})


def _block_numbers(places: Sequence[str | int]) -> list[int]:
    try:
        return [int(place) for place in places]
    except ValueError:
        raise ValueError(f"places={list(places)}: give numbers of residual blocks, such as 1,3,5") from None


def _layers(net: EarlyExitNet) -> list[nn.Module]:
    """Stem and residual blocks of a network of `eefast.zoo`, whatever its exits."""
    found = [layer for stage in net.stages for layer in (stage if type(stage) is nn.Sequential else [stage])]
    return [layer for layer in found if not isinstance(layer, nn.Identity)]


def _copy_layers(source: EarlyExitNet, target: EarlyExitNet) -> None:
    for theirs, ours in zip(_layers(source), _layers(target), strict=True):
        ours.load_state_dict(theirs.state_dict())


def _weights_of_body(net: EarlyExitNet, body: nn.Module) -> dict[str, Any]:
    """The state_dict of the backbone of an attached network; its last linear is the final head's."""
    found = {key.split(".", 1)[1]: value for i, stage in enumerate(net.stages) for key, value in _state(stage, i)}
    classifier = net.heads[-1].classifier
    assert isinstance(classifier, nn.Module)
    own = {key: tuple(value.shape) for key, value in classifier.state_dict().items()}
    for name, module in body.named_modules():
        linear = isinstance(module, nn.Linear) and f"{name}.weight" not in found
        if linear and {key: tuple(value.shape) for key, value in module.state_dict().items()} == own:
            found |= {f"{name}.{key}": value for key, value in classifier.state_dict().items()}
    return found


def _state(stage: nn.Module, number: int) -> list[tuple[str, Any]]:
    return [(f"{number}.{key}", value) for key, value in stage.state_dict().items()]
