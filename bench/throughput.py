"""Whole networks in batches: thresholds for a stated mix of exits, answers checked, then all ways timed in turn.

The CPU's ways run in processes of their own, see throughput_cpu.py; a GPU's run here.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import throughput_cpu
import torch
from prepared import FLIP_MARGIN, Checked, Network, Prepared, check, network_on_noise, thresholds
from progress import track
from report import failures, show
from rows import NetworkRow, append, environment, first_line, now, read, results_file, summary
from torch import Tensor, nn

import eefast
from eefast.fold import fold_stage
from eefast.result import ExitOutput, ExitResult

ROUNDS = 7
ROUND_SECONDS, MOST_BATCHES = 0.05, 32
DTYPE = torch.float16

Run = Callable[[Tensor], Any]
RunAll = Callable[[Sequence[Tensor]], Sequence[Any]]


@dataclass(frozen=True)
class Work:
    """One network at one batch size.

    compile_seconds: a guess of what torch.compile takes; 0: measure without it.
    seconds: a guess of what the rest takes. With less of the budget left the work is skipped.
    """

    network: Network
    batch_size: int
    compile_seconds: float = 0
    seconds: float = 6

    def __str__(self) -> str:
        return f"{self.network.name}, batch {self.batch_size}{', compiled' if self.compile_seconds else ''}"


# Mean costs of 0.20; below the same networks where no image leaves early.
SMALL = Network("eenet20", (3, 32, 32), 10, (0.76, 0.18, 0.06))
DEEP = Network("eenet110", (3, 32, 32), 10, (0.29, 0.2, 0.15, 0.1, 0.075, 0.055, 0.04, 0.025, 0.065))
SMALL_DENSE = Network("eenet20", (3, 32, 32), 10, (0.0, 0.0, 1.0))
DEEP_DENSE = Network("eenet110", (3, 32, 32), 10, (0.0,) * 8 + (1.0,))
LARGE = Network("eenet50", (3, 224, 224), 1000, (0.3, 0.2, 0.2, 0.3))
# What matters most comes first, since the budget of seconds may end before the list does.
WORK = (
    *(Work(SMALL, 4096, compile_seconds=15), Work(SMALL, 256, compile_seconds=15), Work(SMALL_DENSE, 4096)),
    *(Work(DEEP_DENSE, 4096, seconds=8), Work(DEEP, 4096, seconds=12), Work(DEEP, 256), Work(LARGE, 256, seconds=18)),
    *(Work(SMALL, 16), Work(SMALL, 1), Work(LARGE, 16), Work(DEEP, 16), Work(DEEP, 1), Work(LARGE, 1)),
    Work(DEEP, 4096, compile_seconds=90, seconds=12),
    *(Work(DEEP, 256, compile_seconds=90), Work(LARGE, 256, compile_seconds=25, seconds=18)),
)


@dataclass(frozen=True)
class Way:
    """One way to run a network, its answers found to be right.

    run: batches → an `ExitResult` each, or the logits alone where `static`: no image leaves early.
    """

    name: str
    run: RunAll
    static: bool
    checked: Checked


@torch.no_grad()
def prepare(work: Work) -> Prepared:
    calibrated = 64 if work.network is LARGE else 1024
    count = max(work.batch_size, calibrated)
    net, images, outputs = network_on_noise(work.network, count, calibrated, "cuda", DTYPE)
    net.thresholds.copy_(torch.tensor(thresholds(outputs, work.network.mix)))
    seen = MOST_BATCHES * work.batch_size
    outputs = [ExitOutput(*(part[:seen] for part in out)) for out in outputs]
    return Prepared(net, images[:seen].split(work.batch_size), outputs)


def one_by_one(make: Callable[[], Run]) -> Callable[[], RunAll]:
    def made() -> RunAll:
        run = make()
        return lambda batches: [run(x) for x in batches]

    return made


def makers(work: Work, prepared: Prepared) -> dict[tuple[str, bool], Callable[[], RunAll]]:
    """(name, static) → how to make it, which may raise."""
    x = prepared.batches[0]

    @cache
    def plain() -> nn.Module:
        return fold_stage(prepared.net.plain(), DTYPE)[0]

    @cache
    def compiled() -> Run:
        torch._dynamo.reset()
        return torch.compile(plain(), dynamic=False)

    def masked() -> Run:
        return copy.deepcopy(prepared.net).to(DTYPE, memory_format=torch.channels_last)  # type: ignore[call-overload]

    static: dict[str, Callable[[], Run]] = {"plain, eager": plain}
    if work.compile_seconds:
        static["plain, torch.compile"] = compiled
    # What mode="reduce-overhead" does, without a second compilation.
    static |= {f"{name}, CUDA graph": partial(captured, make, x) for name, make in static.items()}

    def engine(name: str) -> eefast.Accelerated:
        return eefast.accelerate(prepared.net, engine=name, dtype=DTYPE, frozen=True)

    return {
        **{(name, True): one_by_one(make) for name, make in static.items()},
        ("masked, PyTorch", False): one_by_one(masked),
        ("eefast compact", False): one_by_one(lambda: engine("compact")),
        ("eefast resident", False): one_by_one(lambda: engine("resident")),
        ("eefast resident, streaming", False): lambda: partial(_list, engine("resident").stream),
    }


def _list(stream: Callable[[Sequence[Tensor]], Iterable[Any]], batches: Sequence[Tensor]) -> list[Any]:
    return list(stream(batches))


def captured(make: Callable[[], Run], x: Tensor) -> Run:
    """In a CUDA graph for batches like `x`; each call overwrites the logits of the one before."""
    call, buffer = make(), x.clone(memory_format=torch.preserve_format)
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


def checked(prepared: Prepared, name: str, static: bool, run: RunAll) -> tuple[Way | None, str]:
    """The way, or None and what is wrong with its answers."""
    if static:
        # One after the other: a CUDA graph overwrites its results.
        logits = torch.cat([run([x])[0].float().cpu() for x in prepared.batches])
        taken = torch.full((len(logits),), prepared.net.num_exits)
    else:
        answers = [ExitResult(*(part.cpu() for part in answer)) for answer in run(prepared.batches)]
        logits, taken = (torch.cat([getattr(a, n) for a in answers]) for n in ("logits", "exit_index"))
    found, note = check(prepared, static, logits, taken, DTYPE)
    return (None if found is None else Way(name, run, static, found)), note


def search_convolutions(static: bool) -> None:
    """Let cuDNN try out its convolutions, which pays only where batch sizes stay the same."""
    torch.backends.cudnn.benchmark = static


def timed(ways: Sequence[Way], batches: Sequence[Tensor]) -> list[list[tuple[float, float]]]:
    """Per way and round: seconds per batch and mean cost; every way once per round, on the same batches."""

    def seconds(way: Way, turn: Sequence[int]) -> float:
        search_convolutions(way.static)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        way.run([batches[i] for i in turn])
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / len(turn)

    quickest = min(seconds(way, [0]) for way in ways)
    count = min(max(round(ROUND_SECONDS / quickest), 1), MOST_BATCHES)
    found: list[list[tuple[float, float]]] = [[] for _ in ways]
    for r in range(ROUNDS):
        turn = [(r * count + j) % len(batches) for j in range(count)]
        for way, own in zip(ways, found, strict=True):
            own.append((seconds(way, turn), statistics.mean(way.checked.costs[i] for i in turn)))
    return found


@torch.no_grad()
def measure(work: Work) -> list[NetworkRow]:
    prepared = prepare(work)
    rows, ways = [], []
    for (name, static), make in makers(work, prepared).items():
        try:
            search_convolutions(static)
            way, note = checked(prepared, name, static, make())
        except Exception as error:
            way, note = None, first_line(error)
        if way is None:
            rows.append(untimed(work, name, note))
        else:
            ways.append(way)
    if not ways:
        return rows
    spans = timed(ways, prepared.batches)
    medians = [statistics.median(s for s, _ in own) for own in spans]
    best = min((i for i, way in enumerate(ways) if way.static), key=medians.__getitem__, default=None)
    for way, own in zip(ways, spans, strict=True):
        rows.append(
            NetworkRow(
                **_shape(work, way.name),
                checked=True,
                **summary(work.batch_size, own, None if best is None else spans[best]),
                best_static=None if best is None else ways[best].name,
                exits=way.checked.exits,
                flips=way.checked.flips,
                flip_margin=FLIP_MARGIN[DTYPE],
            )
        )
    return rows


def untimed(work: Work, provider: str, note: str) -> NetworkRow:
    return NetworkRow(**_shape(work, provider), checked=False, note=note)


def _shape(work: Work, provider: str) -> dict[str, Any]:
    return {
        "network": work.network.name,
        "provider": provider,
        "batch_size": work.batch_size,
        "dtype": str(DTYPE).removeprefix("torch."),
        "mix": work.network.mix,
    }


def run_on_gpu(works: Sequence[Work], around: dict[str, Any], seconds: float) -> None:
    begin = time.perf_counter()
    for work in track(works, "networks"):
        if time.perf_counter() - begin + work.seconds + work.compile_seconds > seconds:
            name = "plain, torch.compile" if work.compile_seconds else "all ways"
            append([untimed(work, name, f"skipped: the budget of {seconds:.0f} s is spent")], around)
            continue
        append(measure(work), around)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='what has this in its name, such as "eenet20, batch 256"'
    )
    parser.add_argument(
        "--all", action="store_true", help="CPU: all networks, batch sizes and costs, however long they take"
    )
    parser.add_argument("--seconds", type=float, help="skip, and say so, what does not fit; default: 70, on a CPU 300")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; leave the option out to measure the CPU")
    around, since = environment(device), now()
    if device == "cuda":
        works = [work for work in WORK if arguments.only in str(work)]
        run_on_gpu(works, around, arguments.seconds or 70)
    else:
        seconds = arguments.seconds or (float("inf") if arguments.all else 300)
        plan = throughput_cpu.ALL_WORK if arguments.all else throughput_cpu.KEY_WORK
        throughput_cpu.run([work for work in plan if arguments.only in str(work)], around, seconds)
    rows = read([results_file(around)], since)
    print(show(rows))
    return failures(rows)


if __name__ == "__main__":
    sys.exit(main())
