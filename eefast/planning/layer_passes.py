"""Layers as traced → layers as they run: additions, activations fused, ordered by map size, values given maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import torch

from ..ops import Activation, Kind
from . import weight_order
from .errors import UnsupportedError
from .layers import ADDITION, Layer, Lowered


def fuse(layers: Sequence[Layer], channels: Sequence[int] | None = None) -> list[Layer]:
    """Make every addition the residual of a convolution, every activation part of the layer that computes its input.

    channels: of every value; an addition to no such convolution becomes a depthwise one of weight 1. Where there are no
    depthwise ones, None, it raises `UnsupportedError`.
    """
    uses = Counter(value for layer in layers for value in (layer.source, layer.residual))
    producers = {layer.target: layer for layer in layers if layer.kind != Kind.EXIT}
    absorbed: set[int] = set()

    def producer_for_one(value: int) -> Layer | None:
        """What computes a value, if one layer alone reads that and no activation is part of it yet."""
        layer = producers.get(value)
        return layer if layer is not None and uses[value] == 1 and layer.activation == Activation.NONE else None

    fused: list[Layer] = []
    for layer in layers:
        if layer.kind == ADDITION:
            candidates = [
                (conv, other)
                for value, other in ((layer.source, layer.residual), (layer.residual, layer.source))
                if (conv := producer_for_one(value))
                and conv.kind == Kind.CONVOLUTION and conv.residual < 0 and other != 0
            ]  # fmt: skip
            if candidates:
                # Layers that resize come first in their section, so one that does not can add their result.
                conv, other = max(candidates, key=lambda pair: (not pair[0].resizes, pair[0].kernel))
                absorbed.add(conv.target)
                layer = replace(conv, residual=other, target=layer.target)
            elif channels is not None and 0 not in (layer.source, layer.residual):
                layer = _identity_plus(layer, channels[layer.source])
            else:
                raise UnsupportedError("an addition follows no convolution whose result is used only there")
        producer = producer_for_one(layer.source) if _is_only_activation(layer) else None
        if producer is not None and producer.kind in (Kind.CONVOLUTION, Kind.AFFINE, Kind.SCALE, Kind.MEAN):
            absorbed.add(producer.target)
            layer = replace(producer, activation=layer.activation, target=layer.target)
        if layer.kind != Kind.EXIT:
            producers[layer.target] = layer
        fused.append(layer)
    return [layer for layer in fused if layer.kind == Kind.EXIT or layer.target not in absorbed]


def _is_only_activation(layer: Layer) -> bool:
    active = layer.kind == Kind.AFFINE and layer.activation != Activation.NONE
    return active and bool((layer.weight == 1).all() & (layer.bias == 0).all())


def _identity_plus(addition: Layer, channels: int) -> Layer:
    """An addition as a depthwise convolution."""
    ones, zeros = torch.ones(channels, 1, 1, 1), torch.zeros(channels)
    return replace(addition, kind=Kind.CONVOLUTION, kernel=1, groups=channels, weight=ones, bias=zeros)


def extend_joins(layers: Sequence[Layer], channels: list[int]) -> list[Layer]:
    """Let a concatenation that begins as an earlier one does write the rest into the earlier one's map.

    As in DenseNet, whose layers read all maps before them. The earlier one is read by affine maps only, which read as
    many channels as they have. channels: of every value; those of values in one map become the map's.
    """
    layers = list(layers)
    readers: dict[int, list[Layer]] = {}
    for layer in layers:
        for value in {layer.source, layer.residual}:
            readers.setdefault(value, []).append(layer)
    parts: dict[int, tuple[int, ...]] = {}  # of every value that JOINs make
    ends = dict[tuple[int, ...], int]()  # of whole concatenations that no other has extended
    dropped, first_of = set[int](), dict[int, int]()
    for layer in layers:
        if layer.kind != Kind.JOIN:
            continue
        parts[layer.target] = (*parts.get(layer.residual, ()), layer.source)
        first_of[layer.target] = first_of.get(layer.residual, layer.target)
        if any(r.kind == Kind.JOIN and r.residual == layer.target for r in readers.get(layer.target, ())):
            continue
        # `layer` is the last one of a concatenation.
        chain = [layer]
        while chain[0].residual >= 0:
            chain.insert(0, next(j for j in layers if j.target == chain[0].residual))
        for n in range(len(chain) - 1, 1, -1):
            if (begin := ends.pop(parts[layer.target][:n], None)) is not None:
                dropped |= {join.target for join in chain[:n]}
                chain[n].residual = begin
                for join in chain[n:]:
                    first_of[join.target] = first_of[begin]
                break
        affine = all(r.kind == Kind.AFFINE for r in readers.get(layer.target, ()))
        if affine and channels[layer.target] % weight_order.BLOCK == 0:
            ends[parts[layer.target]] = layer.target
    for value, first in first_of.items():
        channels[first] = max(channels[first], channels[value])
    for value, first in first_of.items():
        channels[value] = channels[first]
    return [layer for layer in layers if layer.kind == Kind.EXIT or layer.target not in dropped]


def order_by_section(layers: Sequence[Layer]) -> list[Layer]:
    """The layers in the order of their sections; those that read maps of the section before come first in theirs.

    Sets `section`. Raises `UnsupportedError` where an addition joins two map sizes or would run too early, where
    layers follow the final exit, and where an exit would come after layers of the next stage.
    """
    section_of = {0: -1}
    for layer in layers:
        goes_on = (layer.resizes and not layer.head) or layer.moves or layer.source == 0
        layer.section = section_of[layer.source] + goes_on
        if layer.residual >= 0 and section_of[layer.residual] != layer.section:
            raise UnsupportedError("an addition joins maps of different sections")
        if layer.kind != Kind.EXIT:
            section_of[layer.target] = layer.section
    ordered = sorted(layers, key=lambda layer: (layer.section, section_of[layer.source] == layer.section))
    written = {0, -1}
    for layer in ordered:
        if layer.residual not in written:
            raise UnsupportedError("an addition to a layer that resizes maps needs the result of later layers")
        if layer.kind != Kind.EXIT:
            written.add(layer.target)
    place = {id(layer): i for i, layer in enumerate(ordered)}
    for i, layer in enumerate(layers):
        if layer.kind == Kind.EXIT and any(place[id(later)] < place[id(layer)] for later in layers[i + 1 :]):
            raise UnsupportedError(
                f"the head of exit {layer.target} resizes its maps, so it would run after layers of the next stage"
            )
    last = ordered[-1]
    if last.kind != Kind.EXIT or any(layer.section > last.section for layer in layers):
        raise UnsupportedError("the final exit does not come last")
    return ordered


def assign_maps(
    layers: Sequence[Layer], channels: Sequence[int], image_size: Sequence[int], zeros: Sequence[int] | None = None,
    pooled: Set[int] = frozenset(),
) -> Lowered:  # fmt: skip
    """Give every value a map; maps of values that are not needed any more are used again.

    channels: of every value. image_size: (H, W). zeros: zero point of every value, if values are integers. Maps of
    different zero points are not shared, since their borders are filled only once. pooled: the values of one pixel.
    """

    def described(value: int, section: int) -> tuple[int, ...]:
        return (channels[value], section) if zeros is None else (channels[value], section, zeros[value])

    # Values that JOINs make one after the other are one map, which is needed as long as any of them is.
    first_of: dict[int, int] = {}
    for layer in layers:
        if layer.kind == Kind.JOIN:
            first_of[layer.target] = first_of.get(layer.residual, layer.target)

    height, width = image_size
    sizes: list[tuple[int, int]] = []
    last_use = {first_of.get(v, v): i for i, layer in enumerate(layers) for v in (layer.source, layer.residual)}
    maps, map_of, free = [described(0, -1)], {0: 0}, list[int]()
    # What else than its section the size of a map depends on: windows of a head; one pixel.
    resized: dict[int, tuple[Any, ...]] = {0: ()}
    placed = []
    for i, layer in enumerate(layers):
        if layer.section == len(sizes):  # the first layer of a section is none of a head
            height, width = (
                (side + 2 * padding - kernel) // layer.stride + 1
                for side, kernel, padding in zip((height, width), *layer.window, strict=True)
            )
            sizes.append((height, width))
        source, residual = map_of[layer.source], map_of.get(layer.residual, -1)
        read = (first_of.get(value, value) for value in (layer.source, layer.residual))
        ending = {value for value in read if value > 0 and last_use[value] == i}
        if layer.kind == Kind.EXIT:
            placed.append(replace(layer, source=source))
            free += [map_of[value] for value in ending]
            continue
        wanted, size = described(layer.target, layer.section), resized[source]
        if layer.target in pooled:
            size = ("one pixel",)
        elif layer.section != maps[source][1]:
            size = ()
        elif layer.head and layer.resizes:
            size = (*size, (layer.window, layer.stride))
        replaced = _may_be_overwritten(layer)
        replaced = first_of.get(replaced, replaced)
        if layer.kind == Kind.JOIN and layer.residual >= 0:
            target, residual = residual, -1
        elif replaced in ending and maps[map_of[replaced]] == wanted and resized[map_of[replaced]] == size:
            target = map_of[replaced]
        else:
            target = next((m for m in free if maps[m] == wanted and resized[m] == size), len(maps))
            if target == len(maps):
                maps.append(wanted)
                resized[target] = size
            else:
                free.remove(target)
        map_of[layer.target] = target
        free += [map_of[value] for value in ending if map_of[value] != target]
        placed.append(replace(layer, source=source, residual=residual, target=target))
    return Lowered(tuple(placed), tuple(maps), tuple(sizes))


def _may_be_overwritten(layer: Layer) -> int:
    """The value that a layer reads exactly where it writes; -1: none."""
    if layer.kind == Kind.CONVOLUTION and layer.residual != layer.source:
        return layer.residual
    return layer.source if layer.kind in (Kind.AFFINE, Kind.SCALE) else -1
