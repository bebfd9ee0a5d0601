"""`eefast plot`: a network and images → a picture of accuracy against cost, of exits, of examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

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
from .output import bars, check_writable, echo
from .pictures import canvas, check_picture
from .render import describe

if TYPE_CHECKING:
    from torch import Tensor

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
    examples: Annotated[int, Option(help="Images right, and as many wrong, per exit.", min=1)] = 6,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    output: Figure = Path("eefast-plot.png"),
) -> None:
    """Draw accuracy against mean cost beside static networks, images per exit, and examples of who leaves where."""
    import torch

    from ..data import loaders
    from ..measure import figures as drawing
    from ..thresholds import calibration, evaluation
    from ..thresholds.outputs import by_thresholds, collect, outcome

    points = dict(map(_twin, twin or []))
    check_writable(cache)
    check_picture(output)
    net, source = open_network(network, dataset, data_root, download, workers, device, other_data)
    names = criterion_names(criterion, net)
    measured = loaders.batches(load_images(net, source, split, images), batch_size, workers)
    least = None if few_images else least_images()
    aside = None if same_images else HeldOutImages(source, held_out, seed, least)
    with bars() as progress:
        kept = None if aside is None else aside.outputs(net, cache, batch_size, progress)
        pixels: list[Tensor] = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in measured.reported("asking every exit", progress):
                pixels.append(x)
                yield x, y

        outputs, labels = collect(net, batches())
        chosen_on = kept or (outputs, labels)
        curves = {}
        for i, name in enumerate(names):
            progress("choosing thresholds", i, len(names))
            front = calibration.pareto_front(chosen_on[0], chosen_on[1], net.cost, name)
            line = [outcome(outputs, labels, net.cost, name, c.thresholds) for c in _thinned(front)]
            line.sort(key=lambda point: point[1])
            curves[name] = [cost for _, cost in line], [accuracy for accuracy, _ in line]
        progress("choosing thresholds", len(names), len(names))
    result = by_thresholds(outputs, net, net.criterion.name, net.thresholds.tolist())
    found = evaluation.evaluate(result, labels, net)
    points = {
        f"{net.criterion.name}, as saved": (found.mean_cost, found.accuracy),
        "final exit": (1.0, evaluation.exit_quality(outputs[-1:], labels)[0].accuracy),
        **points,
    }
    kept_words = "the same images: optimistic" if kept is None else f"{len(kept[1]):,} held-out training images"
    title = (
        f"{describe(net)}, {len(labels):,} images of {source.dataset} ({split})\n"
        f"thresholds of the curves chosen on {kept_words}"
    )
    costs = net.cost.tolist()
    with canvas(output, 15, max(7.5, len(costs) + 1.5)) as drawn:
        drawn.suptitle(title, fontsize=11)
        left, right = drawn.subfigures(1, 2, width_ratios=(1, 1.4))
        above, below = left.subplots(2, 1)
        drawing.accuracy_against_cost(above, curves, points)
        drawing.exit_histogram(below, found.right, found.wrong, costs)
        seen = torch.cat(pixels), labels, result.labels, result.exit_index
        drawing.examples(right, *seen, costs, examples)
    echo(f"figure: {output}")


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
