"""`eefast quantize`: a network and held-out training images → the same network in INT8, its thresholds chosen again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Option

from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE
from ..checkpoint.stored import read_json
from ..system import files
from . import render
from .budget import choose_thresholds, criterion_names, least_images, read_budget
from .choices import RANGE_IMAGES
from .held_out import HeldOutImages
from .inputs import open_network
from .options import (
    BatchSize,
    CriterionName,
    DataRoot,
    Dataset,
    Download,
    FewImages,
    HeldOut,
    Json,
    MaxAccuracyDrop,
    MaxCost,
    MinAccuracy,
    Network,
    OtherData,
    Seed,
    Workers,
)
from .output import bars, check_writable, echo, next_step, write_json

if TYPE_CHECKING:
    from ..measure.precisions import PrecisionLoss
    from ..model import EarlyExitNet
    from ..thresholds.calibration import Calibration

LEGEND = "on the held-out images, each network under its criterion and thresholds; MB of weights: 10⁶ bytes"


def command(
    network: Network,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    download: Download = False,
    output: Annotated[
        Path | None, Option(help="Folder for the INT8 network; by default NETWORK-int8.", show_default=False)
    ] = None,
    range_images: Annotated[
        int, Option(help="Number of held-out images, at least 16, from which the ranges of maps are taken.", min=1)
    ] = RANGE_IMAGES,
    percentile: Annotated[
        float, Option(help="Share of a map's values, in percent, that eight bits hold; larger values are cut off.")
    ] = 99.99,
    winograd: Annotated[
        bool | None,
        Option(
            help="F(2, 3) for all 3 × 3 convolutions, or direct sums; by default what is fast and keeps the logits.",
            show_default=False,
        ),
    ] = None,
    keep_thresholds: Annotated[
        bool, Option("--keep-thresholds", help="Keep those of the float32 network; labels are used for the table only.")
    ] = False,
    min_accuracy: MinAccuracy = None,
    max_accuracy_drop: MaxAccuracyDrop = None,
    max_cost: MaxCost = None,
    criterion: CriterionName = "",
    held_out: HeldOut = None,
    seed: Seed = None,
    other_data: OtherData = False,
    few_images: FewImages = False,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    json_path: Json = "",
) -> None:
    """Quantise a network to INT8 on held-out training images and choose its thresholds again, on its outputs in INT8.

    Without a budget: the most accurate thresholds with at most the mean cost that the float32 network has.
    """
    from ..data import loaders
    from ..measure import environment, precisions
    from ..quantization.post_training import quantize
    from ..thresholds import calibration
    from ..thresholds.candidates import candidate_of
    from ..thresholds.outputs import answered, collect, outcome

    bounds = {"min_accuracy": min_accuracy, "max_accuracy_drop": max_accuracy_drop, "max_cost": max_cost}
    budget = read_budget(**bounds) if any(bound is not None for bound in bounds.values()) else None
    if keep_thresholds and (budget is not None or criterion):
        raise ValueError("keep_thresholds=True chooses nothing; leave out --criterion and the budget, or itself")
    folder = _output(network, output)
    check_writable(json_path)
    net, source = open_network(network, dataset, data_root, download, workers, "cpu", other_data)
    names = criterion_names(criterion, net)
    least = None if few_images or keep_thresholds else least_images(dict([budget] if budget else []))
    aside = HeldOutImages(source, held_out, seed, least)
    with bars() as progress:
        kept = aside.images(net)
        progress("quantising", 0, 1)
        made = quantize(
            net, aside.first(net, range_images), percentile=percentile,
            winograd="auto" if winograd is None else winograd,
        )  # fmt: skip
        progress("quantising", 1, 1)
        batches = loaders.batches(kept, batch_size, workers)
        outputs, labels = collect(net, batches.reported("held-out images, float32", progress))
        found, _ = collect(made, batches.reported("held-out images, INT8", progress))
        chosen: dict[str, calibration.Calibration] = {}
        impossible: Mapping[str, str] = {}
        if made.num_exits and not keep_thresholds:
            seen = answered(outputs, net)
            cost = outcome(seen, labels, net.cost, net.criterion.name, net.thresholds.tolist())[1]
            candidates = {name: candidate_of(made, name) for name in names}
            bounds_kept = dict([budget or ("max_cost", cost)])
            chosen, impossible = choose_thresholds(made, found, labels, candidates, bounds_kept, progress)
    folder.mkdir(parents=True, exist_ok=True)
    if chosen:
        made = calibration.save_thresholds(made, folder, chosen)
    else:
        with files.together():
            made.save(folder)
            (folder / calibration.THRESHOLDS_FILE).unlink(missing_ok=True)
    loss = precisions.compare(net, outputs, made, found, labels)
    used = precisions.algorithms(made)
    if json_path != "-":
        ranged = min(range_images, len(labels))
        echo(f"\n{render.describe(net)}, {len(labels):,} held-out images of {source.dataset}, ranges from {ranged:,}\n")
        echo(loss_table(loss))
        echo(f"\n{LEGEND}\n")
        echo(f"{loss.other_exits:.2%} of the images take another exit, {loss.other_classes:.2%} get another class")
        echo("convolutions: " + ", ".join(f"{n} {name}" for name, n in used.items()))
        echo(_origin(made, chosen, budget, loss))
        for name, why in impossible.items():
            echo(f"{name}: {why}")
        echo(f"\nsaved: {folder}")
        next_step(f"eefast bench {folder} --own-thresholds")
    figures = {
        "network": str(network),
        "output": str(folder),
        "dataset": source.dataset,
        "held_out": len(labels),
        "seed": aside.seed,
        "range_images": min(range_images, len(labels)),
        "percentile": percentile,
        "criterion": made.criterion.name,
        "thresholds": made.thresholds.tolist(),
        "chosen": {name: asdict(c) for name, c in chosen.items()},
        "impossible": dict(impossible),
        "convolutions": used,
        **asdict(loss),
        "environment": environment.inspect_environment(),
    }
    write_json(json_path, figures)


def loss_table(loss: PrecisionLoss) -> Table:
    """A row per figure, float32 beside INT8."""
    before, after = loss.float32, loss.int8
    rows = [
        ["accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}"],
        ["mean cost", f"{before.mean_cost:.4f}", f"{after.mean_cost:.4f}"],
        ["accuracy of the last exit", f"{before.last_exit_accuracy:.2%}", f"{after.last_exit_accuracy:.2%}"],
        ["MB", f"{before.megabytes:.3f}", f"{after.megabytes:.3f}"],
    ]
    return render.table(["", "float32", "INT8"], rows)


def _origin(
    made: EarlyExitNet,
    chosen: Mapping[str, Calibration],
    budget: tuple[str, float] | None,
    loss: PrecisionLoss,
) -> str:
    """Where the thresholds come from."""
    if not made.num_exits:
        return "thresholds: none, the network has no early exits"
    if not chosen:
        return "thresholds: those of the float32 network, not chosen on outputs in INT8; eefast calibrate --save does"
    bound = "{} {:g}".format(*budget) if budget else f"at most the mean cost in float32, {loss.float32.mean_cost:.4f}"
    return f"thresholds: chosen on outputs in INT8, {made.criterion.name}, {bound}"


def _output(network: Path, output: Path | None) -> Path:
    """The folder to write to; `ValueError` unless it is new, or has a quantised network that may be replaced."""
    if output is None:
        base = network if network.name not in ("", "..") else network.resolve()
        output = base.with_name(f"{base.stem if base.is_file() else base.name}-int8")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    config = output / CONFIG_FILE
    if config.exists() and read_json(config).get("kind") not in ("quantized", "qdq"):
        raise ValueError(f"--output {output} holds a network that is not quantised; name another folder")
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    files.check(parent / WEIGHTS_FILE)
    return output
