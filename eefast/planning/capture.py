"""Capture the compact engine in CUDA graphs, check and measure them: engine → the same engine with graphs."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import ceil
from operator import mul

import torch
from torch import Tensor

from ..engines import graphs
from ..engines.compact import CompactEngine
from ..engines.graphs import GraphEngine, Graphs
from ..engines.host_reads import Counted, Times, queues_for
from ..engines.program import StagePlan, with_times
from ..model import EarlyExitNet
from . import launch_costs, probe
from .launch_costs import LaunchCosts
from .trial import brief, difference

DEVICES = ("cuda",)

QUEUES = 2

ATTEMPTS = ((QUEUES, 1.25, True), (QUEUES, 1.25, False), (QUEUES, 1.6, False), (QUEUES, 2.0, False), (1, 2.0, False))
"""(queues, ratio of neighbouring batch sizes, whether survivors may stay in place, which takes the memory of another
batch for each stage): what is tried, one after the other, where memory runs out.
"""

SURVIVORS = 0.5
"""Share of the arriving rows that goes on at an early exit, where there are no example inputs."""

ROUNDS = 3

TOLERANCE = 0.05
"""Largest difference between logits with and without graphs ÷ largest logit at planning; beyond it, no graphs."""

log = logging.getLogger("eefast")


def with_graphs(engine: CompactEngine, example_inputs: Tensor | None, max_batch_size: int) -> CompactEngine:
    """On CUDA the engine with graphs for up to `max_batch_size` images.

    example_inputs: prepared images, which tell how many exit where. Where memory runs out there are graphs for fewer
    sizes, then for smaller batches; where a stage cannot be captured there are none; the plan's reasons say so.
    """
    plan = engine.plan
    if plan.device.type not in DEVICES or os.environ.get("EEFAST_GRAPHS", "1") == "0":
        return engine
    note, capacity = "", max_batch_size
    with graphs.on(plan.device):
        while capacity >= 1:
            for queues, step, in_place in ATTEMPTS:
                try:
                    return _captured(engine, example_inputs, capacity, queues, step, in_place, note)
                except torch.OutOfMemoryError:
                    pass  # the memory comes back when the exception is gone
                except Exception as error:
                    why = f"without CUDA graphs: {brief(error)}"
                    log.warning("the compact engine runs %s", why)
                    return _without(engine, why)
                note = ", fewer than wanted: the device's memory was full"
                forget()
            capacity //= 4
    return _without(engine, "without CUDA graphs: the device's memory is full")


def _captured(
    engine: CompactEngine, example_inputs: Tensor | None, capacity: int, queues: int, step: float, in_place: bool,
    note: str,
) -> GraphEngine:  # fmt: skip
    net, plan = engine.net, engine.plan
    survivors = survivors_of(net, example_inputs)
    made = Graphs(net, plan, engine.steps, capacity, queues, step, survivors, in_place=in_place)
    made.used = faster_in_place(made, survivors)
    made.use(measured(made, launch_costs.load(made.device), survivors or [SURVIVORS] * net.num_exits))
    _check(made, engine)
    reasons = (*plan.reasons, f"{_described(made)}{note}", *_costs(net, made, survivors))
    return GraphEngine(engine, replace(plan, reasons=reasons, stages=_with_reads(plan.stages, made)), made)


def _without(engine: CompactEngine, why: str) -> CompactEngine:
    engine.plan = replace(engine.plan, reasons=(*engine.plan.reasons, why))
    return engine


def measured(made: Graphs, costs: LaunchCosts, survivors: Iterable[float]) -> Times:
    """Seconds of all graphs of one queue; survivors: share of the arriving rows that goes on, per early exit.

    The rows that are measured on are alike, so all of them go on or none: what a share of them takes is in between.
    """
    shares = tuple(survivors)

    def least(stage: int, key: int | None, live: int, threshold: float) -> float:
        made.thresholds.fill_(threshold)
        found = float("inf")
        for _ in range(ROUNDS):
            made.fill(0, stage, live)
            found = min(found, launch_costs.seconds(made.replays[0, stage, key], made.device))
        made.clear()
        return found

    def seconds(stage: int, key: int | None, live: int) -> float:
        rule = made.net.criterion
        on = least(stage, key, live, rule.never)
        if stage == made.stages - 1:
            return on
        return shares[stage] * on + (1 - shares[stage]) * least(stage, key, live, rule.always)

    def counted(stage: int) -> Counted | None:
        if (0, stage, None) not in made.replays:
            return None
        few, many = 1, made.capacity
        least, most = seconds(stage, None, few), seconds(stage, None, many)
        row = max(0.0, most - least) / max(many - few, 1)
        return Counted(least - row * few, row)

    stages = tuple(tuple(seconds(stage, n, n) for n in made.sizes) for stage in range(made.stages))
    return Times(made.sizes, stages, tuple(map(counted, range(made.stages))), costs.wait, costs.launch, shares)


def faster_in_place(made: Graphs, survivors: Sequence[float]) -> list[int]:
    """Paths on which stages that read survivors where they are take less than those that read copies, and copying."""

    def seconds(replay: Callable[[], None], fill: Callable[[], None], stage: int) -> float:
        found = []
        for threshold in (made.net.criterion.never, made.net.criterion.always):
            made.thresholds.fill_(threshold)
            spans = []
            for _ in range(ROUNDS):
                fill()
                spans.append(launch_costs.seconds(replay, made.device))
            found.append(min(spans))
        made.clear()
        on = survivors[stage] if stage < made.stages - 1 else 1.0
        return on * found[0] + (1 - on) * found[1]

    def gain(path: int) -> float:
        total = 0.0
        for stage, rows in enumerate(made.paths[path]):
            if (other := made.through.get((0, stage, path))) is not None:
                total += seconds(made.replays[0, stage, rows], partial(made.fill, 0, stage, rows), stage)
                total -= seconds(other, partial(made.fill_in_place, 0, stage, path), stage)
        return total

    return [path for path in range(len(made.paths)) if gain(path) > 0]


def _check(made: Graphs, engine: CompactEngine) -> None:
    """`RuntimeError` where images that all go to the final exit get other answers from the graphs than without them."""
    net, plan = engine.net, engine.plan
    never = torch.full_like(net.thresholds, net.criterion.never)
    x = probe.noise(min(made.capacity, 32), net.input_shape).to(made.device, plan.dtype)
    assert made.taken(x)
    got, expected = made.run(x, never), engine.run_eagerly(x, never)
    made.waits = 0
    # Another batch size may mean another algorithm, so last bits differ; another image's answer differs far more.
    for name in ("logits", "confidence"):
        if different := difference(getattr(got, name), getattr(expected, name), TOLERANCE):
            raise RuntimeError(f"their {different} ({name})")
    if not torch.equal(got.exit_index, expected.exit_index):
        raise RuntimeError("they take other exits than without graphs")


def _described(made: Graphs) -> str:
    return (
        f"{len(made.replays)} CUDA graphs, {len(made.sizes)} batch sizes up to {made.capacity}, "
        f"{made.queues} under way at a time, {made.megabytes:.0f} MB{', survivors read in place' if made.used else ''}"
    )


def _with_reads(stages: tuple[StagePlan, ...], made: Graphs) -> tuple[StagePlan, ...]:
    """The rows of the plan's table, with what happens at the exits of the largest batch."""
    n = made.capacity
    queues = queues_for(n, made.policies)
    path = made.policies[queues - 1].path(ceil(n / queues))
    rows = [replace(row, note=f"{row.note}; {what}") for row, what in zip(stages, path, strict=True)]
    return with_times(rows, [seconds[-1] for seconds in made.policies[0].times.stages])


def _costs(net: EarlyExitNet, made: Graphs, survivors: list[float]) -> list[str]:
    """What the images of a batch cost in MACs and in time, by its stages; nothing where no survivors are known."""
    if not survivors:
        return []
    reached = [1.0, *accumulate(survivors, mul)]
    seconds = [spent[-1] for spent in made.policies[0].times.stages]
    in_time = sum(part * share for part, share in zip(seconds, reached, strict=True)) / sum(seconds)
    leaving = [here - on for here, on in zip(reached, [*reached[1:], 0.0], strict=True)]
    in_macs = sum(share * float(cost) for share, cost in zip(leaving, net.cost, strict=True))
    return [f"the mean cost of the example inputs is {in_macs:.2f} in MACs and {in_time:.2f} in the time of the stages"]


def survivors_of(net: EarlyExitNet, example_inputs: Tensor | None) -> list[float]:
    """Share of the arriving rows that goes on at each early exit; empty where there are no example inputs."""
    if example_inputs is None or len(example_inputs) == 0:
        return []
    taken = net.first_exits(example_inputs.to(next(net.parameters()))).exit_index
    arriving = [int((taken >= i).sum()) for i in range(net.num_exits + 1)]
    return [on / at if at else SURVIVORS for at, on in itertools.pairwise(arriving)]


def forget() -> None:
    """Give cached memory back to the device."""
    torch.cuda.empty_cache()
