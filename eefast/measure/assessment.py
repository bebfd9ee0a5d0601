"""Test images → every way to run a network, checked and timed at several batch sizes → is early exit worth it."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..api import Accelerated, accelerate
from ..model import EarlyExitNet
from ..planning import probe
from ..qdq import QdqStage
from ..quantized import QuantizedStage
from ..result import ExitOutput, ExitResult
from ..system.progress import Progress
from ..thresholds.candidates import candidate_of
from ..thresholds.evaluation import Evaluation, evaluate
from ..thresholds.outputs import by_thresholds, collect, outcome
from . import baselines, comparison, time_costs, verdicts
from .comparison import Candidate, Row, Span
from .time_costs import TimeCosts
from .timing import PAUSE_SECONDS
from .verdicts import ENGINES, IN_INT8, LOOP, Verdict

TIMED_IMAGES, TURN_IMAGES, TURN_SECONDS, LEAST_ROUNDS = 512, 32, 0.05, 3
BATCH_INT8 = 64
LAYOUT = {
    "resident": torch.contiguous_format,
    "compact": torch.channels_last,
    "reference": torch.channels_last,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CurvePoint:
    """One choice of thresholds: what it does on all test images, and its speed at the largest batch size."""

    thresholds: tuple[float, ...]
    accuracy: float
    mean_cost: float
    images_per_s: float


@dataclass(frozen=True)
class Assessment:
    """What was found.

    plain_accuracy: of the final exit, on all test images; early: the same images under the thresholds.
    criteria: name → (accuracy, mean cost) on the test images, of every criterion that was to be compared.
    These and the curve are of answers in the arithmetic that is timed.
    rows: candidate by candidate and batch size by batch size, measured against the fastest one without early exits of
        that batch size. Their accuracy and cost are those of the timed images, a part of the test images.
    verdicts: one per batch size. curve: of the engine that "auto" chose.
    auto: the engine that "auto" chose; reason: why.
    left_out: candidate → why it was not compared.
    time_costs: one per batch size; none for a network in INT8.
    """

    plain_accuracy: float
    early: Evaluation
    criteria: dict[str, tuple[float, float]]
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    curve: tuple[CurvePoint, ...]
    auto: str
    reason: str
    left_out: dict[str, str]
    time_costs: tuple[TimeCosts, ...] = ()


@dataclass(frozen=True)
class InInt8:
    """The same network as `eefast.quantize` made it, with its thresholds, and images for the quantisers of others.

    range_images: [N, C, H, W] as the network takes them, from which ranges are taken.
    """

    net: EarlyExitNet
    range_images: Tensor


@torch.no_grad()
def assess(
    net: EarlyExitNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    batch_sizes: Sequence[int] = (1, 16, 256),
    others: Sequence[Sequence[float]] = (),
    compared: Mapping[str, Sequence[float]] | None = None,
    dtype: torch.dtype = torch.float32,
    with_compile: bool = False,
    in_int8: InInt8 | None = None,
    stages: str = "auto",
    seconds: float = 15.0,
    progress: Progress = lambda what, done, total: None,
) -> Assessment:
    """Collect all exits' outputs on all test images, then check and time all candidates on the first of them.

    net: float32, in eval mode, with its criterion and thresholds.
    batches: (images as the network takes them, labels [n]), in an order without meaning; none of them had a part in
        the choice of thresholds.
    others: further thresholds, for the curve. compared: criterion → thresholds, of which only accuracy and cost are
        found, by default the network's. dtype: of the arithmetic; answers are compared with float32's.
    with_compile: also torch.compile, which may take minutes per batch size.
    in_int8: also `net` in INT8, on the CPU in float32 only; what is fastest, and the verdicts, are of float32 alone.
    stages: what runs the compact engine's stages, see `accelerate`.
    seconds: of timing per batch size; three rounds are done in any case.
    progress: called with (what, steps done, steps in all).
    Raises `RuntimeError` for a wrong answer, and `ValueError` for a batch size above the number of images and where
    torch.compile cannot.
    """
    # Otherwise cuDNN would round what goes into the convolutions of the float32 network, which is the yardstick.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = max(TIMED_IMAGES, *batch_sizes)
        first: list[Tensor] = []
        batches = _first(batches, first, wanted)
        if dtype == torch.float32:
            outputs, labels = collect(net, batches)
            timed_outputs = outputs
        else:
            parts: list[list[ExitOutput]] = []
            outputs, labels = collect(net, _also_in(dtype, net, batches, parts))
            timed_outputs = [
                ExitOutput(*map(torch.cat, zip(*exits, strict=True))) for exits in zip(*parts, strict=True)
            ]
        timed = min(wanted, len(labels))
        if max(batch_sizes) > timed:
            raise ValueError(f"batch_sizes: {max(batch_sizes)} is more than the {timed} test images; leave it out")
        auto = accelerate(net, dtype=dtype, frozen=True, stages=stages)
        candidates, left_out = _candidates(net, auto, dtype, with_compile, stages)
        along_curve = _at_thresholds(net, others, auto.plan.engine, dtype, stages)
        images = net.prepare(torch.cat(first).to(net.cost.device)).to(dtype)
        if in_int8 is not None:
            added, missing = _candidates_in_int8(net, in_int8, outputs, images)
            candidates, left_out = [*candidates, *added], left_out | missing
        by_layout = comparison.by_layout([*candidates, *along_curve], images)
        by_size = [
            [_sized(c, timed, n) for c in [*candidates, *(along_curve if n == max(batch_sizes) else [])]]
            for n in batch_sizes
        ]
        answers = iter(_checked([c for each in by_size for c in each], by_layout, outputs, net.cost, progress))
        measured, judged = [], []
        expected = by_thresholds(outputs, net, net.criterion.name, net.thresholds.tolist()), outputs[-1]
        for size, each in zip(batch_sizes, by_size, strict=True):
            spans = comparison.timed(
                each, by_layout, f"timing, batch {size}", progress,
                rounds=LEAST_ROUNDS, seconds=seconds, pause=PAUSE_SECONDS, least=TURN_SECONDS,
            )  # fmt: skip
            base = _fastest_static(each, spans)
            found = [
                _row(c, *next(answers), labels, turns, spans[base], expected)
                for c, turns in zip(each, spans, strict=True)
            ]
            measured.append(found)
            judged.append(verdicts.judge(found[: len(candidates)], each[base].name))
        in_time = (
            tuple(time_costs.measured(net, images[:n], dtype) for n in batch_sizes) if _has_time_costs(net) else ()
        )
    rows = [row for each in measured for row in each[: len(candidates)]]
    speeds = [row.images_per_s for each in measured for row in each[len(candidates) :]]
    plan = auto.plan

    def on_test(name: str, thresholds: Sequence[float]) -> tuple[float, float]:
        candidate = candidate_of(net, name)
        return outcome(candidate.outputs(timed_outputs), labels, net.cost, candidate.name, thresholds)

    return Assessment(
        plain_accuracy=(timed_outputs[-1].logits.argmax(dim=1) == labels).double().mean().item(),
        early=evaluate(by_thresholds(timed_outputs, net, net.criterion.name, net.thresholds.tolist()), labels, net),
        criteria={n: on_test(n, t) for n, t in (compared or {net.criterion.name: net.thresholds.tolist()}).items()},
        rows=tuple(rows),
        verdicts=tuple(judged),
        curve=tuple(
            CurvePoint(tuple(t), *on_test(net.criterion.name, t), speed)
            for t, speed in zip(others, speeds, strict=True)
        ),
        auto=plan.engine,
        reason=plan.reason,
        left_out=left_out,
        time_costs=in_time,
    )


def _has_time_costs(net: EarlyExitNet) -> bool:
    """Whether the network's stages run by all means that are compared."""
    return not any(isinstance(stage, QuantizedStage) for stage in net.stages)


def _first(
    batches: Iterable[tuple[Tensor, Tensor]], images: list[Tensor], count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; the first `count` images are put into `images` on the way."""
    for x, labels in batches:
        if count > 0:
            images.append(x[:count])
        count -= len(x)
        yield x, labels


def _also_in(
    dtype: torch.dtype, net: EarlyExitNet, batches: Iterable[tuple[Tensor, Tensor]], parts: list[list[ExitOutput]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; what the network answers to each at all exits in `dtype`, as float32, is put into `parts`."""
    made = copy.deepcopy(net).to(dtype)
    for x, labels in batches:
        images = net.prepare(x.to(net.cost.device)).to(dtype)
        parts.append([ExitOutput(*(part.float().cpu() for part in out)) for out in made.all_exits(images)])
        yield x, labels


def _candidates(
    net: EarlyExitNet, auto: Accelerated, dtype: torch.dtype, with_compile: bool, stages: str
) -> tuple[list[Candidate], dict[str, str]]:
    """All that can run here, not yet for any batch size, and why the others cannot."""
    found: list[Candidate] = []
    left_out: dict[str, str] = {}

    def add(name: str, run: Callable[[Tensor], Any], exits: EarlyExitNet | None, layout: torch.memory_format) -> None:
        found.append(Candidate(name, run, exits, 1, 1, 1, layout, dtype))

    add("plain, PyTorch", baselines.eager(net, dtype), None, torch.channels_last)
    if with_compile:
        # TorchInductor stops at channels-last images of one channel.
        layout = torch.channels_last if net.input_shape[0] > 1 else torch.contiguous_format
        add("plain, torch.compile", baselines.compiled(baselines.plain(net, dtype)), None, layout)
    else:
        left_out["torch.compile"] = "takes seconds to minutes per batch size; --compile adds it"
    if any(isinstance(stage, QuantizedStage | QdqStage) for stage in net.stages):
        left_out["ONNX Runtime"] = "is not compared with a network in INT8; measure the float32 network with --int8"
    elif net.cost.device.type == "cpu" and dtype == torch.float32:
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
            kind = stages if engine == "compact" else "auto"
            fast = auto if planned else accelerate(net, engine=engine, dtype=dtype, frozen=True, stages=kind)
        except ValueError as error:
            left_out[engine] = str(error)
            continue
        add(engine, fast, net, LAYOUT[engine])
        if net.num_exits and not net.criterion.carries:
            add(verdicts.EXITS_OFF[engine], *_without_exits(net, fast), LAYOUT[engine])
    return found, left_out


def _without_exits(net: EarlyExitNet, fast: Accelerated) -> tuple[Callable[[Tensor], Any], EarlyExitNet]:
    """The engine with thresholds that no image exceeds, and the network that answers so."""
    never = probe.thresholds(net, net.num_exits)
    other = net.with_criterion(net.criterion.name, never.tolist()).to(net.cost.device)
    return partial(fast, thresholds=other.thresholds), other


def _candidates_in_int8(
    net: EarlyExitNet, in_int8: InInt8, outputs: Sequence[ExitOutput], images: Tensor
) -> tuple[list[Candidate], dict[str, str]]:
    """All that run `net` in INT8 here, not yet for any batch size, and why the others cannot."""
    found: list[Candidate] = []
    left_out: dict[str, str] = {}
    size, some = min(len(images), BATCH_INT8), net.prepare(in_int8.range_images).float()
    for name, prepare in (
        ("plain, ONNX Runtime INT8", baselines.onnx_runtime_int8),
        ("plain, OpenVINO INT8", baselines.openvino_int8),
    ):
        try:
            made = Candidate(name, prepare(net, some), None, size, size, size, dtype=torch.int8)
            comparison.answer(made, comparison.by_layout([made], images), outputs, net.cost)
        except (ImportError, RuntimeError) as error:
            left_out[name] = str(error)
            continue
        found.append(made)
    engine = "compact" if any(isinstance(stage, QdqStage) for stage in in_int8.net.stages) else "resident"
    try:
        fast = accelerate(in_int8.net, engine=engine, frozen=True)
    except ValueError as error:
        return found, left_out | {IN_INT8[engine]: str(error)}
    own, _ = collect(in_int8.net, [(x, torch.zeros(len(x))) for x in images.split(BATCH_INT8)])
    return [*found, Candidate(IN_INT8[engine], fast, in_int8.net, 1, 1, 1, outputs=own)], left_out


def _row(
    candidate: Candidate,
    answer: ExitResult,
    flips: int,
    labels: Tensor,
    spans: Sequence[Span],
    base: Sequence[Span],
    expected: tuple[ExitResult, ExitOutput],
) -> Row:
    """As `comparison.row`; expected: in float32, with early exits and of the final one."""
    found = comparison.row(candidate, answer, flips, labels, spans, base)
    if candidate.outputs is None and candidate.dtype != torch.int8:
        return found
    classes = expected[candidate.net is None].logits.argmax(1)[: candidate.images]
    return replace(found, other_classes=(answer.labels != classes).double().mean().item())


def _at_thresholds(
    net: EarlyExitNet, others: Sequence[Sequence[float]], engine: str, dtype: torch.dtype, stages: str
) -> list[Candidate]:
    """The engine once more for each of the thresholds."""
    if not others:
        return []
    device = net.cost.device
    base = net.with_criterion(net.criterion.name).to(device)
    kind = stages if engine == "compact" else "auto"
    fast = accelerate(base, engine=engine, dtype=dtype, frozen=True, stages=kind)

    def at(values: Tensor) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            base.thresholds.copy_(values)
            return fast(x)

        return run

    nets = [net.with_criterion(net.criterion.name, thresholds).to(device) for thresholds in others]
    name, layout = f"{engine}, other thresholds", LAYOUT[engine]
    return [Candidate(name, at(other.thresholds), other, 1, 1, 1, layout, dtype) for other in nets]


def _sized(candidate: Candidate, images: int, batch_size: int) -> Candidate:
    """At this batch size, with turns of whole batches."""
    turn = min(-(-TURN_IMAGES // batch_size) * batch_size, images)
    return replace(candidate, images=images, batch_size=batch_size, turn=turn)


def _checked(*arguments: Any) -> list[tuple[ExitResult, int]]:
    """As `comparison.checked`; what torch.compile cannot is a `ValueError` that says so."""
    try:
        return comparison.checked(*arguments)
    except torch._dynamo.exc.TorchDynamoException as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"torch.compile cannot: {why}; leave out --compile") from error


def _fastest_static(candidates: Sequence[Candidate], spans: Sequence[Sequence[Span]]) -> int:
    """Index of the one with the least median time among those without early exits that are not in INT8."""
    static = [i for i, c in enumerate(candidates) if c.net is None and c.dtype != torch.int8]
    return min(static, key=lambda i: statistics.median(span.seconds for span in spans[i]))
