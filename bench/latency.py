"""How long an image waits: MLPerf's Offline, Server (Poisson arrivals) and SingleStream scenarios on this CPU."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from guard import CASES, THREADS, Case
from guard import prepared as prepare_case
from peers import Peer, Run, eager, eefast_engines, masked, onnx_runtime
from prepared import Prepared, check
from progress import track
from report import failures, show
from rows import LatencyRow, append, environment, first_line, now, read, results_file
from torch import Tensor

import eefast

OFFLINE, SERVER, SINGLE = "Offline", "Server", "SingleStream"
# Of the capacity of the plain network, which all are offered, and of a way's own.
LOADS = (0.3, 0.6, 0.9)
MOST, ROUNDS, OFFLINE_SHARE = 64, 2, 0.1
# Threads that spin after a call have stopped by then.
PAUSE_SECONDS = 0.06
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Way:
    """One way to run a network, its answers found to be right, with its images as it wants them to lie.

    stream: batches → an iterator of answers, where it takes batches ahead of its answers: fit for Offline alone.
    """

    name: str
    static: bool
    images: Tensor
    run: Run
    stream: Callable[[Sequence[Tensor]], Iterator[Any]] | None = None
    details: str = ""

    def all(self, batches: Sequence[Tensor]) -> list[Any]:
        return [self.run(x) for x in batches] if self.stream is None else list(self.stream(batches))


@dataclass
class Served:
    """What a run of the server saw: seconds per image from arrival to answer, images per batch, seconds in all."""

    waits: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Served) -> None:
        self.waits += other.waits
        self.batches += other.batches
        self.seconds += other.seconds


def plain() -> Peer:
    """The network without exits, by the best that is installed."""
    return onnx_runtime.PEER if all(map(find_spec, onnx_runtime.NEEDS)) else eager.PEER


def ways(ready: Prepared) -> Iterator[tuple[str, Callable[[], Way]]]:
    """(name, how to make it), plain first."""
    images = torch.cat(list(ready.batches))

    def of(peer: Peer) -> Way:
        laid = images.contiguous(memory_format=peer.memory_format)
        return Way(peer.name, peer.static, laid, peer.prepare(ready.net), details=peer.describe())

    def stream() -> Way:
        fast = eefast.accelerate(ready.net, frozen=True)
        return Way("eefast stream", False, images, fast, fast.stream, eefast_engines.describe())

    def call() -> Way:
        run = eefast_engines.prepare(ready.net, "auto", torch.float32)
        return Way("eefast call", False, images, run, details=eefast_engines.describe())

    for peer in (plain(), masked.PEER):
        yield peer.name, lambda peer=peer: of(peer)
    yield "eefast call", call
    yield "eefast stream", stream


def wrong(ready: Prepared, way: Way, most: int) -> str:
    """What is wrong with the answers, in batches of `most` and alone; nothing where they are right."""
    for size in (most, 1):
        parts = way.images.split(size)
        answers = way.all(parts)
        if way.static:
            logits = torch.cat([answer.clone() for answer in answers])
            taken = torch.full((len(logits),), ready.net.num_exits)
        else:
            logits, taken = (torch.cat([getattr(a, name) for a in answers]) for name in ("logits", "exit_index"))
        _, note = check(ready, way.static, logits, taken, torch.float32)
        if note:
            return note
    return ""


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process with `rate` events a second, the same ones for the same seed; at least one."""
    chance, found = random.Random(seed), [0.0]
    while (after := found[-1] + chance.expovariate(rate)) < seconds:
        found.append(after)
    return found


def serve(run: Run, images: Tensor, times: Sequence[float], most: int) -> Served:
    """Answer image after image, in batches of what has arrived when the last batch is done.

    The clock of an image starts when it arrives, whether anybody is free to see it or not.
    """
    seen, first = Served(), 0
    begin = time.perf_counter()
    while first < len(times):
        now = time.perf_counter() - begin
        if times[first] > now:
            time.sleep(times[first] - now)
            continue
        last, at = first, first % len(images)
        # Neighbours in memory make a batch without a copy, so the ring of images ends one.
        room = min(most, len(images) - at, len(times) - first)
        while last < first + room and times[last] <= now:
            last += 1
        run(images[at : at + last - first])
        done = time.perf_counter() - begin
        seen.waits += [done - times[i] for i in range(first, last)]
        seen.batches.append(last - first)
        first = last
    seen.seconds = time.perf_counter() - begin
    return seen


def back_to_back(run: Run, images: Tensor, seconds: float) -> Served:
    """One image after the other, each as soon as the last one is answered."""
    seen, begin = Served(), time.perf_counter()
    while not seen.waits or seen.seconds < seconds:
        at = len(seen.waits) % len(images)
        start = time.perf_counter()
        run(images[at : at + 1])
        seen.seconds = time.perf_counter() - begin
        seen.waits.append(time.perf_counter() - start)
        seen.batches.append(1)
    return seen


def capacity(way: Way, most: int, seconds: float) -> float:
    """Images/s where all are there: median over passes."""
    batches, spans = way.images.split(most), []
    begin = time.perf_counter()
    while len(spans) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        way.all(batches)
        spans.append(time.perf_counter() - start)
    return len(way.images) / statistics.median(spans)


def quantiles(waits: Sequence[float]) -> tuple[float, float, float]:
    """In milliseconds."""
    found = torch.tensor(waits, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)) * 1e3
    return tuple(found.tolist())


@torch.no_grad()
def measure(case: Case, most: int, seconds: float) -> list[LatencyRow]:
    """All ways in all scenarios at one network, in about so many seconds besides what setting up takes."""
    ready, rows, found = prepare_case(case), [], []

    def row(scenario: str, name: str, checked: bool = True, **more: Any) -> LatencyRow:
        setting = "own thresholds" if case.cost is None else f"cost {case.cost:g}"
        return LatencyRow(scenario, case.network.name, name, setting, most, checked, **more)

    for name, make in ways(ready):
        try:
            way = make()
            note = wrong(ready, way, most)
            # A server has met all sizes before; some runtimes plan for each of them anew.
            for n in range(1, most + 1):
                way.run(way.images[:n])
        except Exception as error:
            note = first_line(error)
        if note:
            rows.append(row(OFFLINE, name, False, note=note))
        else:
            found.append(way)
    speeds = [capacity(way, most, OFFLINE_SHARE * seconds / len(found)) for way in found]
    for way, speed in zip(found, speeds, strict=True):
        rows.append(row(OFFLINE, way.name, images_per_s=speed, images=len(way.images), details=way.details))
    base = next((speed for way, speed in zip(found, speeds, strict=True) if way.static), None)
    runs: list[tuple[Way, float | None]] = []
    for way, speed in zip(found, speeds, strict=True):
        if way.stream is not None:
            note = "reads batches ahead of its answers, so it fits Offline alone"
            rows.append(row(SERVER, way.name, note=note))
            continue
        # Everybody is offered the same share of the plain network's capacity, and then of what is its own.
        rates = {share * of for share in LOADS for of in (base, speed) if of is not None and share * of < speed}
        runs += [(way, None), *((way, rate) for rate in sorted(rates))]
    for (way, rate), seen in zip(runs, timed(runs, most, (1 - OFFLINE_SHARE) * seconds), strict=True):
        scenario = SINGLE if rate is None else SERVER
        rows.append(
            row(
                scenario,
                way.name,
                load=None if rate is None or base is None else rate / base,
                offered=rate,
                images_per_s=len(seen.waits) / seen.seconds,
                milliseconds=quantiles(seen.waits),
                images=len(seen.waits),
                batch=statistics.mean(seen.batches),
                details=way.details,
            )
        )
    return rows


def timed(runs: Sequence[tuple[Way, float | None]], most: int, seconds: float) -> list[Served]:
    """One `Served` per (way, images/s; None: back to back), in rounds that go forth and back."""
    found, each = [Served() for _ in runs], seconds / max(len(runs) * ROUNDS, 1)
    for r in range(ROUNDS):
        order = list(range(len(runs)))[:: 1 if r % 2 == 0 else -1]
        for i in order:
            way, rate = runs[i]
            time.sleep(PAUSE_SECONDS)
            way.run(way.images[:1])
            if rate is None:
                found[i].add(back_to_back(way.run, way.images, each))
            else:
                found[i].add(serve(way.run, way.images, arrivals(rate, each, r), most))
    return found


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = (CASES[0], CASES[-1])) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90, help="for all networks, besides setting up; default 90")
    parser.add_argument("--most", type=int, default=MOST, help=f"images answered together at most; default {MOST}")
    parser.add_argument("--only", default="", metavar="TEXT", help="networks with this in their name")
    asked = parser.parse_args(arguments)
    if asked.seconds <= 0 or asked.most < 1:
        parser.error(f"--seconds {asked.seconds} must be above 0, --most {asked.most} at least 1")
    torch.set_num_threads(THREADS)
    chosen = [case for case in cases if asked.only in case.network.name]
    if not chosen:
        parser.error(f"--only {asked.only!r} is in none of {', '.join(case.network.name for case in cases)}")
    begin, around = now(), environment("cpu")
    for case in track(chosen, "networks"):
        append(measure(case, asked.most, asked.seconds / len(chosen)), around)
    rows = read([results_file(around)], since=begin)
    print(show(rows))
    return int(failures(rows))


if __name__ == "__main__":
    sys.exit(main())
