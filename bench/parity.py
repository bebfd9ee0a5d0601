"""Answers of every engine in every dtype beside those of the float32 network that sees one image at a time."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from cases import make_case
from command import add_device_option, chosen_device
from parity_table import table
from progress import track
from rows import ParityRow, Record, append, environment, first_line, name_of, read, results_file
from subjects import MNIST, Network, network_on_noise, shipped
from torch import Tensor

import eefast
from eefast.measure.comparison import FLIP_MARGIN, judge
from eefast.model import EarlyExitNet
from eefast.planning import ENGINES
from eefast.result import ExitOutput, ExitResult
from eefast.thresholds.evaluation import evaluate
from eefast.thresholds.outputs import collect, collect_answers, flip_distances

BATCH_SIZES = (1, 31, 256)
NOISE = Network("eenet20", (3, 32, 32), 10, (0.0, 0.0, 1.0), head="conv1")
ON_NOISE, NOISE_COST = f"{NOISE.name} with {NOISE.head} heads on noise", 0.3
MOST_NOISE = 1024
"""Images of noise that are looked at, at most."""
HALF_ON_CPU = 500
"""Images that a CPU answers in half precision, at most: without instructions for it they take ten times as long."""
WITHOUT_GRAPHS, COUNTED = "without graphs", "device-counted"
NO_FAILURE = ("refused", "skipped")


@dataclass(frozen=True)
class EngineForm:
    """An engine in a dtype; how: the form it is restricted to where it would choose itself, or nothing."""

    engine: str
    dtype: torch.dtype
    how: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {name_of(self.dtype)}"

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.how}" if self.how else self.engine


@dataclass(frozen=True)
class ParitySubject:
    """A float32 network in eval mode under one criterion, and what is known about its answers.

    images: [N, C, H, W] where the network is; labels: [N] int64, on the CPU as all that follows, or None.
    outputs: of all exits, and reference: of `net(x)`, images one at a time.
    """

    name: str
    net: EarlyExitNet
    images: Tensor
    labels: Tensor | None
    outputs: list[ExitOutput]
    reference: ExitResult

    def __str__(self) -> str:
        return f"{self.name}, {self.net.criterion.name}"

    def first(self, count: int) -> ParitySubject:
        return ParitySubject(
            self.name,
            self.net,
            self.images[:count],
            None if self.labels is None else self.labels[:count],
            [ExitOutput(*(part[:count] for part in out)) for out in self.outputs],
            ExitResult(*(part[:count] for part in self.reference)),
        )


def forms(device: str) -> list[EngineForm]:
    """All engines, on a GPU the compact one also restricted to its other forms, in all dtypes; some will refuse.

    What the device is mostly used with comes first, since the seconds may end before the list does.
    """
    gpu = device == "cuda"
    forms = {"compact": ("", WITHOUT_GRAPHS, COUNTED)} if gpu else {}
    engines = [(engine, how) for engine in reversed(ENGINES) if engine != "auto" for how in forms.get(engine, ("",))]
    floats = [dtype for dtype in FLIP_MARGIN if dtype.is_floating_point]  # networks in INT8 are others
    dtypes = sorted(floats, key=lambda dtype: (dtype == torch.float32) == gpu)
    return [EngineForm(engine, dtype, how) for dtype in dtypes for engine, how in engines]


def on_mnist(device: str, count: int) -> Iterator[ParitySubject]:
    """The shipped network and real images, under each criterion."""
    from eefast.data.mnist import mnist_test

    net, chosen = shipped()
    net = net.to(device)
    pixels, labels = mnist_test()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
    images = net.prepare(pixels[order].to(device))
    outputs = all_exits(net, images, MNIST)
    for criterion, values in chosen.items():
        at = net.with_criterion(criterion, values).to(device)
        yield subject(MNIST, at, images, labels[order], outputs)


def on_noise(device: str, count: int) -> Iterator[ParitySubject]:
    """A network with convolutions in its heads."""
    count = min(count, MOST_NOISE)
    made = network_on_noise(NOISE, count, count, device, torch.float32)
    net = make_case(made, count, NOISE_COST).net
    yield subject(ON_NOISE, net, made.images, None, all_exits(net, made.images, ON_NOISE))


SUBJECTS: dict[str, Callable[[str, int], Iterator[ParitySubject]]] = {MNIST: on_mnist, ON_NOISE: on_noise}


def subject(
    name: str, net: EarlyExitNet, images: Tensor, labels: Tensor | None, outputs: list[ExitOutput]
) -> ParitySubject:
    reference, _ = collect_answers(net, singles(images, f"{name}, {net.criterion.name}: net(x)"), images.device)
    return ParitySubject(name, net, images, labels, outputs, reference)


def all_exits(net: EarlyExitNet, images: Tensor, name: str) -> list[ExitOutput]:
    """What all exits say about every image alone."""
    return collect(net, singles(images, f"{name}: all exits"))[0]


def singles(images: Tensor, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """One image at a time, with a label that is not read."""
    for part in track([range(i, min(i + 1000, len(images))) for i in range(0, len(images), 1000)], what):
        for i in part:
            yield images[i : i + 1], torch.zeros(1)


def made(form: EngineForm, net: EarlyExitNet, example: Tensor) -> tuple[Callable[[Tensor], ExitResult], str]:
    """What runs, and its plan's reason; `ValueError` where the engine refuses."""
    if form.engine == "reference":
        # In the network's dtype.
        fast = eefast.accelerate(copy.deepcopy(net).to(form.dtype), engine="reference", frozen=True)  # type: ignore[call-overload]
        return lambda x: fast(x.to(form.dtype)), fast.plan.reason
    with mock.patch.dict(os.environ, {"EEFAST_GRAPHS": "0"} if form.how == WITHOUT_GRAPHS else {}):
        fast = eefast.accelerate(net, engine=form.engine, dtype=form.dtype, example_inputs=example, frozen=True)
    if form.how == COUNTED:
        always_count(fast)
    return fast, fast.plan.reason


def always_count(fast: Any) -> None:
    """Every stage that can reads the number of its rows on the device, however long that takes."""
    graphs = getattr(fast.engine, "graphs", None)
    if graphs is None or all(rows is not None for _, _, rows in graphs.replays):
        raise ValueError(f"no stage has a graph that counts its rows on the device: {fast.plan.reason}")
    for policy in graphs.policies:
        policy.counted = lambda stage, most, expected: True


@torch.no_grad()
def measure(seen: ParitySubject, form: EngineForm) -> list[ParityRow]:
    """A row per batch size, or one that says why there are no answers."""
    if form.dtype != torch.float32 and seen.images.device.type == "cpu":
        seen = seen.first(HALF_ON_CPU)
    try:
        run, details = made(form, seen.net, seen.images[:256])
    except ValueError as error:
        return [row(seen, form, note=f"refused: {error}")]
    except Exception as error:  # the others' answers still count
        return [row(seen, form, note=f"FAILED: {first_line(error)}")]
    try:
        found = {n: _answers(run, seen.images, n) for n in BATCH_SIZES}
        others = [*found.values(), *(_answers(run, seen.images, n, backwards=True) for n in BATCH_SIZES if n > 1)]
        unsteady = int(torch.stack([_differing(others[0], other) for other in others]).any(dim=0).sum())
        return [compared(seen, form, n, answer, unsteady, details) for n, answer in found.items()]
    except Exception as error:
        return [row(seen, form, note=f"FAILED: {first_line(error)}")]


def _answers(run: Callable[[Tensor], ExitResult], images: Tensor, n: int, backwards: bool = False) -> ExitResult:
    """In the order of the images, whatever order they were asked in."""
    asked = images.flip(0) if backwards else images
    result, _ = collect_answers(run, [(x, torch.zeros(len(x))) for x in asked.split(n)], images.device)
    return ExitResult(*(part.flip(0) for part in result)) if backwards else result


def _differing(one: ExitResult, other: ExitResult) -> Tensor:
    """[N] bool: not the same bits, so that NaN equals NaN."""
    floats = [torch.cat([r.logits, r.confidence[:, None]], dim=1).view(torch.int32) for r in (one, other)]
    return (one.exit_index != other.exit_index) | (floats[0] != floats[1]).any(dim=1)


def compared(seen: ParitySubject, form: EngineForm, n: int, got: ExitResult, unsteady: int, details: str) -> ParityRow:
    """Answers in batches of n beside the reference."""
    expected, net = seen.reference, seen.net
    _, problem = judge(net, seen.outputs, got.logits, got.exit_index, form.dtype)
    if not problem and unsteady and form.engine == "resident":
        problem = f"{unsteady} answers depend on batch or position; the resident engine promises the same bits"
    distances = flip_distances(got.exit_index, expected.exit_index, seen.outputs, net)
    same = got.exit_index == expected.exit_index
    off = (got.logits - expected.logits)[same].double()
    accuracy = change = None
    if seen.labels is not None:
        accuracy = evaluate(got, seen.labels, net).accuracy
        change = accuracy - evaluate(expected, seen.labels, net).accuracy
    cost = float(got.cost.double().mean())
    return row(
        seen,
        form,
        n,
        note=f"WRONG: {problem}" if problem else "",
        flips=len(distances),
        flip_distances=(statistics.median(distances.tolist()), float(distances.max())) if len(distances) else None,
        logit_differences=(float(off.abs().max()), float(off.square().mean().sqrt())) if len(off) else None,
        other_answers=int((got.labels != expected.labels).sum()),
        accuracy=accuracy,
        accuracy_change=change,
        mean_cost=cost,
        cost_change=cost - float(expected.cost.double().mean()),
        unsteady=unsteady,
        details=details,
    )


def row(seen: ParitySubject, form: EngineForm, batch_size: int = 0, **figures: Any) -> ParityRow:
    """batch_size: 0 where there are no answers in any."""
    names = seen.name, seen.net.criterion.name, form.name, name_of(form.dtype)
    return ParityRow(*names, batch_size, len(seen.images), FLIP_MARGIN[form.dtype], **figures)


def run(device: str, count: int, seconds: float, around: Record) -> None:
    """All ways of all networks, as far as the seconds go; rows go to the file of this machine as they come."""
    end, note = time.perf_counter() + seconds, f"skipped: the budget of {seconds:.0f} s is spent"
    for name, make in SUBJECTS.items():
        if time.perf_counter() > end:
            append([ParityRow(name, "all criteria", "all engines", "all dtypes", 0, count, 0.0, note=note)], around)
            continue
        for seen in make(device, count):
            for form in track(forms(device), str(seen)):
                late = time.perf_counter() > end
                append([row(seen, form, note=note)] if late else measure(seen, form), around)


def failed(rows: Sequence[Record]) -> bool:
    """Whether a form gave wrong answers, or none for another reason than that its engine cannot run here."""
    return any(row["note"] and not row["note"].startswith(NO_FAILURE) for row in rows if "parity" in row)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_device_option(parser)
    parser.add_argument("--images", type=int, default=10_000, help="of MNIST's test images; default and at most 10,000")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="skip, and say so, what does not fit")
    asked = parser.parse_args(arguments)
    if not max(BATCH_SIZES) <= asked.images <= 10_000:
        parser.error(f"--images {asked.images} must be in {max(BATCH_SIZES)}, the largest batch, … 10,000")
    device = chosen_device(parser, asked, "look at")
    # The float32 network is the yardstick, and so are float32 engines; cuDNN would round what goes into convolutions.
    torch.backends.cudnn.allow_tf32 = False
    around = environment(device)
    run(device, asked.images, asked.seconds, around)
    rows = read([results_file(around)], around["date"])
    print(table(rows))
    return int(failed(rows))


if __name__ == "__main__":
    sys.exit(main())
