"""Whole networks on a GPU → rows: thresholds for a mix of exits, answers checked, then all ways timed in turns."""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any
from unittest import mock

import torch
from energy import meter
from launch_gaps import busy_seconds, host_waits
from network_rows import Measured, fastest, network_rows
from peak_memory import peak_memory
from peers import batch_condition
from progress import track
from rows import NetworkRow, Record, append, first_line
from selection import NO_EXITS, OWN_THRESHOLDS
from subjects import LARGE, MIDDLE, Checked, Network, Prepared, check, mix_of_cost, network_on_noise, thresholds
from torch import Tensor

import eefast
from eefast.measure import baselines
from eefast.measure.baselines import Run
from eefast.measure.timing import in_turns, mean_seconds
from eefast.result import ExitOutput, ExitResult
from eefast.thresholds.outputs import exits_taken

ROUNDS = 7
ROUND_SECONDS, MOST_BATCHES = 0.05, 32
ALL_SECONDS = 0.7
"""Of a round of all ways, where there are many slow ones."""
CALIBRATED = 1024
"""Images that give BatchNorm its statistics, where they are small."""
TRACED_BATCHES, TRACE_SECONDS = 4, 8
METERED_SECONDS = 1.0
"""Of each way whose energy is measured: NVML's counter moves ten times in it."""
METERED = ("masked, PyTorch", "eefast compact", "eefast resident")
"""Ways whose energy is measured, beside the best static one."""
DEVICE, DTYPE = "cuda", torch.float16

RunAll = Callable[[Sequence[Tensor]], Sequence[Any]]


@dataclass(frozen=True)
class GpuWork:
    """One network at one batch size.

    cost: mean cost that the thresholds are to give, all ways compared; None: the thresholds of the network, fewer ways.
    compile_seconds: a guess of what torch.compile takes; 0: measure without it.
    stage_seconds: the same for torch.compile stage by stage.
    seconds: a guess of what the rest takes. With less of the budget left the work is skipped.
    traced: also look for the gaps in which the GPU does nothing. metered: also measure what energy the work takes.
    """

    network: Network
    batch_size: int
    cost: float | None = None
    compile_seconds: float = 0
    stage_seconds: float = 0
    seconds: float = 6
    traced: bool = False
    metered: bool = False

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", {self.setting}"
        compiled = ", compiled" * bool(self.compile_seconds) + " by stage" * bool(self.stage_seconds)
        return f"{self.network.name}, batch {self.batch_size}{cost}{compiled}"

    @property
    def setting(self) -> str:
        if self.network.real is not None:
            return OWN_THRESHOLDS
        return "" if self.cost is None else NO_EXITS if self.cost == 1 else f"cost {self.cost:g}"

    @property
    def guess(self) -> float:
        return self.seconds + self.compile_seconds + self.stage_seconds


# Mean costs of 0.20; below the same networks where no image exits early.
SMALL = Network("eenet20", (3, 32, 32), 10, (0.76, 0.18, 0.06))
DEEP = Network("eenet110", (3, 32, 32), 10, (0.29, 0.2, 0.15, 0.1, 0.075, 0.055, 0.04, 0.025, 0.065))
SMALL_DENSE = Network("eenet20", (3, 32, 32), 10, (0.0, 0.0, 1.0))
DEEP_DENSE = Network("eenet110", (3, 32, 32), 10, (0.0,) * 8 + (1.0,))
# Here the cost of the work says how many images exit early; the mix only says how many exits there are.
ATTACHED = Network("regnety_008", (3, 224, 224), 1000, (0.0, 0.0, 0.0, 1.0), exits=("s1", "s2", "s3"))
COSTS = (0.4, 0.3, 1.0)

# By engine. What matters most comes first, since the budget of seconds may end before the list does.
RESIDENT_WORK = (
    *(GpuWork(SMALL, 4096, compile_seconds=15, seconds=10, metered=True), GpuWork(SMALL, 256, compile_seconds=15)),
    *(GpuWork(SMALL_DENSE, 4096), GpuWork(DEEP_DENSE, 4096, seconds=8)),
    *(GpuWork(DEEP, 4096, seconds=16, metered=True), GpuWork(DEEP, 256)),
    *(GpuWork(SMALL, 16), GpuWork(SMALL, 1), GpuWork(DEEP, 16), GpuWork(DEEP, 1)),
    *(GpuWork(DEEP, 4096, compile_seconds=90, seconds=12), GpuWork(DEEP, 256, compile_seconds=90)),
)
# Of one network and batch size in a row, torch.compile works once.
KEY_COMPACT_WORK = (
    GpuWork(LARGE, 256, 0.4, compile_seconds=25, seconds=23, traced=True, metered=True),
    GpuWork(LARGE, 256, 1.0, compile_seconds=1, seconds=15, traced=True),
    GpuWork(LARGE, 32, 0.4, compile_seconds=15, seconds=9, traced=True),
    GpuWork(MIDDLE, 1024, 0.3, compile_seconds=12, seconds=15, traced=True, metered=True),
)
COMPACT_WORK = (
    *KEY_COMPACT_WORK,
    GpuWork(MIDDLE, 1024, 0.3, compile_seconds=8, stage_seconds=25, seconds=12),
    GpuWork(LARGE, 256, 0.4, compile_seconds=8, stage_seconds=45, seconds=20),
    GpuWork(ATTACHED, 256, 0.4, compile_seconds=30, seconds=25),
    *(GpuWork(MIDDLE, 1024, cost, compile_seconds=8, seconds=12) for cost in (0.4, 1.0)),
    GpuWork(LARGE, 256, 0.3, seconds=18),
    *(GpuWork(MIDDLE, n, cost, seconds=8) for n in (256, 128, 32, 8, 1) for cost in COSTS),
    *(GpuWork(LARGE, 32, cost, seconds=9) for cost in (0.3, 1.0)),
    *(GpuWork(LARGE, n, cost, seconds=9) for n in (128, 8, 1) for cost in COSTS),
    *(GpuWork(ATTACHED, n, cost, seconds=12) for n in (32, 1) for cost in COSTS),
)
WORK = {"resident": RESIDENT_WORK, "compact": COMPACT_WORK}


@dataclass(frozen=True)
class Made:
    """run: batches → an `ExitResult` each, or the logits alone of a static way. fast: eefast's module that runs."""

    run: RunAll
    fast: Any = None

    @property
    def graphs(self) -> Any:
        return None if self.fast is None else getattr(self.fast.engine, "graphs", None)


@dataclass(frozen=True)
class CheckedRun:
    """One way to run a network, its answers found to be right; `static`: no image exits early."""

    name: str
    made: Made
    static: bool
    checked: Checked
    setup_seconds: float = 0.0
    peak_memory: int | None = None

    def run(self, batches: Sequence[Tensor]) -> Sequence[Any]:
        # To let cuDNN try out its convolutions only pays where batch sizes stay the same.
        torch.backends.cudnn.benchmark = self.static
        return self.made.run(batches)


@dataclass(frozen=True)
class Trace:
    """What is left to trace of a work: each way with its row, on a few batches."""

    measured: list[tuple[CheckedRun, NetworkRow]]
    batches: list[Tensor]


@lru_cache(maxsize=1)
def subject(network: Network, batch_size: int) -> Prepared:
    """Without the thresholds, which come with a work."""
    if network.real is not None:
        found = network.real(max(batch_size, CALIBRATED))
        net, images = found.net.to(DEVICE), found.images.to(DEVICE, DTYPE, memory_format=torch.channels_last)
    else:
        calibrated = 64 if max(network.input_shape) >= 224 else CALIBRATED
        found = network_on_noise(network, max(batch_size, calibrated), calibrated, DEVICE, DTYPE)
        net, images = found.net, found.images
    seen = min(MOST_BATCHES, len(images) // batch_size) * batch_size
    return Prepared(
        net, images[:seen].split(batch_size), [ExitOutput(*(p[:seen] for p in out)) for out in found.outputs]
    )


@torch.no_grad()
def prepare(work: GpuWork) -> tuple[Prepared, tuple[float, ...]]:
    """The network with thresholds for the work, and the mix of exits that they are to give."""
    found = subject(work.network, work.batch_size)
    if work.network.real is not None:
        taken = exits_taken(found.outputs, found.net.criterion, found.net.thresholds.cpu())
        shares = taken.bincount(minlength=found.net.num_exits + 1) / len(taken)
        return found, tuple(round(share, 4) for share in shares.tolist())
    mix = work.network.mix if work.cost is None else mix_of_cost(found.net.cost.tolist(), work.cost)
    net = copy.deepcopy(found.net)
    net.thresholds.copy_(torch.tensor(thresholds(found.outputs, mix, net.criterion.name)))
    return replace(found, net=net), mix


@lru_cache(maxsize=4)
def plain(network: Network, batch_size: int, compiled: bool, in_graph: bool) -> Any:
    """The network without exits; made once for all works with this batch size, which follow one another."""
    if in_graph:
        # With `compiled` what mode="reduce-overhead" does, without a second compilation.
        return captured(plain(network, batch_size, compiled, False), subject(network, batch_size).batches[0])
    if compiled:
        return baselines.compiled(plain(network, batch_size, False, False), freezing=False, fullgraph=True)
    return baselines.plain(subject(network, batch_size).net, DTYPE)


def one_by_one(run: Run, fast: Any = None) -> Made:
    return Made(lambda batches: [run(x) for x in batches], fast)


def makers(work: GpuWork, prepared: Prepared) -> dict[tuple[str, bool], Callable[[], Made]]:
    """(name, static) → how to make it, which may raise."""
    net = prepared.net

    def masked() -> Made:
        return one_by_one(baselines.masked(net, DTYPE))

    @cache
    def fast(engine: str, max_batch_size: int, graphs: bool) -> Any:
        # The images tell the plan how many exit at each exit, as those that a user measures on would.
        example = torch.cat(list(prepared.batches))[:256]
        with mock.patch.dict(os.environ, {} if graphs else {"EEFAST_GRAPHS": "0"}):
            return eefast.accelerate(
                net, engine=engine, dtype=DTYPE, example_inputs=example, frozen=True, max_batch_size=max_batch_size
            )

    def ours(engine: str, graphs: bool = True) -> Made:
        module = fast(engine, work.batch_size, graphs)
        return one_by_one(module, module)

    def streaming(engine: str) -> Made:
        # Survivors of small batches may wait for others, up to the default of `accelerate`.
        module = fast(engine, max(work.batch_size, 256), True)
        return Made(lambda batches: list(module.stream(batches)), module)

    def conditioned(mode: str) -> Made:
        return one_by_one(batch_condition.prepare(net, mode, DTYPE, work.batch_size))

    def static(compiled: bool, in_graph: bool) -> Made:
        return one_by_one(plain(work.network, work.batch_size, compiled, in_graph))

    without = {"plain, eager": False} | ({"plain, torch.compile": True} if work.compile_seconds else {})
    found: dict[tuple[str, bool], Callable[[], Made]] = {}
    for ending, in_graph in (("", False), (", CUDA graph", True)):
        for name, compiled in without.items():
            found[f"{name}{ending}", True] = partial(static, compiled, in_graph)
    found["masked, PyTorch", False] = masked
    found["eefast compact", False] = partial(ours, "compact")
    found["eefast resident", False] = partial(ours, "resident")
    found["eefast resident, streaming", False] = partial(streaming, "resident")
    if work.cost is not None:
        found["eefast compact, streaming", False] = partial(streaming, "compact")
        found["eefast compact, without graphs", False] = partial(ours, "compact", graphs=False)
        for mode in batch_condition.MODES:
            found[f"BatchCond, {mode}", False] = partial(conditioned, mode)
    if work.stage_seconds:
        found["torch.compile per stage", False] = lambda: one_by_one(compiled_by_stage(net))
    return found


def compiled_by_stage(net: eefast.EarlyExitNet) -> Run:
    """Every stage with its exit by torch.compile for any batch size; the host splits the batch at every exit.

    torch.compile raises where it would leave something to eager PyTorch.
    """
    # All stages share the code of one class, and each counts as a recompilation of it.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    def compiled(step: Run) -> Run:
        run = torch.compile(step, fullgraph=True)

        def call(features: Tensor) -> Any:
            torch._dynamo.maybe_mark_dynamic(features, 0)
            return run(features)

        return call

    steps = [compiled(step) for step in batch_condition.steps(net, DTYPE)]
    return batch_condition.in_steps(net, steps, lambda i, rows, survivors: True)


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


def checked(prepared: Prepared, name: str, static: bool, make: Callable[[], Made]) -> tuple[CheckedRun | None, str]:
    """The way, or None and what is wrong with its answers."""
    begin = time.perf_counter()
    torch.backends.cudnn.benchmark = static
    (made, logits, taken), memory = peak_memory(partial(first_answers, prepared, static, make), DEVICE)
    found, note = check(prepared, static, logits, taken, DTYPE)
    seconds = time.perf_counter() - begin
    return (None if found is None else CheckedRun(name, made, static, found, seconds, memory)), note


def first_answers(prepared: Prepared, static: bool, make: Callable[[], Made]) -> tuple[Made, Tensor, Tensor]:
    """What was made, and its logits and exits for all batches."""
    made = make()
    if static:
        # One after the other: a CUDA graph overwrites its results.
        logits = torch.cat([made.run([x])[0].float().cpu() for x in prepared.batches])
        return made, logits, torch.full((len(logits),), prepared.net.num_exits)
    answers = [ExitResult(*(part.cpu() for part in answer)) for answer in made.run(prepared.batches)]
    logits, taken = (torch.cat([getattr(a, n) for a in answers]) for n in ("logits", "exit_index"))
    return made, logits, taken


def timed(ways: Sequence[CheckedRun], batches: Sequence[Tensor]) -> list[list[tuple[float, float]]]:
    """Per way and round: seconds per batch and mean cost; each once per round, on the same batches."""

    def seconds(way: CheckedRun, turn: Sequence[int]) -> float:
        part = [batches[i] for i in turn]
        return mean_seconds(partial(way.run, part), wait=torch.cuda.synchronize) / len(turn)

    first = [seconds(way, [0]) for way in ways]
    count = min(max(round(min(ROUND_SECONDS / min(first), ALL_SECONDS / sum(first))), 1), MOST_BATCHES)
    found: list[list[tuple[float, float]]] = [[] for _ in ways]
    for r in range(ROUNDS):
        turn = [(r * count + j) % len(batches) for j in range(count)]
        spans = in_turns([partial(seconds, way, turn) for way in ways], r)
        for way, span, samples in zip(ways, spans, found, strict=True):
            samples.append((span, statistics.mean(way.checked.costs[i] for i in turn)))
    return found


@torch.no_grad()
def measure(work: GpuWork) -> tuple[list[NetworkRow], Trace]:
    prepared, mix = prepare(work)
    rows, right = [], []
    for (name, static), make in makers(work, prepared).items():
        try:
            way, note = checked(prepared, name, static, make)
        except Exception as error:
            way, note = None, first_line(error)
        if way is None:
            rows.append(untimed(work, name, note))
        else:
            right.append(way)
    spans = timed(right, prepared.batches) if right else []
    measured = [
        Measured(_shape(work, way.name, mix), way.checked, samples, DTYPE, way.static, {})
        for way, samples in zip(right, spans, strict=True)
    ]
    best = fastest(measured)
    metered = {*METERED, *(() if best is None else (best.shape["provider"],))} if work.metered else set()
    measured = [
        replace(one, more=_more(way, prepared.batches, way.name in metered))
        for way, one in zip(right, measured, strict=True)
    ]
    done = list(zip(right, network_rows(measured), strict=True))
    batches = [prepared.batches[i % len(prepared.batches)] for i in range(TRACED_BATCHES)]
    return rows + [row for _, row in done], Trace(done, batches)


def _more(way: CheckedRun, batches: Sequence[Tensor], metered: bool) -> dict[str, Any]:
    return {
        "setup_seconds": way.setup_seconds,
        "details": "" if way.made.fast is None else way.made.fast.plan.reason,
        "host_waits": waits(way, batches[0]),
        "peak_memory": way.peak_memory,
        "joules_per_image": joules(way, batches) if metered else None,
    }


def waits(way: CheckedRun, x: Tensor) -> int | None:
    try:
        return host_waits(partial(way.run, [x]), DEVICE, way.made.graphs)
    except Exception as error:  # what was timed stays, whatever the counter meets
        print(f"{way.name}: host waits not measured: {first_line(error)}", file=sys.stderr)
        return None


def joules(way: CheckedRun, batches: Sequence[Tensor]) -> float | None:
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


@torch.no_grad()
def traced(trace: Trace) -> list[NetworkRow]:
    """The rows again, with their launch gaps; those that the profiler says nothing about are left out."""
    rows = []
    for way, row in trace.measured:
        way.run(trace.batches)
        busy = busy_seconds(partial(way.run, trace.batches))
        if busy is not None and row.images_per_s is not None:
            seconds = row.batch_size / row.images_per_s[1]
            rows.append(replace(row, launch_gaps=max(0.0, 1 - busy / len(trace.batches) / seconds)))
    return rows


def untimed(work: GpuWork, provider: str, note: str) -> NetworkRow:
    return NetworkRow(**_shape(work, provider, work.network.mix), checked=False, note=note)


def _shape(work: GpuWork, provider: str, mix: tuple[float, ...]) -> dict[str, Any]:
    return {
        "network": work.network.name,
        "provider": provider,
        "batch_size": work.batch_size,
        "dtype": str(DTYPE).removeprefix("torch."),
        "mix": mix,
        "setting": work.setting,
    }


def run(works: Sequence[GpuWork], around: Record, seconds: float) -> None:
    begin = time.perf_counter()
    # Tracing slows down whatever is timed after it, so it comes last.
    traces: list[Trace] = []
    for work in track(works, "networks"):
        reserved = TRACE_SECONDS if traces or work.traced else 0
        if time.perf_counter() - begin + work.guess > seconds - reserved:
            name = "all ways, torch.compile among them" if work.compile_seconds else "all ways"
            append([untimed(work, name, f"skipped: the budget of {seconds:.0f} s is spent")], around)
            continue
        try:
            rows, trace = measure(work)
        except Exception as error:  # one network that cannot be made, or measured, is no reason to lose the others
            append([untimed(work, "all ways", first_line(error))], around)
            continue
        append(rows, around)
        traces += [trace] if work.traced else []
    for trace in track(traces, "traces"):
        if time.perf_counter() - begin < seconds:
            append(traced(trace), around)
