"""A backbone → the modules after which an exit can be, the last one before each next convolution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn

from ..modules.contexts import isolated, same_randomness
from ..modules.copies import working_copy
from .calls import Call, find_classifier, layouts_of, noise_images, other_sizes, watch
from .graph import Trace, traced
from .layouts import MAP
from .obstacles import check_backbone


def find_places(backbone: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """Names of modules in the order in which they run, which `attach` takes as exits, at most one of each place.

    After a convolution often come a BatchNorm, a ReLU or a pooling, which are no further places: an exit is after the
    last of them, where the map is smallest. Modules are looked into as far as torch.fx can trace them.
    Raises `ValueError` for backbones that cannot be cut, and where there is no place.
    """
    check_backbone(backbone)
    copied = working_copy(backbone)
    images = noise_images(copied, input_shape)
    with isolated(images.device), same_randomness(images.device):
        calls = watch(copied, images)
        last, _ = find_classifier(calls, None)
        inputs = [images, *(x for x, _ in other_sizes(copied, images))]
        names = [call.name for call in calls if _returns_map(call, calls, images)]
        trace = _deepest(copied, calls, inputs, names, last)
    places = [_outermost(trace, node) for node in _ends(trace, names)]
    if not places:
        raise ValueError(
            "the backbone has no module that returns one map [N, C, H, W] which is all that the rest needs; "
            "exits cannot be attached to it"
        )
    return places


def _returns_map(call: Call, calls: Sequence[Call], images: Tensor) -> bool:
    try:
        return layouts_of([call.name], calls, images) == [MAP] and call.name != ""
    except ValueError:
        return False


def _deepest(backbone: nn.Module, calls: Sequence[Call], inputs: Sequence[Any], names: list[str], last: str) -> Trace:
    """Of the traces that look into modules up to some depth, the deepest that there is."""
    for depth in range(max((name.count(".") for name in names), default=0), 0, -1):
        try:
            return traced(backbone, calls, inputs, [*(name for name in names if name.count(".") <= depth), last])
        except ValueError:
            continue
    return traced(backbone, calls, inputs, [*(name for name in names if "." not in name), last])


def _ends(trace: Trace, names: Sequence[str]) -> list[fx.Node]:
    """The nodes that an exit can be after, each the last before the next convolution or linear, but for the final exit.

    A node between the last convolution and the classifier is at the place of the final exit.
    """
    nodes = {trace.returned[name] for name in names if name in trace.returned}
    fitting = [n for n in trace.nodes if n in nodes and trace.is_map(n) and not trace.also_needed(n)]
    return [one for one, next in pairwise([*fitting, trace.nodes[-1]]) if _computes(trace, one, next)]


def _computes(trace: Trace, one: fx.Node, next: fx.Node) -> bool:
    """Whether a module with a weight of two or more dimensions runs after `one`, up to `next`."""
    between = trace.between(one, next)
    return any(
        parameter.dim() > 1
        for node in between
        if node.op == "call_module" and node is not trace.nodes[-1]
        for parameter in trace.backbone.get_submodule(str(node.target)).parameters()
    )


def _outermost(trace: Trace, node: fx.Node) -> str:
    """Of a block and its last layer, which return the same, the block."""
    return min((name for name, returned in trace.returned.items() if returned is node), key=lambda n: n.count("."))
