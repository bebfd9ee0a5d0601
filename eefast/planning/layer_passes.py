"""Layers as traced → layers as they run: additions and ReLUs fused, ordered by map size, values assigned to maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..ops import Kind
from .errors import UnsupportedError
from .layers import ADDITION, Layer, Lowered


def fuse(layers: Sequence[Layer]) -> list[Layer]:
    """Make every addition the residual of a convolution, and every ReLU part of the layer that computes its input.

    Raises `UnsupportedError` for an addition to no such convolution.
    """
    uses = Counter(value for layer in layers for value in (layer.source, layer.residual))
    producers = {layer.target: layer for layer in layers if layer.kind != Kind.EXIT}
    absorbed: set[int] = set()

    def producer_for_one(value: int) -> Layer | None:
        """What computes a value, if one layer alone reads that and no ReLU is part of it yet."""
        layer = producers.get(value)
        return layer if layer is not None and uses[value] == 1 and not layer.relu else None

    fused: list[Layer] = []
    for layer in layers:
        if layer.kind == ADDITION:
            candidates = [
                (conv, other)
                for value, other in ((layer.source, layer.residual), (layer.residual, layer.source))
                if (conv := producer_for_one(value))
                and conv.kind == Kind.CONVOLUTION and conv.residual < 0 and other != 0
            ]  # fmt: skip
            if not candidates:
                raise UnsupportedError("an addition follows no convolution whose result is used only there")
            # Layers that resize come first in their section, so one that does not can add their result.
            conv, other = max(candidates, key=lambda pair: (not pair[0].resizes, pair[0].kernel))
            absorbed.add(conv.target)
            layer = replace(conv, residual=other, target=layer.target)
        producer = producer_for_one(layer.source) if _is_only_relu(layer) else None
        if producer is not None and producer.kind in (Kind.CONVOLUTION, Kind.AFFINE):
            absorbed.add(producer.target)
            layer = replace(producer, relu=True, target=layer.target)
        if layer.kind != Kind.EXIT:
            producers[layer.target] = layer
        fused.append(layer)
    return [layer for layer in fused if layer.kind == Kind.EXIT or layer.target not in absorbed]


def _is_only_relu(layer: Layer) -> bool:
    return layer.kind == Kind.AFFINE and layer.relu and bool((layer.weight == 1).all() & (layer.bias == 0).all())


def order_by_section(layers: Sequence[Layer]) -> list[Layer]:
    """The layers in the order of their sections; those that read maps of the section before come first in theirs.

    Sets `section`. Raises `UnsupportedError` where an addition joins two map sizes or would run too early, or where
    layers follow the final exit.
    """
    section_of = {0: -1}
    for layer in layers:
        layer.section = section_of[layer.source] + (layer.resizes or layer.source == 0)
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
    last = ordered[-1]
    if last.kind != Kind.EXIT or any(layer.section > last.section for layer in layers):
        raise UnsupportedError("the final exit does not come last")
    return ordered


def assign_maps(
    layers: Sequence[Layer], channels: Sequence[int], image_size: Sequence[int], zeros: Sequence[int] | None = None
) -> Lowered:
    """Give every value a map; maps of values that are not needed any more are used again.

    channels: of every value. image_size: (H, W). zeros: zero point of every value, if values are integers. Maps of
    different zero points are not shared, since their borders are filled only once.
    """

    def described(value: int, section: int) -> tuple[int, ...]:
        return (channels[value], section) if zeros is None else (channels[value], section, zeros[value])

    height, width = image_size
    sizes: list[tuple[int, int]] = []
    last_use = {value: i for i, layer in enumerate(layers) for value in (layer.source, layer.residual)}
    maps, map_of, free = [described(0, -1)], {0: 0}, list[int]()
    placed = []
    for i, layer in enumerate(layers):
        if layer.section == len(sizes):
            height, width = ((side + 2 * layer.padding - layer.kernel) // layer.stride + 1 for side in (height, width))
            sizes.append((height, width))
        source, residual = map_of[layer.source], map_of.get(layer.residual, -1)
        ending = {value for value in (layer.source, layer.residual) if value > 0 and last_use[value] == i}
        if layer.kind == Kind.EXIT:
            placed.append(replace(layer, source=source))
            free += [map_of[value] for value in ending]
            continue
        wanted = described(layer.target, layer.section)
        replaced = _may_be_overwritten(layer)
        if replaced in ending and maps[map_of[replaced]] == wanted:
            target = map_of[replaced]
        else:
            target = next((m for m in free if maps[m] == wanted), len(maps))
            if target == len(maps):
                maps.append(wanted)
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
    return layer.source if layer.kind == Kind.AFFINE else -1
