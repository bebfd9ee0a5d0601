"""Workloads → rows, on any device: answers checked, then all ways timed in turns, within a budget of seconds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from cases import Case, Checked, check
from progress import track
from rows import NetworkRow, Record, append, first_line, name_of
from runtime_process import Answer, PeerError, note_of
from subjects import Network, Subject
from workloads import Workload

from eefast.cost import macs
from eefast.measure import time_costs
from eefast.measure.comparison import FLIP_MARGIN
from eefast.measure.time_costs import TimeCosts
from eefast.measure.timing import in_turns, quantiles
from eefast.model import EarlyExitNet
from eefast.thresholds.outputs import collect

ROUNDS, TRACE_SECONDS = 7, 8


Way = Any
"""A `peers.Peer`, or what else has its fields `name`, `static`, `dtype` and `stand_in`."""


@dataclass(frozen=True)
class Budget:
    """seconds: of the whole run, which end at `deadline` on the clock of `time.perf_counter`."""

    seconds: float = float("inf")
    deadline: float = float("inf")

    @property
    def note(self) -> str:
        return f"skipped: the budget of {self.seconds:.0f} s is spent"

    def spent(self, needed: float = 0.0) -> bool:
        return time.perf_counter() + needed > self.deadline


@dataclass(frozen=True)
class CheckedWay:
    """A way in a case, its answers found to be right; fields: of its row, known from then on."""

    way: Way
    case: Case
    checked: Checked
    fields: dict[str, Any]


@dataclass
class Timing:
    """spans: seconds per batch and mean cost, round by round; joules: per batch, where they are counted meanwhile.

    note: why it could not be timed, "" where it was.
    """

    spans: list[tuple[float, float]] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    note: str = ""


Measured = Sequence[tuple[CheckedWay, NetworkRow]]


class Device(Protocol):
    """The ways that a device has, and what measuring means there.

    dtype: of the ways without exits that others are measured against.
    clock: the name in `time` of what times.
    adapts: whether guesses of seconds follow what workloads before took, and a spent budget ends one that has begun.
    """

    dtype: torch.dtype = torch.float32
    clock: str = "perf_counter"
    adapts: bool = True
    _in_time: tuple[tuple[Network, int], TimeCosts | None] | None = None

    def subject(self, work: Workload, works: Sequence[Workload]) -> Subject:
        """The network and its images, made once for workloads that follow one another; works: all of the run."""
        ...

    def pairs(self, work: Workload, subject: Subject) -> Iterable[tuple[Way, Case]]:
        """Which way is measured in which case."""
        ...

    def answer(self, way: Way, case: Case) -> Answer:
        """To all batches of the case, from a way that is made for it; may raise."""
        ...

    def batches_per_turn(self, ways: Sequence[CheckedWay]) -> int: ...

    def seconds(self, one: CheckedWay, turn: Sequence[int]) -> tuple[float, float | None]:
        """Seconds and, where they are counted, joules per batch of those with the numbers `turn`.

        Raises `PeerError` where the way is lost.
        """
        ...

    def losses(self, way: Way) -> int:
        """How often what was made for the way was lost."""
        return 0

    def more(self, work: Workload, one: CheckedWay, best: CheckedWay | None) -> dict[str, Any]:
        """Further fields of the row, measured after all ways were timed; best: the fastest without exits."""
        return {}

    def time_costs(self, work: Workload, subject: Subject) -> TimeCosts | None:
        """What the exits cost in time, in batches of the workload; measured once for workloads that follow one another.

        None where no image is to exit early, and where the stages cannot be run alone.
        """
        if work.costs == (1.0,):
            return None
        key = work.network, work.batch_size
        if self._in_time is None or self._in_time[0] != key:
            self._in_time = key, None
            try:
                images, clock = subject.images[: work.batch_size], getattr(time, self.clock)
                self._in_time = key, time_costs.measured(subject.net, images, self.dtype, clock)
            except Exception as error:  # what was timed stays, whatever a stage alone meets
                print(f"{work}: no costs in time: {first_line(error)}", file=sys.stderr)
        return self._in_time[1]

    def traced(self, measured: Measured) -> list[NetworkRow]:
        """The rows again, with fields whose measurement slows down whatever is timed after it."""
        return []

    def close(self) -> None:
        return None


def run(works: Sequence[Workload], around: Record, seconds: float, device: Device) -> None:
    """Measure what fits into `seconds`, one workload after the other; rows go to the file of this machine.

    Where guesses adapt, a workload takes its guess × how much longer than guessed those before it took.
    """
    begin, guessed, taken = time.perf_counter(), 0.0, 0.0
    budget = Budget(seconds, begin + seconds)
    traces: list[Measured] = []
    try:
        for work in track(works, "networks"):
            now = time.perf_counter()
            pace = taken / guessed if guessed and device.adapts else 1.0
            if budget.spent(work.guess * pace + (TRACE_SECONDS if traces or work.traced else 0)):
                append([skipped(work, device.dtype, budget.note)], around)
                continue
            try:
                subject = device.subject(work, works)
                rows, measured = measure(work, subject, device, budget if device.adapts else Budget())
            except Exception as error:  # one network that cannot be made, or measured, is no reason to lose the others
                rows, measured = [skipped(work, device.dtype, first_line(error))], []
            append(rows, around)
            traces += [measured] if work.traced and measured else []
            guessed, taken = guessed + work.guess, taken + time.perf_counter() - now
        for measured in track(traces, "traces"):
            if not budget.spent():
                append(device.traced(measured), around)
    finally:
        device.close()


@torch.no_grad()
def measure(
    work: Workload, subject: Subject, device: Device, budget: Budget = Budget()
) -> tuple[list[NetworkRow], Measured]:
    """All rows, and the ways that were timed with theirs."""
    rows, right = [], []
    for way, case, found, note in answers(list(device.pairs(work, subject)), device, budget):
        if found is None:
            rows.append(NetworkRow(**_shape(work, way, case), checked=False, note=note))
        else:
            right.append(found)
    # Before what the budget may end: without it no row tells what its exits cost in time.
    in_time = None if budget.spent() else device.time_costs(work, subject)
    timings = timed(right, device, budget)
    rows += [
        NetworkRow(**_shape(work, one.way, one.case), checked=True, note=timing.note)
        for one, timing in zip(right, timings, strict=True)
        if timing.note
    ]
    finished = [(one, timing) for one, timing in zip(right, timings, strict=True) if not timing.note]
    float_, int8 = (fastest(finished, dtype) for dtype in (device.dtype, torch.int8))
    measured = []
    for one, timing in finished:
        best, across = (int8, float_) if one.way.dtype == torch.int8 else (float_, int8)
        measured.append((one, _row(work, one, timing, best, across, device, in_time)))
    return rows + [row for _, row in measured], measured


def answers(
    pairs: Sequence[tuple[Way, Case]], device: Device, budget: Budget
) -> list[tuple[Way, Case, CheckedWay | None, str]]:
    """What all ways answer, each as it can still be timed: one that was lost to another is asked again."""
    found: dict[int, tuple[CheckedWay | None, str]] = {}
    losses: dict[int, int] = {}
    waiting = list(range(len(pairs)))
    while waiting:
        for i in waiting:
            way, case = pairs[i]
            try:
                found[i] = (None, budget.note) if budget.spent() else answered(way, case, device)
            except Exception as error:  # whatever a way makes of its answer, the others are asked, too
                found[i] = None, note_of(error)
            losses[i] = device.losses(way)
        waiting = [i for i, (one, _) in found.items() if one and losses[i] < device.losses(pairs[i][0])]
    return [(*pairs[i], *found[i]) for i in range(len(pairs))]


def answered(way: Way, case: Case, device: Device) -> tuple[CheckedWay | None, str]:
    answer = device.answer(way, case)
    asked = case if way.stand_in is None else in_its_place(way.stand_in, case)
    checked, note = check(asked, answer.logits, answer.exits, way.dtype)
    if checked is None:
        return None, note
    if asked is not case:
        stand_in, whole = (macs(net.plain(), net.input_shape)[0] for net in (asked.net, case.net))
        checked = replace(checked, costs=(stand_in / whole,) * len(checked.costs))
    fields = {name: getattr(answer, name) for name in ("setup_seconds", "details", "peak_memory")}
    return CheckedWay(way, case, checked, fields), ""


def in_its_place(other: Callable[[EarlyExitNet], EarlyExitNet], case: Case) -> Case:
    """The same images for another network."""
    net = other(case.net)
    outputs, _ = collect(net, [(x, torch.zeros(len(x))) for x in case.batches])
    return replace(case, net=net, outputs=outputs)


def timed(right: Sequence[CheckedWay], device: Device, budget: Budget) -> list[Timing]:
    """Each way once per round, on the same batches; one whose note says why needs no further turn."""
    found = [Timing() for _ in right]
    count = device.batches_per_turn(right) if right else 0

    def turn(one: CheckedWay, timing: Timing, number: int) -> None:
        if timing.note or budget.spent():
            timing.note = timing.note or budget.note
            return
        batches = [(number * count + j) % len(one.case.batches) for j in range(count)]
        try:
            seconds, joules = device.seconds(one, batches)
        except PeerError as error:
            timing.note = str(error)
            return
        timing.spans.append((seconds, statistics.mean(one.checked.costs[i] for i in batches)))
        timing.joules += [] if joules is None else [joules]

    for number in range(ROUNDS):
        in_turns([partial(turn, *pair, number) for pair in zip(right, found, strict=True)], number)
    return found


def fastest(measured: Sequence[tuple[CheckedWay, Timing]], dtype: torch.dtype) -> tuple[CheckedWay, Timing] | None:
    """The way with the least median time without exits, of the same network and in `dtype`: the yardstick."""
    static = [(one, timing) for one, timing in measured if one.way.static and one.way.dtype == dtype]
    static = [(one, timing) for one, timing in static if one.way.stand_in is None]
    return min(static, key=lambda one: statistics.median(s for s, _ in one[1].spans), default=None)


Timed = tuple[CheckedWay, Timing]


def _row(
    work: Workload, one: CheckedWay, timing: Timing, best: Timed | None, across: Timed | None, device: Device,
    in_time: TimeCosts | None,
) -> NetworkRow:  # fmt: skip
    """best, across: the fastest without exits of the way's precision and of the other one."""
    speeds = [work.batch_size / s for s, _ in timing.spans]
    joules = statistics.median(timing.joules) / work.batch_size if timing.joules else None
    fields = {**one.fields, "joules_per_image": joules, **device.more(work, one, best and best[0])}
    if in_time and one.way.dtype != torch.int8 and len(one.checked.exits) == len(in_time.cost):
        fields |= {"time_cost": in_time.mean(one.checked.exits), "time_way": in_time.way}
    return NetworkRow(
        **_shape(work, one.way, one.case),
        checked=True,
        images_per_s=quantiles(speeds, (0.2, 0.5, 0.8)),  # type: ignore[arg-type]
        mean_cost=statistics.mean(c for _, c in timing.spans),
        realised_ratio=_ratio(timing, best),
        best_static=best and best[0].way.name,
        across_ratio=_ratio(timing, across),
        across_static=across and across[0].way.name,
        other_answers=one.checked.other_answers,
        exits=one.checked.exits,
        flips=one.checked.flips,
        flip_margin=FLIP_MARGIN[one.way.dtype],
        **fields,
    )


def _ratio(timing: Timing, best: Timed | None) -> float | None:
    """Median over rounds of mean cost × time of the best ÷ time."""
    if best is None:
        return None
    return statistics.median(c * b / s for (s, c), (b, _) in zip(timing.spans, best[1].spans, strict=True))


def skipped(work: Workload, dtype: torch.dtype, note: str) -> NetworkRow:
    name = "all ways, torch.compile among them" if work.compile_seconds else "all ways"
    return NetworkRow(work.network.name, name, work.batch_size, name_of(dtype), (), False, note, setting=work.setting)


def _shape(work: Workload, way: Way, case: Case) -> dict[str, Any]:
    return {
        "network": work.network.name,
        "provider": way.name,
        "batch_size": work.batch_size,
        "dtype": name_of(way.dtype),
        "mix": case.mix,
        "setting": case.setting,
    }
