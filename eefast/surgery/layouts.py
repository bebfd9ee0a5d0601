"""What a module of a backbone returned → how its values are a map, and the nodes that make it one and undo it."""

from __future__ import annotations

from torch import Tensor, fx

MAP, TOKENS, CHANNELS_LAST = "map", "tokens", "channels-last"


def layout_of(value: Tensor, images: Tensor) -> str | None:
    """`MAP` for [N, C, H, W], or [N, C, L] of rows, `TOKENS` for [N, T, C], `CHANNELS_LAST` for [N, H, W, C].

    images: [N, C, H, W] or [N, C, L], for which the backbone returned the value. None for other shapes.
    """
    if len(value) != len(images):
        return None
    if value.dim() == images.dim():
        return CHANNELS_LAST if _is_channels_last(value, images) else MAP
    return TOKENS if images.dim() == 4 and value.dim() == 3 else None


def _is_channels_last(value: Tensor, images: Tensor) -> bool:
    """Whether the shape looks like [N, H, W, C]: dimensions 1 and 2 have the image's proportions, 2 and 3 have not."""
    if images.dim() != 4:
        return False
    height, width = images.shape[2:]
    off = [abs(a * width - b * height) for a, b in (value.shape[1:3], value.shape[2:])]
    return off[0] == 0 and off[1] > max(height, width)


def as_map(graph: fx.Graph, node: fx.Node, layout: str) -> fx.Node:
    """Nodes that make a map of a value, tokens a map [N, C, 1, T]; in memory it is channels-last, and nothing moves."""
    if layout == TOKENS:
        node = graph.call_method("unsqueeze", (node, 1))
    return node if layout == MAP else graph.call_method("permute", (node, 0, 3, 1, 2))


def undone(graph: fx.Graph, node: fx.Node, layout: str) -> fx.Node:
    """Nodes that make the value of a map again, as the backbone returned it: contiguous, for layers that view it."""
    if layout == MAP:
        return node
    node = graph.call_method("permute", (node, 0, 2, 3, 1))
    if layout == TOKENS:
        node = graph.call_method("squeeze", (node, 1))
    return graph.call_method("contiguous", (node,))
