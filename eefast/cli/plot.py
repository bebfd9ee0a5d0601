"""`eefast plot`: a network and images → a picture of accuracy against cost, of exits, of examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..system.progress import Progress
from .budget import criterion_names, least_images
from .held_out import HeldOutImages
from .inputs import load_images, open_network
from .options import (
    BatchSize,
    Cache,
    CriterionName,
    DataRoot,
    Dataset,
    Device,
    Download,
    FewImages,
    Figure,
    HeldOut,
    Images,
    Network,
    OtherData,
    Seed,
    Split,
    Workers,
)
from .output import bars, check_writable, echo, next_step
from .pictures import canvas, check_picture
from .render import benefit_table, describe

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import EarlyExitNet
    from ..result import ExitOutput
    from ..thresholds.benefit import BenefitPoint
    from ..thresholds.calibration import Calibration


def command(
    network: Network,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    download: Download = False,
    split: Split = "test",
    images: Images = None,
    twin: Annotated[
        list[str] | None, Option(help="A static network as a point: name=accuracy[,cost], such as ResNet-20=0.991,0.6.")
    ] = None,
    criterion: CriterionName = "all",
    held_out: HeldOut = None,
    seed: Seed = None,
    other_data: OtherData = False,
    few_images: FewImages = False,
    cache: Cache = None,
    same_images: Annotated[
        bool, Option(help="Choose the curves' thresholds on the images that are measured: optimistic, needs no others.")
    ] = False,
    benefit: Annotated[
        bool,
        Option("--benefit", help="Also draw and list one threshold for all exits, 0.00 … 1.00, as T-RecX does."),
    ] = False,
    examples: Annotated[int, Option(help="Number of right images, and of wrong ones, per exit.", min=1)] = 6,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    output: Figure = Path("eefast-plot.png"),
) -> None:
    """Draw accuracy against mean cost beside static networks, images per exit, and examples of both."""
    from ..data.loaders import batches

    points = dict(map(_twin, twin or []))
    check_writable(cache)
    check_picture(output)
    net, source = open_network(network, dataset, data_root, download, workers, device, other_data)
    names = criterion_names(criterion, net)
    measured = batches(load_images(net, source, split, images), batch_size, workers)
    least = None if few_images else least_images()
    aside = None if same_images else HeldOutImages(source, held_out, seed, least)
    with bars() as progress:
        kept = None if aside is None else aside.outputs(net, cache, batch_size, progress)
        seen = _seen(net, measured, progress)
        curves = _curves(net, names, kept or (seen.outputs, seen.labels), seen, progress)
    line = _benefit(net, names, seen) if benefit else None
    if line is not None:
        curves[f"{line.criterion}, one threshold"] = line.curve
    origin = "the same images: optimistic" if kept is None else f"{len(kept[1]):,} held-out training images"
    title = (
        f"{describe(net)}, {len(seen.labels):,} images of {source.dataset} ({split})\n"
        f"thresholds of the curves chosen on {origin}"
    )
    _draw(net, seen, curves, points, title, examples, output)
    if line is not None:
        echo(f"\n{title.splitlines()[0]}: {line.criterion}, one threshold for all exits\n")
        echo(benefit_table(line.points, line.macs))
    echo(f"figure: {output}")
    next_step(f"eefast bench {network}: what that is worth on this machine")


@dataclass(frozen=True)
class Seen:
    """Images [N, C, H, W] uint8, their labels [N], and what all exits say about them."""

    images: Tensor
    labels: Tensor
    outputs: list[ExitOutput]


@dataclass(frozen=True)
class Benefit:
    """The benefit curve of an exit rule; macs: of the network without exits."""

    criterion: str
    points: Sequence[BenefitPoint]
    macs: int

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Mean costs and accuracies, by ascending cost."""
        points = sorted(self.points, key=lambda point: point.cost)
        return [point.cost for point in points], [point.accuracy for point in points]


def _benefit(net: EarlyExitNet, names: Sequence[str], seen: Seen) -> Benefit:
    """Of the criterion that is named; where there are several, of the network's."""
    from ..thresholds.benefit import benefit_curve

    name = names[0] if len(names) == 1 else net.criterion.name
    *stages, last = net.stage_costs
    macs = sum(cost.stage_macs for cost in (*stages, last)) + last.head_macs - last.num_features
    return Benefit(name, benefit_curve(seen.outputs, seen.labels, net.cost, name), macs)


def _seen(net: EarlyExitNet, measured: Any, progress: Progress) -> Seen:
    import torch

    from ..thresholds.outputs import collect

    pixels: list[Tensor] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in measured.reported("outputs of all exits", progress):
            pixels.append(x)
            yield x, y

    outputs, labels = collect(net, batches())
    return Seen(torch.cat(pixels), labels, outputs)


def _curves(
    net: EarlyExitNet,
    names: Sequence[str],
    chosen_on: tuple[Sequence[ExitOutput], Tensor],
    seen: Seen,
    progress: Progress,
) -> dict[str, tuple[list[float], list[float]]]:
    """Criterion → (mean costs, accuracies) of thresholds chosen on the outputs and labels `chosen_on`."""
    from ..thresholds import calibration
    from ..thresholds.candidates import candidate_of
    from ..thresholds.outputs import outcome

    curves = {}
    for i, name in enumerate(names):
        progress("choosing thresholds", i, len(names))
        candidate = candidate_of(net, name)
        front = _thinned(calibration.pareto_front(candidate.outputs(chosen_on[0]), chosen_on[1], net.cost, name))
        answers = candidate.outputs(seen.outputs)
        line = [outcome(answers, seen.labels, net.cost, name, c.thresholds) for c in front]
        line.sort(key=lambda point: point[1])
        curves[name] = [cost for _, cost in line], [accuracy for accuracy, _ in line]
    progress("choosing thresholds", len(names), len(names))
    return curves


def _draw(
    net: EarlyExitNet,
    seen: Seen,
    curves: dict[str, tuple[list[float], list[float]]],
    twins: dict[str, tuple[float, float]],
    title: str,
    examples: int,
    path: Path,
) -> None:
    """twins: name → (cost, accuracy); examples: number of right images, and of wrong ones, per exit."""
    from ..measure import figures
    from ..thresholds import evaluation
    from ..thresholds.outputs import by_thresholds

    result = by_thresholds(seen.outputs, net, net.criterion.name, net.thresholds.tolist())
    found = evaluation.evaluate(result, seen.labels, net)
    points = {
        f"{net.criterion.name}, as saved": (found.mean_cost, found.accuracy),
        "final exit": (1.0, evaluation.exit_quality(seen.outputs[-1:], seen.labels)[0].accuracy),
        **twins,
    }
    costs = net.cost.tolist()
    with canvas(path, 15, max(7.5, len(costs) + 1.5)) as drawn:
        drawn.suptitle(title, fontsize=11)
        left, right = drawn.subfigures(1, 2, width_ratios=(1, 1.4))
        above, below = left.subplots(2, 1)
        figures.accuracy_against_cost(above, curves, points)
        figures.exit_histogram(below, found.right, found.wrong, costs)
        figures.examples(
            right, seen.images, seen.labels, result.labels, result.exit_index, costs, examples, net.classes
        )


def _twin(text: str) -> tuple[str, tuple[float, float]]:
    """name=accuracy[,cost] → name, (cost, accuracy)."""
    name, _, numbers = text.rpartition("=")
    try:
        accuracy, cost = map(float, numbers.split(",") if "," in numbers else (numbers, "1"))
    except ValueError:
        accuracy = cost = -1
    if not name or not (0 <= accuracy <= 1 and cost >= 0):
        raise ValueError(
            f"twin={text!r} must be name=accuracy[,cost] with an accuracy in 0 … 1, such as ResNet-20=0.991"
        )
    return name, (cost, accuracy)


def _thinned(front: Sequence[Calibration], most: int = 60) -> list[Calibration]:
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)] if len(front) > most else list(front)
