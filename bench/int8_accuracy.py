"""Trained networks and their data → what eight bits change: accuracy, cost and exits on test images, as rows.

Ranges and thresholds come from the training images that were held out, test images only answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_sets
import quantized_outputs
import torch
from command import run_command
from progress import track
from rows import Int8Row, append, environment, read, results_file
from summary import show
from torch import Tensor
from torch.utils.data import Subset

import eefast
from eefast.data import datasets
from eefast.data.loaders import batches, split
from eefast.model import EarlyExitNet
from eefast.planning.integer_lowering import is_quantized
from eefast.quantized import ALGORITHMS, QuantizedConvolution
from eefast.result import ExitOutput
from eefast.thresholds.calibration import THRESHOLDS_FILE, calibrate
from eefast.thresholds.evaluation import exit_quality
from eefast.thresholds.outputs import by_thresholds, collect, outcome

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "eefast" / "assets" / "eenet-mnist"
BATCH_SIZE, CALIBRATION_IMAGES = 250, 256
WAYS: dict[str, Any] = {
    "float32": None, "int8, direct": 0, "int8, F(2, 3)": 1, "int8, F(2×2, 3×3)": 2, "int8": "auto",
}  # fmt: skip
"""Name → `winograd` of `eefast.quantize`; None: not quantised."""


@dataclass(frozen=True)
class Images:
    """uint8 [N, C, H, W], and their classes [N] int64."""

    pixels: Tensor
    labels: Tensor

    def outputs(self, net: EarlyExitNet, what: str) -> list[ExitOutput]:
        """Of all exits, in PyTorch; of a quantised network on the maps of the resident engine, which are the same."""
        parts = list(zip(self.pixels.split(BATCH_SIZE), self.labels.split(BATCH_SIZE), strict=True))
        turns = track([Part(f"images from {BATCH_SIZE * i}", part) for i, part in enumerate(parts)], what)
        if is_quantized(net):
            return quantized_outputs.outputs(net, (turn.batch[0] for turn in turns))
        return collect(net, (turn.batch for turn in turns))[0]


@dataclass(frozen=True)
class Part:
    """A batch, and how it is called while it is answered."""

    name: str
    batch: tuple[Tensor, Tensor]

    def __str__(self) -> str:
        return self.name


def opened(folder: Path) -> EarlyExitNet:
    """The network of a folder with the thresholds of its thresholds.json, where there is one."""
    net = eefast.load(folder).eval()
    if (folder / THRESHOLDS_FILE).is_file():
        known = json.loads((folder / THRESHOLDS_FILE).read_text())
        net.thresholds.copy_(torch.tensor([float(v) for v in known.get(net.criterion.name, net.thresholds.tolist())]))
    return net


def data_of(net: EarlyExitNet, folder: Path, root: Path, most: int | None = None) -> tuple[Images, Images]:
    """The images that were held out when the network of `folder` was trained, and the test images.

    most: the first of both, None: all. Raises `ValueError` where its folder does not say what it was trained on.
    """
    return held_out_of(net, folder, root, most), _read(_opened_part(net, folder, root, "test"), most)


def held_out_of(net: EarlyExitNet, folder: Path, root: Path, most: int | None = None) -> Images:
    """The first of what `data_of` returns; no test image is read."""
    images = _opened_part(net, folder, root, "train")
    assert net.record is not None
    return _read(split(images, net.record.held_out, net.record.seed)[1], most)


def _opened_part(net: EarlyExitNet, folder: Path, root: Path, part: str) -> Any:
    record = net.record
    if record is None:
        raise ValueError(f"{folder} has no training.json, so its data are unknown; name a folder of `eefast train`")
    root = data_sets.root_of(data_sets.name_of(record), root)
    size = net.input_shape[1] if record.dataset in datasets.RESIZED else None
    return datasets.dataset(record.dataset, root, part, image_size=size, resize=record.resize)


def _read(images: Any, most: int | None) -> Images:
    part = images if most is None else Subset(images, range(min(most, len(images))))
    pixels, labels = zip(*batches(part, BATCH_SIZE), strict=True)
    return Images(torch.cat(pixels), torch.cat(labels))


def measured(name: str, net: EarlyExitNet, held_out: Images, test: Images) -> list[Int8Row]:
    """A row per way, with the thresholds of `net` and with those chosen again at its mean cost on held-out images."""
    criterion, before = net.criterion.name, net.thresholds.tolist()
    expected, bound, rows = None, 1.0, []
    for way, winograd in WAYS.items():
        made = net
        if winograd is not None:
            made = eefast.quantize(net, held_out.pixels[:CALIBRATION_IMAGES], winograd=winograd)
        seen, asked = held_out.outputs(made, f"{way}, held out"), test.outputs(made, f"{way}, test")
        if expected is None:
            bound = outcome(seen, held_out.labels, net.cost, criterion, before)[1]
            expected = by_thresholds(asked, net, criterion, before)
        chosen_again = calibrate(seen, held_out.labels, net.cost, criterion, max_cost=bound).thresholds
        for origin, thresholds in (("of float32", before), ("recalibrated", chosen_again)):
            answer = by_thresholds(asked, net, criterion, thresholds)
            taken, classes = answer.exit_index, answer.logits.argmax(1)
            rows.append(
                Int8Row(
                    quantized=name,
                    way=way,
                    criterion=criterion,
                    origin=origin,
                    thresholds=tuple(thresholds),
                    images=len(taken),
                    calibration_images=min(len(held_out.labels), CALIBRATION_IMAGES),
                    accuracy=float((classes == test.labels).double().mean()),
                    mean_cost=float(answer.cost.double().mean()),
                    exits=tuple(taken.bincount(minlength=net.num_exits + 1).tolist()),
                    elsewhere=int((taken != expected.exit_index).sum()),
                    other_answers=int((classes != expected.logits.argmax(1)).sum()),
                    last_accuracy=exit_quality(asked[-1:], test.labels)[0].accuracy,
                    details=_details(made),
                )
            )
    return rows


def name_of(net: EarlyExitNet) -> str:
    """What its record says: "eenet32 on mnist"."""
    assert net.record is not None
    return f"{net.record.network} on {data_sets.name_of(net.record)}"


def _details(net: EarlyExitNet) -> str:
    """How its convolutions are computed, and where: without Winograd before an exit, its row is that of direct sums."""
    stages = [[m.winograd for m in stage.modules() if isinstance(m, QuantizedConvolution)] for stage in net.stages]
    used = [winograd for of_stage in stages for winograd in of_stage]
    parts = []
    for winograd, name in enumerate(ALGORITHMS):
        where = ", ".join(str(i) for i, of_stage in enumerate(stages) if winograd in of_stage)
        parts += [f"{used.count(winograd)} {name} in stages {where}"] if where else []
    return "; ".join(parts)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Of a command that measures trained networks on their data."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "networks", nargs="*", type=Path, default=[SHIPPED], help="folders of `eefast train`; default: the one shipped"
    )
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder with mnist/ and such; data")
    return parser


def with_data(
    folders: Sequence[Path], root: Path, most: int | None = None
) -> list[tuple[EarlyExitNet, Images, Images]]:
    """Networks with their held-out and test images; what is missing is said before minutes are spent."""
    nets = {folder: opened(folder) for folder in folders}
    return [(net, *data_of(net, folder, root, most)) for folder, net in nets.items()]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, help="only the first of the held-out and of the test images")
    arguments = parser.parse_args()
    if arguments.images is not None and arguments.images < 16:
        parser.error(f"--images {arguments.images}: give at least 16, of which ranges can be taken")
    around = environment("cpu")
    for net, *data in track(with_data(arguments.networks, arguments.data_root, arguments.images), "networks"):
        append(measured(name_of(net), net, *data), around)
    print(show(read([results_file(around)], around["date"])))
    return 0


if __name__ == "__main__":
    run_command(main)
