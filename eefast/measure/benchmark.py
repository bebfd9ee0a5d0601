"""Test images → every way to run a network, checked and timed at several batch sizes → is early exit worth it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..api import Accelerated, accelerate
from ..model import EarlyExitNet
from ..result import ExitOutput
from ..system.progress import Progress
from ..thresholds.evaluation import Evaluation, evaluate
from ..thresholds.outputs import by_thresholds, collect, outcome
from . import baselines, comparison
from .comparison import Contestant, Span
from .environment import Row

TIMED_IMAGES, TURN_IMAGES, TURN_SECONDS, LEAST_ROUNDS = 512, 32, 0.05, 3
# Threads of ONNX Runtime and OpenMP have stopped spinning by then.
PAUSE_SECONDS = 0.06
LOOP = "masked loop, PyTorch"
ENGINES = ("resident", "compact")
LAYOUT = {
    "resident": torch.contiguous_format,
    "compact": torch.channels_last,
    "reference": torch.channels_last,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Verdict:
    """What one batch size says.

    worth: the speed-up is above 1, or below, in four of five rounds; None where it is neither.
    static, engine: the fastest way without early exits, and the fastest of eefast's engines.
    speedup: time of the former ÷ time of the latter, in the same rounds: 20 %, 50 % and 80 % quantile.
    over_loop: median time of PyTorch's masked loop ÷ median time of the engine.
    realised_ratio: median of mean cost × speed-up.
    """

    batch_size: int
    worth: bool | None
    static: str
    engine: str
    speedup: tuple[float, float, float]
    over_loop: float
    realised_ratio: float


@dataclass(frozen=True)
class Point:
    """One choice of thresholds: what it does on all test images, and its speed at the largest batch size."""

    thresholds: tuple[float, ...]
    accuracy: float
    mean_cost: float
    images_per_s: float


@dataclass(frozen=True)
class Bench:
    """What was found.

    plain_accuracy: of the final exit, on all test images; early: the same images under the thresholds.
    criteria: name → (accuracy, mean cost) on the test images, of every criterion that was to be compared.
    rows: way by way and batch size by batch size, measured against the fastest static way of that batch size. Their
        accuracy and cost are those of the timed images, a part of the test images.
    verdicts: one per batch size. curve: of the engine that "auto" chose.
    auto: the engine that "auto" chose; reason: why.
    left_out: way → why it was not compared.
    """

    plain_accuracy: float
    early: Evaluation
    criteria: dict[str, tuple[float, float]]
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    curve: tuple[Point, ...]
    auto: str
    reason: str
    left_out: dict[str, str]


def run(
    net: EarlyExitNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    batch_sizes: Sequence[int] = (1, 16, 256),
    others: Sequence[Sequence[float]] = (),
    compared: Mapping[str, Sequence[float]] | None = None,
    dtype: torch.dtype = torch.float32,
    with_compile: bool = False,
    seconds: float = 15.0,
    progress: Progress = lambda what, done, total: None,
) -> Bench:
    """Ask all exits about all test images, compare all ways' answers on the first of them, then time the ways in turn.

    net: float32, in eval mode, with its criterion and thresholds.
    batches: (images as the network takes them, labels [n]), in an order without meaning; none of them had a part in
        the choice of thresholds.
    others: further thresholds, for the curve. compared: criterion → thresholds, of which only accuracy and cost are
        found, by default the network's own. dtype: of the arithmetic; answers are compared with float32's.
    with_compile: also torch.compile, which may take minutes per batch size.
    seconds: of timing per batch size; three rounds are done in any case.
    progress: called with (what, steps done, steps in all).
    Raises `RuntimeError` for a wrong answer, and `ValueError` for a batch size above the number of images and where
    torch.compile cannot.
    """
    # Otherwise cuDNN would round what goes into the convolutions of the float32 network, which is the yardstick.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = max(TIMED_IMAGES, *batch_sizes)
        kept: list[Tensor] = []
        outputs, labels = collect(net, _kept(batches, kept, wanted))
        timed = min(wanted, len(labels))
        if max(batch_sizes) > timed:
            raise ValueError(f"batch_sizes: {max(batch_sizes)} is more than the {timed} test images; leave it out")
        images = net.prepare(torch.cat(kept).to(net.cost.device)).to(dtype)
        auto = accelerate(net, dtype=dtype, frozen=True)
        ways, left_out = _ways(net, auto, timed, dtype, with_compile)
        at = _at_thresholds(net, others, auto.plan.engine, dtype)
        laid = comparison.laid([*ways, *at], images)
        contests = []
        for size in batch_sizes:
            extra = at if size == max(batch_sizes) else []
            contests.append([_sized(way, timed, size) for way in [*ways, *extra]])
        checked = _checked(contests, laid, outputs, net.cost, progress)
        rows: list[Row] = []
        verdicts, curve = [], []
        for size, contestants, answers in zip(batch_sizes, contests, checked, strict=True):
            spans = _timed(contestants, laid, seconds, f"timing, batch {size}", progress)
            base = _fastest_static(contestants, spans)
            found = [
                comparison.row(c, answer, labels, flips, own, spans[base])
                for c, (answer, flips), own in zip(contestants, answers, spans, strict=True)
            ]
            rows += found[: len(ways)]
            verdicts.append(_verdict(found[: len(ways)], found[base].name))
            for thresholds, row in zip(others, found[len(ways) :], strict=False):
                accuracy, cost = outcome(outputs, labels, net.cost, net.criterion.name, thresholds)
                curve.append(Point(tuple(thresholds), accuracy, cost, row.images_per_s))
        wanted_criteria = compared or {net.criterion.name: net.thresholds.tolist()}
        criteria = {name: outcome(outputs, labels, net.cost, name, values) for name, values in wanted_criteria.items()}
        early = evaluate(by_thresholds(outputs, net, net.criterion.name, net.thresholds.tolist()), labels, net)
    plain = (outputs[-1].logits.argmax(dim=1) == labels).double().mean().item()
    more = tuple(rows), tuple(verdicts), tuple(curve), auto.plan.engine, auto.plan.reason, left_out
    return Bench(plain, early, criteria, *more)


def _kept(batches: Iterable[tuple[Tensor, Tensor]], kept: list[Tensor], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; the first `count` images are put into `kept` on the way."""
    for images, labels in batches:
        if count > 0:
            kept.append(images[:count])
        count -= len(images)
        yield images, labels


def _ways(
    net: EarlyExitNet, auto: Accelerated, images: int, dtype: torch.dtype, with_compile: bool
) -> tuple[list[Contestant], dict[str, str]]:
    """All ways that can run here, not yet for any batch size, and why the others cannot."""
    ways: list[Contestant] = []
    left_out: dict[str, str] = {}

    def add(name: str, run: Callable[[Tensor], Any], own: EarlyExitNet | None, wanted: torch.memory_format) -> None:
        ways.append(Contestant(name, run, own, images, 1, 1, wanted, dtype))

    add("plain, PyTorch", baselines.eager(net, dtype), None, torch.channels_last)
    if with_compile:
        # TorchInductor stops at images of one channel that lie channels-last.
        lies = torch.channels_last if net.input_shape[0] > 1 else torch.contiguous_format
        add("plain, torch.compile", baselines.compiled(net, dtype), None, lies)
    else:
        left_out["torch.compile"] = "takes seconds to minutes per batch size; --compile adds it"
    if net.cost.device.type == "cpu" and dtype == torch.float32:
        try:
            add("plain, ONNX Runtime", baselines.onnx_runtime(net), None, torch.contiguous_format)
        except ImportError as error:
            left_out["ONNX Runtime"] = str(error)
    else:
        left_out["ONNX Runtime"] = "is compared on the CPU in float32 only"
    add(LOOP, baselines.masked(net, dtype), net, torch.channels_last)
    for engine in ENGINES:
        try:
            planned = auto.plan.engine == engine
            fast = auto if planned else accelerate(net, engine=engine, dtype=dtype, frozen=True)
        except ValueError as error:
            left_out[engine] = str(error)
            continue
        add(engine, fast, net, LAYOUT[engine])
    return ways, left_out


def _at_thresholds(
    net: EarlyExitNet, others: Sequence[Sequence[float]], engine: str, dtype: torch.dtype
) -> list[Contestant]:
    """The engine once more for each of the thresholds."""
    if not others:
        return []
    device = net.cost.device
    base = net.with_criterion(net.criterion.name).to(device)
    fast = accelerate(base, engine=engine, dtype=dtype, frozen=True)

    def at(values: Tensor) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            base.thresholds.copy_(values)
            return fast(x)

        return run

    found = []
    for thresholds in others:
        own = net.with_criterion(net.criterion.name, thresholds).to(device)
        found.append(Contestant(f"{engine}, other thresholds", at(own.thresholds), own, 1, 1, 1, LAYOUT[engine], dtype))
    return found


def _sized(way: Contestant, images: int, batch_size: int) -> Contestant:
    """At this batch size, with turns of whole batches."""
    turn = min(-(-TURN_IMAGES // batch_size) * batch_size, images)
    return replace(way, images=images, batch_size=batch_size, turn=turn)


def _checked(
    contests: Sequence[Sequence[Contestant]],
    laid: comparison.Laid,
    outputs: Sequence[ExitOutput],
    cost: Tensor,
    progress: Progress,
) -> list[list[tuple[Any, int]]]:
    """Per contest and contestant its answers and flips, see `contest.answer`."""
    total, done = sum(map(len, contests)), 0
    checked: list[list[tuple[Any, int]]] = []
    for contestants in contests:
        checked.append([])
        for contestant in contestants:
            progress("checking answers", done, total)
            try:
                checked[-1].append(comparison.answer(contestant, laid, outputs, cost))
            except torch._dynamo.exc.TorchDynamoException as error:
                why = str(error).strip().splitlines()[0]
                raise ValueError(f"torch.compile cannot: {why}; leave out --compile") from error
            done += 1
    progress("checking answers", done, total)
    return checked


def _timed(
    contestants: Sequence[Contestant], laid: comparison.Laid, seconds: float, what: str, progress: Progress
) -> list[list[Span]]:
    """Per contestant its spans, in as many rounds as fit."""
    begin, total = time.perf_counter(), max(round(seconds), 1)
    rounds: list[list[Span]] = []
    progress(what, 0, total)
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() - begin < seconds:
        rounds.append(comparison.one_round(contestants, laid, len(rounds), pause=PAUSE_SECONDS, least=TURN_SECONDS))
        progress(what, min(int(time.perf_counter() - begin), total), total)
    progress(what, total, total)
    return [list(own) for own in zip(*rounds, strict=True)]


def _fastest_static(contestants: Sequence[Contestant], spans: Sequence[Sequence[Span]]) -> int:
    """Index of the one with the least median time among those without early exits."""
    static = [i for i, contestant in enumerate(contestants) if contestant.net is None]
    return min(static, key=lambda i: statistics.median(span.seconds for span in spans[i]))


def _verdict(rows: Sequence[Row], static: str) -> Verdict:
    """rows: of one batch size, all measured against `static`."""
    loop = next(row for row in rows if row.name == LOOP)
    # Where none of eefast's own engines can run, the reference engine is the masked loop.
    engines = [row for row in rows if row.name in ENGINES] or [loop]
    best = max(engines, key=lambda row: row.images_per_s)
    low, high = best.speedup_quantiles
    return Verdict(
        batch_size=best.batch_size,
        worth=True if low > 1 else False if high < 1 else None,
        static=static,
        engine="reference" if best is loop else best.name,
        speedup=(low, best.speedup, high),
        over_loop=best.images_per_s / loop.images_per_s,
        realised_ratio=best.realised_ratio,
    )


def words(verdict: Verdict, accuracy_change: float) -> str:
    """The verdict as a sentence; accuracy_change: of early exit, in -1 … 1."""
    low, middle, high = verdict.speedup
    judged = {True: "worth it", False: "not worth it", None: "no clear difference"}[verdict.worth]
    times = f"{low:.2f} … {high:.2f}" if verdict.worth is None else f"{middle:.2f}"
    return (
        f"{judged}: {verdict.engine} is {times} × as fast as {verdict.static}, accuracy {100 * accuracy_change:+.2f} "
        f"points; realised ratio {verdict.realised_ratio:.2f}, {verdict.over_loop:.2f} × the masked loop"
    )


def code(path: str, net: EarlyExitNet, verdicts: Sequence[Verdict], dtype: torch.dtype, saved: bool) -> str:
    """The lines of Python that run what was found, for the batch sizes at which it is worth it; empty if at none.

    path: what `eefast.load` reads; saved: that this holds the criterion and the thresholds.
    """
    sizes: dict[str, list[int]] = {}
    for verdict in verdicts:
        if verdict.worth:
            sizes.setdefault(verdict.engine, []).append(verdict.batch_size)
    if not sizes:
        return ""
    load = f"net = eefast.load({path!r})"
    if not saved:
        # Nine digits give every float32 back.
        load += f".with_criterion({net.criterion.name!r}, [{', '.join(f'{t:.9g}' for t in net.thresholds.tolist())}])"
    device = "" if net.cost.device.type == "cpu" else f".to({str(net.cost.device)!r})"
    kind = "" if dtype == torch.float32 else f", dtype={dtype}"
    lines = [
        f"fast = eefast.accelerate(net, engine={engine!r}{kind}, frozen=True)"
        + (f"  # batches of {', '.join(map(str, own))}" if len(sizes) > 1 or len(own) < len(verdicts) else "")
        for engine, own in sizes.items()
    ]
    return "\n".join([load + device, *lines])
