"""Whole networks in batches: thresholds for a stated mix of exits, answers checked, then all ways timed in turn."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from progress import track
from report import failures, show
from rows import NetworkRow, append, environment, first_line, now, read, results_file
from torch import Tensor, nn

import eefast
from eefast.calibrate import collect, exits_taken
from eefast.fold import fold_stage
from eefast.model import EarlyExitNet
from eefast.result import ExitOutput, ExitResult

ROUNDS = 7
ROUND_SECONDS, MOST_BATCHES = 0.05, 32
# By dtype: how close to a threshold either exit is a right answer; how far the logits of an image may be off, root mean
# square in standard deviations. Those of another image are off by about 1.4.
FLIP_MARGIN = {torch.float32: 1e-4, torch.float16: 5e-2}
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-1}

Run = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Network:
    """A network of `eefast.zoo` and the share of the images that is to leave at each exit, the final one last."""

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    mix: tuple[float, ...]


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


SMALL = Network("eenet20", (3, 32, 32), 10, (0.6, 0.28, 0.12))
DEEP = Network("eenet110", (3, 32, 32), 10, (0.3, 0.15, 0.1, 0.08, 0.07, 0.06, 0.05, 0.05, 0.14))
LARGE = Network("eenet50", (3, 224, 224), 1000, (0.3, 0.2, 0.2, 0.3))
# What matters most comes first, since the budget of seconds may end before the list does.
WORK = {
    "cuda": (
        *(Work(SMALL, 4096, compile_seconds=15), Work(LARGE, 256, seconds=18), Work(SMALL, 256)),
        *(Work(DEEP, 4096, seconds=12), Work(DEEP, 256), Work(SMALL, 16), Work(SMALL, 1)),
        *(Work(LARGE, 16), Work(DEEP, 16), Work(LARGE, 1)),
        *(Work(SMALL, 256, compile_seconds=15), Work(LARGE, 256, compile_seconds=25, seconds=18)),
        Work(DEEP, 4096, compile_seconds=90, seconds=12),
    ),
    "cpu": (
        *(Work(SMALL, 256), Work(SMALL, 16), Work(SMALL, 1), Work(DEEP, 256), Work(LARGE, 16)),
        *(Work(SMALL, 256, compile_seconds=30), Work(SMALL, 4096)),
    ),
}
DTYPE = {"cuda": torch.float16, "cpu": torch.float32}


@dataclass(frozen=True)
class Prepared:
    """A network ready to be measured.

    net: float32, its thresholds giving the mix on the images of `batches`, which are in the measured dtype.
    outputs: what its exits say about them in float32, on the CPU.
    """

    net: EarlyExitNet
    batches: Sequence[Tensor]
    outputs: list[ExitOutput]


@dataclass(frozen=True)
class Way:
    """One way to run a network.

    run: images → `ExitResult`, or the logits alone where no image leaves early.
    costs: mean cost of each batch; flips, exits: as in `NetworkRow`.
    """

    name: str
    run: Run
    static: bool
    costs: tuple[float, ...]
    exits: tuple[int, ...]
    flips: int


@torch.no_grad()
def prepare(work: Work, device: str) -> Prepared:
    """Random weights whose activations stay in range and whose confidences differ between images."""
    torch.manual_seed(0)
    # The float32 network is the yardstick; cuDNN would round what goes into its convolutions.
    torch.backends.cudnn.allow_tf32 = False
    network, shape = work.network, work.network.input_shape
    exits = len(network.mix) - 1
    net = eefast.zoo.eenet(network.name, exits, num_classes=network.num_classes, input_shape=shape).to(device)
    least = 64 if network is LARGE else 1024
    images = torch.randn(max(work.batch_size, least), *shape, device=device)
    # What the float32 network is asked about is what the others will see, after their dtype's rounding.
    images = images.to(DTYPE[device], memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train().all_exits(images[:least].float())
    net.eval()
    parts = [(part.float(), torch.zeros(len(part))) for part in images.split(256)]
    for head, out in zip(net.heads, collect(net, parts)[0], strict=True):
        # Confidences of a network that was never trained hardly differ; these spread over 0 … 1.
        scale = 2 / float(out.confidence_logit.std())
        head.confidence.weight.mul_(scale)
        head.confidence.bias.sub_(float(out.confidence_logit.mean())).mul_(scale)
    outputs, _ = collect(net, parts)
    net.thresholds.copy_(torch.tensor(thresholds(outputs, network.mix)))
    seen = MOST_BATCHES * work.batch_size
    outputs = [ExitOutput(*(part[:seen] for part in out)) for out in outputs]
    return Prepared(net, images[:seen].split(work.batch_size), outputs)


def thresholds(outputs: list[ExitOutput], mix: Sequence[float]) -> list[float]:
    """Exit by exit, half-way between two confidences, the one at which its share of all images leaves there."""
    live = torch.ones(len(outputs[0].confidence), dtype=torch.bool)
    found: list[float] = []
    for out, share in zip(outputs, mix[:-1], strict=False):
        order = out.confidence[live].sort(descending=True).values
        leaving = min(max(round(share * len(live)), 1), len(order) - 1)
        found.append(float(order[leaving - 1 : leaving + 1].mean()))
        live &= out.confidence <= found[-1]
    return found


def makers(work: Work, prepared: Prepared, device: str) -> dict[tuple[str, bool], Callable[[], Run]]:
    """(name, static) → how to make it, which may raise."""
    dtype, x = DTYPE[device], prepared.batches[0]

    @cache
    def plain() -> nn.Module:
        return fold_stage(prepared.net.plain(), dtype)[0]

    @cache
    def compiled() -> Run:
        torch._dynamo.reset()
        return torch.compile(plain(), dynamic=False)

    def masked() -> Run:
        return copy.deepcopy(prepared.net).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    static: dict[str, Callable[[], Run]] = {"plain, eager": plain}
    if work.compile_seconds:
        static["plain, torch.compile"] = compiled
    if device == "cuda":
        # What mode="reduce-overhead" does, without a second compilation.
        static |= {f"{name}, CUDA graph": partial(captured, make, x) for name, make in static.items()}
    return {
        **{(name, True): make for name, make in static.items()},
        ("masked, PyTorch", False): masked,
        ("eefast compact", False): lambda: eefast.accelerate(prepared.net, engine="compact", dtype=dtype),
    }


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


def checked(prepared: Prepared, name: str, static: bool, run: Run, dtype: torch.dtype) -> tuple[Way | None, str]:
    """The way with its costs, or None and what is wrong with its answers."""
    net, outputs, last = prepared.net, prepared.outputs, prepared.net.num_exits
    if static:
        logits = torch.cat([run(x).float().cpu() for x in prepared.batches])
        taken = expected = torch.full((len(logits),), last)
    else:
        answers = [ExitResult(*(part.cpu() for part in run(x))) for x in prepared.batches]
        logits, taken = (torch.cat([getattr(a, n) for a in answers]) for n in ("logits", "exit_index"))
        expected = exits_taken(outputs, net.criterion, net.thresholds.cpu())
    near = torch.zeros(len(expected), dtype=torch.bool)
    for i, (out, threshold) in enumerate(zip(outputs[:-1], net.thresholds.tolist(), strict=True)):
        near |= (i <= expected) & ((out.confidence - threshold).abs() < FLIP_MARGIN[dtype])
    flipped = taken != expected
    exact = torch.stack([out.logits for out in outputs])[taken, torch.arange(len(taken))]
    error = float((logits - exact).square().mean(1).sqrt().max() / exact.std())
    if bool((flipped & ~near).any()) or not error <= LOGIT_TOLERANCE[dtype]:
        wrong = f"{int((flipped & ~near).sum())} of {len(taken)} images took another exit"
        return None, f"WRONG: {wrong}, logits of one are off by {error:.2g} standard deviations"
    costs = [float(net.cost.cpu()[part].mean()) for part in taken.split(len(prepared.batches[0]))]
    exits = tuple(taken.bincount(minlength=last + 1).tolist())
    return Way(name, run, static, tuple(costs), exits, int(flipped.sum())), ""


def search_convolutions(static: bool) -> None:
    """Let cuDNN try out its convolutions, which pays only where batch sizes stay the same."""
    torch.backends.cudnn.benchmark = static


def timed(ways: Sequence[Way], batches: Sequence[Tensor], wait: Callable[[], None]) -> list[list[tuple[float, float]]]:
    """Per way and round: seconds per batch and mean cost; every way once per round, on the same batches."""

    def seconds(way: Way, turn: Sequence[int]) -> float:
        search_convolutions(way.static)
        wait()
        begin = time.perf_counter()
        for i in turn:
            way.run(batches[i])
        wait()
        return (time.perf_counter() - begin) / len(turn)

    quickest = min(seconds(way, [0]) for way in ways)
    count = min(max(round(ROUND_SECONDS / quickest), 1), MOST_BATCHES)
    found: list[list[tuple[float, float]]] = [[] for _ in ways]
    for r in range(ROUNDS):
        turn = [(r * count + j) % len(batches) for j in range(count)]
        for way, own in zip(ways, found, strict=True):
            own.append((seconds(way, turn), statistics.mean(way.costs[i] for i in turn)))
    return found


@torch.no_grad()
def measure(work: Work, device: str) -> list[NetworkRow]:
    prepared, dtype = prepare(work, device), DTYPE[device]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows, ways = [], []
    for (name, static), make in makers(work, prepared, device).items():
        try:
            search_convolutions(static)
            way, note = checked(prepared, name, static, make(), dtype)
        except Exception as error:
            way, note = None, first_line(error)
        if way is None:
            rows.append(untimed(work, name, dtype, note))
        else:
            ways.append(way)
    if not ways:
        return rows
    spans = timed(ways, prepared.batches, wait)
    medians = [statistics.median(s for s, _ in own) for own in spans]
    best = min((i for i, way in enumerate(ways) if way.static), key=medians.__getitem__, default=None)
    for way, own in zip(ways, spans, strict=True):
        speeds = torch.tensor([work.batch_size / s for s, _ in own], dtype=torch.float64)
        low, median, high = speeds.quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
        ratio = None
        if best is not None:
            ratio = statistics.median(c * b / s for (s, c), (b, _) in zip(own, spans[best], strict=True))
        rows.append(
            NetworkRow(
                **_shape(work, way.name, dtype),
                checked=True,
                images_per_s=(low, median, high),
                mean_cost=statistics.mean(c for _, c in own),
                realised_ratio=ratio,
                best_static=None if best is None else ways[best].name,
                exits=way.exits,
                flips=way.flips,
                flip_margin=FLIP_MARGIN[dtype],
            )
        )
    return rows


def untimed(work: Work, provider: str, dtype: torch.dtype, note: str) -> NetworkRow:
    return NetworkRow(**_shape(work, provider, dtype), checked=False, note=note)


def _shape(work: Work, provider: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "network": work.network.name,
        "provider": provider,
        "batch_size": work.batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "mix": work.network.mix,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=tuple(WORK), help="default: cuda where there is one")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='what has this in its name, such as "eenet20, batch 256"'
    )
    parser.add_argument("--seconds", type=float, default=70, help="skip, and say so, what does not fit; default 70")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; leave the option out to measure the CPU")
    around, since, begin = environment(device), now(), time.perf_counter()
    for work in track([work for work in WORK[device] if arguments.only in str(work)], "networks"):
        if time.perf_counter() - begin + work.seconds + work.compile_seconds > arguments.seconds:
            name = "plain, torch.compile" if work.compile_seconds else "all ways"
            note = f"skipped: the budget of {arguments.seconds:.0f} s is spent"
            append([untimed(work, name, DTYPE[device], note)], around)
            continue
        append(measure(work, device), around)
    rows = read([results_file(around)], since)
    print(show(rows))
    return failures(rows)


if __name__ == "__main__":
    sys.exit(main())
