"""The ways of a GPU, in this process: made for a batch size, timed by the host's clock, traced at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cases import Case, joined, make_case
from energy import meter
from launch_gaps import busy_seconds, host_waits
from network_runs import CheckedWay, Device, Measured
from peak_memory import peak_memory
from peers import batch_condition, torch_compile_early
from rows import NetworkRow, first_line
from runtime_process import Answer
from subjects import Network, Subject, network_on_noise
from torch import Tensor
from workloads import Workload

import eefast
from eefast.measure import baselines
from eefast.measure.baselines import Run
from eefast.measure.timing import mean_seconds
from eefast.result import ExitOutput

ROUND_SECONDS, MOST_BATCHES = 0.05, 32
ALL_SECONDS = 0.7
"""Of a round of all ways, where there are many slow ones."""
CALIBRATED = 1024
"""Images that give BatchNorm its statistics, where they are small."""
TRACED_BATCHES = 4
METERED_SECONDS = 1.0
"""Of each way whose energy is measured: NVML's counter moves ten times in it."""
METERED = ("masked, PyTorch", "eefast compact", "eefast resident")
"""Ways whose energy is measured, beside the best static one."""
DEVICE, DTYPE = "cuda", torch.float16

RunAll = Callable[[Sequence[Tensor]], Sequence[Any]]


@dataclass(frozen=True)
class Made:
    """run: batches → an `ExitResult` each, or the logits alone of a static way. fast: eefast's module that runs."""

    run: RunAll
    fast: Any = None


@dataclass(frozen=True)
class GpuWay:
    """make: may raise; made once. The other fields as in `peers.Peer`."""

    name: str
    static: bool
    make: Callable[[], Made]
    dtype: torch.dtype
    stand_in: None = None

    def run(self, batches: Sequence[Tensor]) -> Sequence[Any]:
        # To let cuDNN try out its convolutions only pays where batch sizes stay the same.
        torch.backends.cudnn.benchmark = self.static
        return self.make().run(batches)


class GpuWays(Device):
    adapts = False

    def __init__(self) -> None:
        self.dtype = DTYPE

    def subject(self, work: Workload, works: Sequence[Workload]) -> Subject:
        return subject(work.network, work.batch_size)

    def pairs(self, work: Workload, subject: Subject) -> Iterator[tuple[GpuWay, Case]]:
        case = case_of(work, subject)
        for way in ways(work, case):
            yield way, case

    def answer(self, way: GpuWay, case: Case) -> Answer:
        begin = time.perf_counter()
        (logits, exits), memory = peak_memory(partial(first_answers, way, case), DEVICE)
        fast = way.make().fast
        details = "" if fast is None else fast.plan.reason
        return Answer(logits, exits, time.perf_counter() - begin, details, memory)

    def batches_per_turn(self, ways: Sequence[CheckedWay]) -> int:
        first = [self.seconds(one, [0])[0] for one in ways]
        return min(max(round(min(ROUND_SECONDS / min(first), ALL_SECONDS / sum(first))), 1), MOST_BATCHES)

    def seconds(self, one: CheckedWay, turn: Sequence[int]) -> tuple[float, float | None]:
        part = [one.case.batches[i] for i in turn]
        return mean_seconds(partial(one.way.run, part), wait=torch.cuda.synchronize) / len(turn), None

    def more(self, work: Workload, one: CheckedWay, best: CheckedWay | None) -> dict[str, Any]:
        keep_stage_times(work, one.way)
        metered = work.metered and (one is best or one.way.name in METERED)
        return {
            "host_waits": waits(one.way, one.case.batches[0]),
            "joules_per_image": joules(one.way, one.case.batches) if metered else None,
        }

    @torch.no_grad()
    def traced(self, measured: Measured) -> list[NetworkRow]:
        """With their launch gaps; those that the profiler says nothing about are left out."""
        rows = []
        for one, row in measured:
            batches = [one.case.batches[i % len(one.case.batches)] for i in range(TRACED_BATCHES)]
            one.way.run(batches)
            busy = busy_seconds(partial(one.way.run, batches))
            if busy is not None and row.images_per_s is not None:
                seconds = row.batch_size / row.images_per_s[1]
                rows.append(replace(row, launch_gaps=max(0.0, 1 - busy / TRACED_BATCHES / seconds)))
        return rows


@lru_cache(maxsize=1)
def subject(network: Network, batch_size: int) -> Subject:
    """As many images as the batches that are measured have."""
    if network.real is not None:
        found = network.real(max(batch_size, CALIBRATED))
        net, images = found.net.to(DEVICE), found.images.to(DEVICE, DTYPE, memory_format=torch.channels_last)
    else:
        calibrated = 64 if max(network.input_shape) >= 224 else CALIBRATED
        found = network_on_noise(network, max(batch_size, calibrated), calibrated, DEVICE, DTYPE)
        net, images = found.net, found.images
    seen = min(MOST_BATCHES, len(images) // batch_size) * batch_size
    return Subject(net, images[:seen], [ExitOutput(*(part[:seen] for part in out)) for out in found.outputs])


def case_of(work: Workload, subject: Subject) -> Case:
    (cost,) = work.costs
    return make_case(subject, work.batch_size, cost, mix=work.network.mix if cost is None else ())


@lru_cache(maxsize=4)
def plain(network: Network, batch_size: int, compiled: bool, in_graph: bool) -> Any:
    """The network without exits; made once for all workloads with this batch size, which follow one another."""
    if in_graph:
        # With `compiled` what mode="reduce-overhead" does, without a second compilation.
        return captured(plain(network, batch_size, compiled, False), subject(network, batch_size).images[:batch_size])
    if compiled:
        return baselines.compiled(plain(network, batch_size, False, False), freezing=False, fullgraph=True)
    return baselines.plain(subject(network, batch_size).net, DTYPE)


def ways(work: Workload, case: Case) -> list[GpuWay]:
    net, found = case.net, []

    def add(name: str, make: Callable[[], Made | Run], static: bool = False) -> None:
        def made() -> Made:
            new = make()
            return new if isinstance(new, Made) else Made(lambda batches: [new(x) for x in batches])

        found.append(GpuWay(name, static, cache(made), DTYPE))

    @cache
    def fast(engine: str, max_batch_size: int, graphs: bool = True) -> Any:
        # The images tell the plan how many exit at each exit, as those that a user measures on would.
        example = torch.cat(list(case.batches))[:256]
        with mock.patch.dict(os.environ, {} if graphs else {"EEFAST_GRAPHS": "0"}):
            return eefast.accelerate(
                net, engine=engine, dtype=DTYPE, example_inputs=example, frozen=True, max_batch_size=max_batch_size
            )

    def ours(engine: str, graphs: bool = True) -> Made:
        module = fast(engine, work.batch_size, graphs)
        return Made(lambda batches: [module(x) for x in batches], module)

    def streaming(engine: str) -> Made:
        # Survivors of small batches may wait for others, up to the default of `accelerate`.
        module = fast(engine, max(work.batch_size, 256), True)
        return Made(lambda batches: list(module.stream(batches)), module)

    for ending, in_graph in (("", False), (", CUDA graph", True)):
        for name, compiled in (("eager", False), ("torch.compile", True)):
            if work.compile_seconds or not compiled:
                make = partial(plain, work.network, work.batch_size, compiled, in_graph)
                add(f"plain, {name}{ending}", make, static=True)
    add("masked, PyTorch", partial(baselines.masked, net, DTYPE))
    add("eefast compact", partial(ours, "compact"))
    add("eefast resident", partial(ours, "resident"))
    add("eefast resident, streaming", partial(streaming, "resident"))
    if work.costs != (None,):
        add("eefast compact, streaming", partial(streaming, "compact"))
        add("eefast compact, without graphs", partial(ours, "compact", graphs=False))
        for mode in batch_condition.MODES:
            add(f"BatchCond, {mode}", partial(batch_condition.prepare, net, mode, DTYPE, work.batch_size))
    if work.stage_seconds:
        add("torch.compile per stage", partial(compiled_by_stage, net))
    return found


def compiled_by_stage(net: eefast.EarlyExitNet) -> Run:
    """torch.compile raises where it would leave something to eager PyTorch."""
    torch._dynamo.config.recompile_limit = torch_compile_early.MOST_STAGES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch_compile_early.by_stage(net, DTYPE)


def captured(call: Run, x: Tensor) -> Run:
    """In a CUDA graph for batches like `x`; each call overwrites the logits of the one before."""
    buffer = x.clone(memory_format=torch.preserve_format)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(buffer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call(buffer)

    def run(x: Tensor) -> Tensor:
        buffer.copy_(x)
        graph.replay()
        return logits

    return run


def first_answers(way: GpuWay, case: Case) -> tuple[Tensor, Tensor | None]:
    """To all batches, from a way that is made here."""
    if way.static:
        # One after the other: a CUDA graph overwrites its results.
        return joined((way.run([x])[0] for x in case.batches), static=True)
    return joined(way.run(case.batches), static=False)


def waits(way: GpuWay, x: Tensor) -> int | None:
    try:
        engine = getattr(way.make().fast, "engine", None)
        return host_waits(partial(way.run, [x]), DEVICE, getattr(engine, "graphs", None))
    except Exception as error:  # what was timed stays, whatever the counter meets
        print(f"{way.name}: host waits not measured: {first_line(error)}", file=sys.stderr)
        return None


def keep_stage_times(work: Workload, way: GpuWay) -> None:
    """In `$OUT/stage-times.ndjson`: seconds of each stage at each batch size, from which the plan is chosen."""
    graphs = getattr(getattr(way.make().fast, "engine", None), "graphs", None)
    if graphs is not None and (folder := os.environ.get("OUT")):
        found = {"network": work.network.name, "batch_size": work.batch_size, "setting": work.costs, "way": way.name}
        with (Path(folder) / "stage-times.ndjson").open("a") as file:
            file.write(json.dumps({**found, **asdict(graphs.policies[0].times)}) + "\n")


def joules(way: GpuWay, batches: Sequence[Tensor]) -> float | None:
    """Per image, over as many passes as take `METERED_SECONDS`."""
    if not meter(DEVICE).counters:
        return None

    def passes() -> int:
        begin, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - begin < METERED_SECONDS:
            way.run(batches)
            torch.cuda.synchronize()
            done += 1
        return done

    done, taken = meter(DEVICE).measure(passes)
    return None if taken is None else taken / (done * sum(map(len, batches)))
