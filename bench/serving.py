"""`eefast.serving` beside servers of whole batches: waiting times under random arrivals, rates, overload, as rows."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from json import dumps
from pathlib import Path
from typing import Any

import latency
import torch
from cases import mix_of_cost, thresholds
from http_load import Load, closed_loop, line_times, request
from progress import track
from rows import ServingRow, append, environment
from score import resident_peak, show
from subjects import spread
from torch import Tensor
from whole_batches import WholeBatches

import eefast
from eefast.data import datasets
from eefast.measure.timing import quantiles
from eefast.serving import Answer, Overloaded, Server
from eefast.serving.calls import seconds_to_exits

COST, ABOUT, LOAD, BUSY_LOAD, OVERLOAD = 0.25, 0.05, 0.6, 0.9, 3.0
CALIBRATED = 128
"""Images that give the network's BatchNorm its statistics."""

CLIENTS, MANY, MOST = 16, 64, 64
TICK = 0.002
"""Of the client that offers too much, in seconds."""

RAW = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Place:
    """A network in a folder, what is measured with it, and how long.

    images: uint8. x: the same as the network computes with them. capacity: images/s of `fast.stream`.
    exits: of each image. seconds: of each measurement in each of `rounds` rounds.
    """

    folder: Path
    model: str
    images: Tensor
    x: Tensor
    fast: eefast.Accelerated
    exits: list[int]
    capacity: float
    rounds: int
    seconds: float

    def row(self, serving: str, ratios: Sequence[tuple[float, float]], **more: Any) -> ServingRow:
        """ratios: (ours, base) of each round."""
        return ServingRow(
            serving=serving, model=self.model, ours=statistics.median(ours for ours, _ in ratios),
            base=statistics.median(base for _, base in ratios), rounds=len(ratios),
            ratio=statistics.median(ours / base for ours, base in ratios), capacity=self.capacity, **more,
        )  # fmt: skip


def prepare(folder: Path, model: str, exits: int, side: int, count: int, rounds: int, seconds: float) -> Place:
    """A network with thresholds for the mean cost on random images, written to a folder, its capacity measured."""
    info = datasets.info("cifar10")
    torch.manual_seed(0)
    shape = (3, side, side)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
    net = eefast.zoo.eenet(model, exits, input_shape=shape, normalization=(info.mean, info.std))
    x = net.prepare(images)
    with torch.no_grad():
        outputs = spread(net, x[:CALIBRATED], x.split(100))
        net.thresholds.copy_(torch.tensor(thresholds(outputs, mix_of_cost(net.cost.tolist(), COST))))
        net.save(folder)
        fast = eefast.accelerate(net, frozen=True)
        found, expected = fast(x), net(x)
    if not torch.equal(found.exit_index, expected.exit_index):
        raise ValueError("the engine's exits are not the network's; no speed is measured")
    if abs((mean := float(found.cost.mean())) - max(COST, float(net.cost[0]))) > ABOUT:
        raise ValueError(f"the mean cost is {mean:.3f}, not {COST}; no speed is measured")
    speeds = sorted(streamed(fast, x) for _ in range(5))
    return Place(folder, model, images, x, fast, found.exit_index.tolist(), speeds[2], rounds, seconds)


def streamed(fast: eefast.Accelerated, x: Tensor) -> float:
    """Images/s of `fast.stream` where all images are there."""
    begin, rounds = time.perf_counter(), 3
    for _ in fast.stream(x.repeat(rounds, 1, 1, 1).split(256)):
        pass
    return rounds * len(x) / (time.perf_counter() - begin)


@dataclass
class Seen:
    """What a client of a server saw: by image (its number, seconds from arrival to answer, its exit, its cost).

    late: seconds from arrival to `submit`, of each image. refused: images; failed: futures with an error; seconds: from
    the first arrival to the last answer; client: processor seconds of the thread that submits, those inside of `submit`
    among them.
    """

    answers: list[tuple[int, float, int, float]] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    client: float = 0.0

    def waits(self, exit_index: int | None = None) -> list[float]:
        return [wait for _, wait, at, _ in self.answers if exit_index in (None, at)]


def offered(
    server: Server | WholeBatches | Refusing,
    x: Tensor,
    times: Sequence[float],
    deadline: float | None = None,
    tick: float = 0.0,
) -> Seen:
    """Submit an image at each of these times, whatever has become of the others; its clock starts at its time.

    deadline: seconds from its time; one that passed before the image is submitted is over at once.
    tick: seconds that the client sleeps at least, where waking for every image would take the server's processor time;
    images that come meanwhile are submitted late.
    """
    seen, left, begin, used = Seen(), threading.Semaphore(0), time.perf_counter(), time.thread_time()
    accepted = 0
    for i, at in enumerate(times):
        early = begin + at - time.perf_counter()
        if early > 0:
            time.sleep(max(early, tick))

        def done(future: Any, i: int = i, at: float = at) -> None:
            now = time.perf_counter() - begin
            if future.exception() is None:
                answer = future.result()
                seen.answers.append((i, now - at, answer.exit, answer.cost))
            else:
                seen.failed += 1
            left.release()

        seen.late.append(time.perf_counter() - begin - at)
        left_over = None if deadline is None else max(deadline - seen.late[-1], 1e-9)
        try:
            server.submit(x[i % len(x)], left_over).add_done_callback(done)
            accepted += 1
        except Overloaded:
            seen.refused += 1
    for _ in range(accepted):
        left.acquire()
    seen.seconds, seen.client = time.perf_counter() - begin, time.thread_time() - used
    return seen


def check(place: Place, seen: Seen) -> None:
    """`ValueError` unless every image took its exit, once."""
    numbers = [i for i, *_ in seen.answers]
    if seen.failed or len(set(numbers)) != len(numbers):
        raise ValueError(f"{seen.failed} images failed, {len(numbers) - len(set(numbers))} were answered twice")
    wrong = sum(at != place.exits[i % len(place.exits)] for i, _, at, _ in seen.answers)
    if wrong:
        raise ValueError(f"{wrong} images took another exit than in a batch")


def shown(seconds: Sequence[float]) -> str:
    return " / ".join(f"{1e3 * q:.2f}" for q in quantiles(seconds, (0.5, 0.9, 0.99))) + " ms"


def first_exits(place: Place) -> Iterator[ServingRow]:
    """At load .6 images that exit first, and all, beside a server that answers what has arrived as a batch.

    Both have the same client, in their process; the details say what batches without any client take.
    """
    medians, tails, details = [], [], ""
    with torch.no_grad():
        for number in range(place.rounds):
            times = latency.arrivals(LOAD * place.capacity, place.seconds, number)
            with Server(place.fast, 10**6) as server:
                ours = offered(server, place.x, times)
            with WholeBatches(place.fast, MOST) as server:
                batches = offered(server, place.x, times)
            check(place, ours)
            check(place, batches)
            bare = latency.serve(place.fast, place.x, times, MOST)
            medians.append((statistics.median(ours.waits(0)), statistics.median(batches.waits(0))))
            tails.append(tuple(quantiles(seen.waits(), (0.99,))[0] for seen in (ours, batches)))
            details = (
                f"last round, 50/90/99 %: {shown(ours.waits())} beside {shown(batches.waits())}, batches without a "
                f"client {shown(bare.waits)}; submitted late by {shown(ours.late)} and {shown(batches.late)}; final "
                f"exit {shown(ours.waits(place.fast.net.num_exits))}"
            )
    base, scaled = "batches of what has arrived", lambda pairs: [(1e3 * a, 1e3 * b) for a, b in pairs]
    more: dict[str, Any] = {"load": LOAD, "checked": True, "at_most": True, "details": details}
    yield place.row("median wait, first exit", scaled(medians), unit="ms", base_name=base, bound=0.5, **more)
    yield place.row("p99 of all", scaled(tails), unit="ms", base_name=base, bound=1.1, **more)


def full_queue(place: Place) -> Iterator[ServingRow]:
    """All images are there."""
    pairs = []
    for _ in range(place.rounds):
        with Server(place.fast, 10**6) as server:
            seen = offered(server, place.x, [0.0] * (3 * len(place.x)))
        check(place, seen)
        pairs.append((len(seen.answers) / seen.seconds, streamed(place.fast, place.x)))
    yield place.row("full queue", pairs, unit="images/s", base_name="fast.stream", bound=0.8, checked=True)


class Refusing:
    """Takes no image: what a client costs that offers some."""

    def submit(self, image: Tensor, deadline: float | None = None) -> Future[Answer]:
        raise Overloaded


def overload(place: Place) -> Iterator[ServingRow]:
    """Three times the capacity for 20 s; goodput also beside the capacity of the cores less what the client takes."""
    queue, seconds = 256, 20.0
    before = resident_peak_megabytes()
    alone = offered(Refusing(), place.x, latency.arrivals(OVERLOAD * place.capacity, 3.0, 0), tick=TICK)
    taken = alone.client / alone.seconds
    with Server(place.fast, queue) as server:
        seen = offered(server, place.x, latency.arrivals(OVERLOAD * place.capacity, seconds, 0), tick=TICK)
    check(place, seen)
    goodput, tail = len(seen.answers) / seen.seconds, quantiles(seen.waits(), (0.99,))[0]
    details = (
        f"{seen.refused} refused, {len(seen.answers)} answered once, {seen.refused + len(seen.answers)} offered in "
        f"{seen.seconds:.1f} s, which took the client {seen.client:.1f} s of a core, "
        f"{taken * seen.seconds:.1f} s without a server; "
        f"peak memory {before:.0f} → {resident_peak_megabytes():.0f} MB"
    )
    more: dict[str, Any] = {"load": OVERLOAD, "checked": True, "details": details}
    yield place.row("goodput", [(goodput, place.capacity)], unit="images/s", base_name="capacity", bound=0.9, **more)
    left = place.capacity * (1 - taken / torch.get_num_threads())
    beside = "capacity less the client's time"
    yield place.row("goodput", [(goodput, left)], unit="images/s", base_name=beside, bound=0.9, **more)
    bound = 1e3 * queue / place.capacity
    yield place.row(
        "p99 of accepted",
        [(1e3 * tail, bound)],
        unit="ms",
        base_name="queue ÷ capacity",
        bound=2.0,
        at_most=True,
        **more,
    )


def resident_peak_megabytes() -> float:
    return resident_peak(os.getpid()) / 1024


def deadlines(place: Place) -> Iterator[ServingRow]:
    """At load .9, deadlines of 3 stages, the median, the mean and the longest: the share within 1.1 × the deadline."""
    to_exits = [0.0, *seconds_to_exits(place.fast.engine, time.perf_counter)]
    spans = [max(b - a, 1e-6) for a, b in pairwise(to_exits)]  # a busy machine makes some negative
    with Server(place.fast, 10**6) as server:
        alone = offered(server, place.x, [0.01 * i for i in range(100)], 1e-9).waits()
    lengths = {"median": statistics.median(spans), "mean": statistics.mean(spans), "longest": max(spans)}
    for name, stage in lengths.items():
        deadline, shares, details = 3 * stage, [], ""
        for number in range(place.rounds):
            times = latency.arrivals(BUSY_LOAD * place.capacity, place.seconds, number)
            with Server(place.fast, 10**6) as server:
                seen = offered(server, place.x, times, deadline)
            waits = seen.waits()
            shares.append((100 * sum(wait <= 1.1 * deadline for wait in waits) / len(waits), 100.0))
            cost = statistics.mean(cost for *_, cost in seen.answers)
            details = (
                f"deadline {1e3 * deadline:.2f} ms; last round: mean cost {cost:.3f}, 50/90/99 %: {shown(waits)}, "
                f"submitted late by {shown(seen.late)}; images alone, to their first exit: {shown(alone)}"
            )
        yield place.row(
            f"in time, 3 × {name} stage", shares, unit="%", base_name="all", bound=0.99, load=BUSY_LOAD, checked=False,
            details=details,
        )  # fmt: skip


@contextmanager
def running(words: Sequence[object], port: int, probe: bytes, seconds: float = 300) -> Iterator[None]:
    """A server in a process of its own, which has answered once."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
    try:
        until = time.monotonic() + seconds
        while True:
            try:
                if closed_loop(port, [probe], 1, 0.01).seconds:
                    break
            except OSError:
                pass
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{' '.join(map(str, words))} does not answer")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        # Workers of its own may outlive it, with its port.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def http(place: Place) -> Iterator[ServingRow]:
    """16 clients with single images beside LitServe, Ray Serve and a handler that does nothing; all are up at once."""
    here, peers = Path(__file__).parent / "serving_peers.py", {"empty": 0.6}
    peers |= {name: bound for name, bound in (("litserve", 2.0), ("ray", 3.0)) if find_spec(name) is not None}
    contents = [image.numpy().tobytes() for image in place.images[:256]]
    raw = [request("/v1/predict", content, RAW) for content in contents]
    bodies = [dumps({"image": b64encode(content).decode()}).encode() for content in contents]
    sent = {
        "empty": raw,
        "litserve": [request("/predict", body, {"Content-Type": "application/json"}) for body in bodies],
        "ray": [request("/", content, RAW) for content in contents],
    }
    serve = ["-m", "eefast", "serve", place.folder, "--lame-duck", 0, "--max-queue", 256, "--port"]
    for name, bound in peers.items():
        pairs: list[tuple[float, float]] = []
        details = ""
        # One peer at a time, since idle servers of others poll.
        with running([*serve, 8651], 8651, raw[0]), running([here, name, place.folder, 8652], 8652, sent[name][0]):
            closed_loop(8651, raw, CLIENTS, 1.0)
            closed_loop(8652, sent[name], CLIENTS, 1.0)
            for _ in range(place.rounds):
                ours = closed_loop(8651, raw, CLIENTS, place.seconds)
                theirs = closed_loop(8652, sent[name], CLIENTS, place.seconds)
                pairs.append((ours.per_second, theirs.per_second))
                details = f"last round, 50/90/99 %: {told(ours)} beside {told(theirs)}"
        yield place.row(
            f"HTTP, {CLIENTS} clients", pairs, unit="requests/s", base_name=name, bound=bound, checked=False,
            details=details,
        )  # fmt: skip


def told(load: Load) -> str:
    return shown(load.seconds) + (f", {load.failed} failed" if load.failed else "")


def first_line(place: Place) -> Iterator[ServingRow]:
    """When the first line of a request of 64 images comes, beside its last."""
    content = place.images[:MANY].numpy().tobytes()
    serve = ["-m", "eefast", "serve", place.folder, "--lame-duck", 0, "--port", 8651]
    single = request("/v1/predict", place.images[0].numpy().tobytes(), RAW)
    with running(serve, 8651, single):
        found = [line_times(8651, request("/v1/predict", content, RAW)) for _ in range(10 * place.rounds)]
    if any(len(times) != MANY for times in found):
        raise ValueError("a line is missing")
    pairs = [(1e3 * times[0], 1e3 * times[-1]) for times in found]
    yield place.row(
        f"first line of {MANY}", pairs, unit="ms", base_name="last line", bound=0.25, at_most=True, checked=False
    )


MEASUREMENTS: dict[str, Callable[[Place], Iterator[ServingRow]]] = {
    "first-exits": first_exits, "full-queue": full_queue, "overload": overload, "deadlines": deadlines, "http": http,
    "first-line": first_line,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="eenet110")
    parser.add_argument("--exits", type=int, default=8, help="early ones; default 8")
    parser.add_argument("--side", type=int, default=32, help="pixels; default 32")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement in each round; default 5")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    asked = parser.parse_args(arguments)
    around, rows = environment("cpu"), list[ServingRow]()
    # Python's collector would look through all objects of PyTorch now and then: 0.1 s in which no server answers.
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        sizes = asked.exits, asked.side, asked.images, asked.rounds, asked.seconds
        place = prepare(Path(folder), asked.model, *sizes)
        print(f"{place.fast.plan.engine} engine, {place.capacity:,.0f} images/s", file=sys.stderr)
        for name in track(asked.only, "measurements"):
            for row in MEASUREMENTS[name](place):
                append([row], around)
                rows.append(row)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
