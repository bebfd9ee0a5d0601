"""How long an image waits: MLPerf's Offline, Server (Poisson arrivals) and SingleStream scenarios on this CPU."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from cases import Case, check, joined
from command import conclude
from guard import CASES, THREADS, GuardCase
from guard import prepared as prepare_case
from peers import EAGER, MASKED, ONNX_RUNTIME, Peer, Run, eefast_engines
from progress import track
from rows import LatencyRow, append, environment, first_line
from torch import Tensor

import eefast
from eefast.measure.timing import PAUSE_SECONDS, in_turns, mean_seconds, quantiles

OFFLINE, SERVER, SINGLE = "Offline", "Server", "SingleStream"
# Of the capacity of the plain network, which all are offered, and of a service's.
LOADS = (0.3, 0.6, 0.9)
MOST, ROUNDS, OFFLINE_SHARE = 64, 2, 0.1
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Service:
    """One way to run a network, its answers found to be right, with its images in the layout that it wants.

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
    return ONNX_RUNTIME if all(map(find_spec, ONNX_RUNTIME.needs)) else EAGER


def services(ready: Case) -> Iterator[tuple[str, Callable[[], Service]]]:
    """(name, how to make it), plain first."""
    images = torch.cat(list(ready.batches))

    def of(peer: Peer) -> Service:
        in_layout = images.contiguous(memory_format=peer.memory_format)
        return Service(peer.name, peer.static, in_layout, peer.prepare(ready.net), details=peer.describe())

    def stream() -> Service:
        fast = eefast.accelerate(ready.net, frozen=True)
        return Service("eefast stream", False, images, fast, fast.stream, eefast_engines.describe())

    for peer in (plain(), MASKED, eefast_engines.AUTO):
        yield peer.name, partial(of, peer)
    yield "eefast stream", stream


def wrong(ready: Case, service: Service, most: int) -> str:
    """What is wrong with the answers, in batches of `most` and alone; nothing where they are right."""
    for size in (most, 1):
        answers = joined(service.all(service.images.split(size)), service.static)
        _, note = check(ready, *answers, torch.float32)
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

    The clock of an image starts when it arrives, whether the server is free or not.
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


def capacity(service: Service, most: int, seconds: float) -> float:
    """Images/s where all are there: median over passes."""
    batches, begin = service.images.split(most), time.perf_counter()
    spans: list[float] = []
    while len(spans) < 3 or time.perf_counter() - begin < seconds:
        spans.append(mean_seconds(lambda: service.all(batches)))
    return len(service.images) / statistics.median(spans)


@torch.no_grad()
def measure(case: GuardCase, most: int, seconds: float) -> list[LatencyRow]:
    """All services in all scenarios at one network; seconds: of measuring, besides what setting up takes."""
    ready, rows, found = prepare_case(case), [], []

    def row(scenario: str, name: str, checked: bool = True, **more: Any) -> LatencyRow:
        setting = "own thresholds" if case.cost is None else f"cost {case.cost:g}"
        return LatencyRow(scenario, case.network.name, name, setting, most, checked, **more)

    for name, make in services(ready):
        try:
            service = make()
            note = wrong(ready, service, most)
            # A server has met all sizes before; some runtimes plan again for each of them.
            for n in range(1, most + 1):
                service.run(service.images[:n])
        except Exception as error:
            note = first_line(error)
        if note:
            rows.append(row(OFFLINE, name, False, note=note))
        else:
            found.append(service)
    speeds = [capacity(service, most, OFFLINE_SHARE * seconds / len(found)) for service in found]
    for service, speed in zip(found, speeds, strict=True):
        rows.append(row(OFFLINE, service.name, images_per_s=speed, images=len(service.images), details=service.details))
    base = next((speed for service, speed in zip(found, speeds, strict=True) if service.static), None)
    runs: list[tuple[Service, float | None]] = []
    for service, speed in zip(found, speeds, strict=True):
        if service.stream is not None:
            note = "reads batches ahead of its answers, so it fits Offline alone"
            rows.append(row(SERVER, service.name, note=note))
            continue
        # The same shares of the plain network's capacity for all services, and then of each service's capacity.
        rates = {share * of for share in LOADS for of in (base, speed) if of is not None and share * of < speed}
        runs += [(service, None), *((service, rate) for rate in sorted(rates))]
    for (service, rate), seen in zip(runs, timed(runs, most, (1 - OFFLINE_SHARE) * seconds), strict=True):
        scenario = SINGLE if rate is None else SERVER
        rows.append(
            row(
                scenario,
                service.name,
                load=None if rate is None or base is None else rate / base,
                offered=rate,
                images_per_s=len(seen.waits) / seen.seconds,
                milliseconds=quantiles([1e3 * seconds for seconds in seen.waits], QUANTILES),
                images=len(seen.waits),
                batch=statistics.mean(seen.batches),
                details=service.details,
            )
        )
    return rows


def timed(runs: Sequence[tuple[Service, float | None]], most: int, seconds: float) -> list[Served]:
    """One `Served` per (service, images/s; None: back to back), in turns."""
    found, each = [Served() for _ in runs], seconds / max(len(runs) * ROUNDS, 1)

    def turn(service: Service, rate: float | None, number: int) -> Served:
        time.sleep(PAUSE_SECONDS)
        service.run(service.images[:1])
        if rate is None:
            return back_to_back(service.run, service.images, each)
        return serve(service.run, service.images, arrivals(rate, each, number), most)

    for number in range(ROUNDS):
        for seen, more in zip(found, in_turns([partial(turn, *run, number) for run in runs], number), strict=True):
            seen.add(more)
    return found


def main(arguments: Sequence[str] | None = None, cases: Sequence[GuardCase] = (CASES[0], CASES[-1])) -> int:
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
    around = environment("cpu")
    for case in track(chosen, "networks"):
        append(measure(case, asked.most, asked.seconds / len(chosen)), around)
    return conclude(around)


if __name__ == "__main__":
    sys.exit(main())
