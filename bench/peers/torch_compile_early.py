"""Early exit by torch.compile: the loop as it is, stage by stage, and as one graph that knows no sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eefast.measure import baselines
from eefast.measure.baselines import Run
from eefast.model import EarlyExitNet
from eefast.result import ExitResult

from . import batch_condition
from .peer import Peer, torch_version

# Freezing makes constants of the weights, as for the plain network, and of the thresholds unless they are an input.
FREEZING = "TORCHINDUCTOR_FREEZING"
# All stages share the code of one class, and each counts as a recompilation of it.
MOST_STAGES = 64


def default(net: EarlyExitNet) -> Run:
    """What a user tries first, nothing frozen. The graph breaks wherever the loop looks at the data."""
    _begin(net)
    return torch.compile(baselines.masked(net, folded=True))


def per_stage(net: EarlyExitNet) -> Run:
    torch._dynamo.config.recompile_limit = MOST_STAGES
    _begin(net)
    return by_stage(net, torch.float32)


def by_stage(net: EarlyExitNet, dtype: torch.dtype) -> Run:
    """Each stage with its exit compiled once for all batch sizes; the host compacts the survivors between them."""

    def compiled(step: nn.Module) -> Callable[[Tensor], Any]:
        run = torch.compile(step, fullgraph=True)

        def call(features: Tensor) -> Any:
            if features.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(features, 0)
            return run(features)

        return call

    made = [compiled(step) for step in batch_condition.steps(net, dtype)]
    return batch_condition.in_steps(net, made, lambda i, rows, survivors: True)


def full_graph(net: EarlyExitNet) -> Run:
    """One graph from the images to the answers; the numbers of survivors are symbolic sizes."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    _begin(net)
    run = torch.no_grad()(torch.compile(_Whole(net), fullgraph=True))
    return lambda x: run(x, net.thresholds)


class _Whole(nn.Module):
    """The masked loop without a look at how many survive, which would end the graph; no survivors are a batch, too."""

    def __init__(self, net: EarlyExitNet) -> None:
        super().__init__()
        self.steps = nn.ModuleList(batch_condition.steps(net, torch.float32))
        self.criterion, self.cost = net.criterion, net.cost

    def forward(self, x: Tensor, thresholds: Tensor) -> ExitResult:
        first, *others = self.steps
        x, logits, confidence = first(x)
        exits = torch.zeros(len(x), dtype=torch.int64)
        position, value = torch.arange(len(x)), confidence
        for i, step in enumerate(others):
            kept = (~self.criterion.leaves(value, thresholds[i])).nonzero().squeeze(1)
            position = position[kept]
            x, out, value = step(batch_condition.gathered(x, kept))
            logits = logits.index_copy(0, position, out)
            confidence = confidence.index_copy(0, position, value)
            exits = exits.index_fill(0, position, i + 1)
        return ExitResult(logits, exits, confidence, self.cost[exits])


def _begin(net: EarlyExitNet) -> None:
    # What was compiled for the network before would count as versions of this one's code.
    torch._dynamo.reset()
    # Where the batch size is unknown, inductor assumes the wrong layout after a convolution of one channel,
    # and stops at an assertion; for such images everything is compiled again for every batch size.
    torch._dynamo.config.automatic_dynamic_shapes = net.input_shape[0] > 1
    _counters().clear()


def _counters() -> Any:
    from torch._dynamo.utils import counters

    return counters


def describe() -> str:
    counters = _counters()
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    again = (
        "" if torch._dynamo.config.automatic_dynamic_shapes else ", again for every batch size of one-channel images"
    )
    return f"{torch_version()}, inductor, {graphs} graphs, {breaks} graph breaks{again}"


def _peer(name: str, prepare: Callable[[EarlyExitNet], Run], freezing: bool) -> Peer:
    # Each changes settings of the whole process.
    options: dict[str, Any] = {"memory_format": torch.channels_last, "variables": ((FREEZING, str(int(freezing))),)}
    return Peer(f"torch.compile {name}", prepare, describe, False, f"torch.compile {name}", **options)


PEERS = (
    _peer("on the loop", default, False),
    _peer("per stage", per_stage, True),
    _peer("full graph", full_graph, True),
)
