"""Float network and images → its stages in simulated INT8, for libraries that run them; what loses too much is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..model import EarlyExitNet
from ..ops import Activation
from ..ops.resident_steps import activated
from ..planning.patterns import activation_of, called
from ..qdq import QdqConvolution, QdqStage, QuantizeDequantize
from .observers import PercentileObserver
from .qdq_graphs import ROUNDED, convolutions, folded_graph, qdq_stage, result_of, rounded_values
from .ranges import scale_and_zero

LARGEST_ERROR = 0.1
"""Of the output of a convolution, relative to it, both root mean squares; with more it stays in float32."""

TRIAL_IMAGES = 4
"""Images on which that is measured, for each convolution alone."""

Ranges = Mapping[str, tuple[float, int]]
"""Scale and zero point of what a node returns, by its name."""


@dataclass(frozen=True)
class QdqStages:
    """stages: of the network. names: of each stage's convolutions in INT8. left: number of those in float32."""

    stages: list[QdqStage]
    names: list[list[str]]
    left: int


@torch.no_grad()
def qdq_stages(net: EarlyExitNet, batches: Sequence[Tensor], percentile: float) -> QdqStages:
    """batches: images [n, C, H, W] float32 on the CPU, as `net.prepare` returns them; percentile: see `quantize`.

    Convolutions of maps of more than one pixel become integers; everything else, and the heads, stays in float32.
    Raises `ValueError` with the path of a stage that torch.fx cannot trace, and for networks without such convolutions.
    """
    stages, names, left, seen = list[QdqStage](), list[list[str]](), 0, list(batches)
    for i, module in enumerate(net.stages):
        path = f"stages.{i}"
        graph = folded_graph(module, path)
        convs = convolutions(graph)
        on_maps = [convs[name] for name in _on_maps(graph, convs, seen[0][:1])]
        ranges, after = _observed(graph, rounded_values(graph, on_maps), seen, percentile)
        errors = _errors(graph, on_maps, ranges, seen[0][:TRIAL_IMAGES])
        exact = [name for name, error in errors.items() if error <= LARGEST_ERROR]
        names.append(exact)
        left += len(convs) - len(exact)
        stages.append(qdq_stage(graph, exact, path))
        for name, part in stages[-1].graph.named_children():
            if isinstance(part, QuantizeDequantize):
                _set(part, ranges[name.removeprefix(ROUNDED)])
        seen = after
    if not any(names):
        raise ValueError(
            f"no convolution that torch.fx finds in the network keeps within {LARGEST_ERROR:.0%} in INT8; "
            "keep the network in float32"
        )
    return QdqStages(stages, names, left)


class _Watched(fx.Interpreter):
    """Runs a graph and tells what every node reads first and returns, where the latter is a tensor."""

    def __init__(self, graph: fx.GraphModule, tell: Callable[[fx.Node, Any, Tensor], None]) -> None:
        super().__init__(graph)
        self.tell = tell

    def run_node(self, n: fx.Node) -> Any:
        read, _ = self.fetch_args_kwargs_from_env(n)
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.tell(n, read[0] if read else None, value)
        return value


def _on_maps(graph: fx.GraphModule, convs: Mapping[str, fx.Node], x: Tensor) -> list[str]:
    """The convolutions whose maps have more than one pixel: all others cost little and are mostly gates."""
    found = list[str]()

    def tell(node: fx.Node, read: Any, value: Tensor) -> None:
        if node.name in convs and value.dim() == 4 and value[0, 0].numel() > 1:
            found.append(node.name)

    _Watched(graph, tell).run(x.clone())
    return found


def _observed(
    graph: fx.GraphModule, values: Sequence[fx.Node], batches: Sequence[Tensor], percentile: float
) -> tuple[Ranges, list[Tensor]]:
    """Ranges of the values, and what the stage returns for each batch."""
    images = sum(map(len, batches))
    observers = {value.name: PercentileObserver(percentile, images) for value in values}

    def tell(node: fx.Node, read: Any, value: Tensor) -> None:
        if node.name in observers:
            observers[node.name].observe(value)

    after = [_Watched(graph, tell).run(x.clone()) for x in batches]
    return {name: scale_and_zero(observer, relu=False) for name, observer in observers.items()}, after


def _errors(graph: fx.GraphModule, convs: Sequence[fx.Node], ranges: Ranges, x: Tensor) -> dict[str, float]:
    """Of each convolution, see `LARGEST_ERROR`, with integers in no other place; x: features before the stage."""
    found = dict[str, float]()

    def tell(node: fx.Node, read: Any, value: Tensor) -> None:
        if node not in convs:
            return
        conv, result = called(graph, node), result_of(graph, node)
        assert isinstance(conv, nn.Conv2d)
        ends = [value.clone(), QdqConvolution(conv)(_rounded(read, ranges[node.all_input_nodes[0].name]))]
        if result is not node:
            ends = [activated(end, activation_of(called(graph, result)) or Activation.NONE) for end in ends]
        exact, rounded = ends[0], _rounded(ends[1], ranges[result.name])
        found[node.name] = float(((rounded - exact).square().mean() / exact.square().mean().clamp_min(1e-30)).sqrt())

    _Watched(graph, tell).run(x.clone())
    return found


def _rounded(values: Tensor, range_: tuple[float, int]) -> Tensor:
    made = QuantizeDequantize()
    _set(made, range_)
    return made(values)


def _set(module: QuantizeDequantize, range_: tuple[float, int]) -> None:
    module.scale.fill_(range_[0])
    module.zero.fill_(range_[1])
