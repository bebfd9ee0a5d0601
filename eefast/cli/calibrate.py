"""`eefast calibrate`: a network and held-out training images → thresholds under a budget, criteria compared."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from typer import Option

from . import inputs
from .options import (
    BatchSize,
    Cache,
    CriterionName,
    DataRoot,
    Dataset,
    Device,
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
from .output import ECE_WORDS, bars, counts, quality_table, say, table, words, write_json


def calibrate(
    network: Network,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    download: Download = False,
    min_accuracy: MinAccuracy = None,
    max_accuracy_drop: MaxAccuracyDrop = None,
    max_cost: MaxCost = None,
    criterion: CriterionName = "",
    scale: Annotated[
        bool, Option(help="First fit temperatures per exit, and the confidence row; part of what is saved.")
    ] = False,
    save: Annotated[bool, Option(help="Write the thresholds into the network's folder.")] = False,
    held_out: HeldOut = None,
    seed: Seed = None,
    other_data: OtherData = False,
    few_images: FewImages = False,
    cache: Cache = None,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    json_path: Json = "",
) -> None:
    """Choose thresholds under a budget on held-out training images, and compare criteria on the same network."""
    from ..measure import environment
    from ..thresholds import calibration, evaluation, scaling
    from ..thresholds.outputs import by_thresholds

    kind, value = inputs.budget(min_accuracy=min_accuracy, max_accuracy_drop=max_accuracy_drop, max_cost=max_cost)
    inputs.check_saving(network, save)
    inputs.check_folders(json_path, cache)
    net, source = inputs.opened(network, dataset, data_root, download, workers, device, other_data)
    names = inputs.criteria(criterion, net)
    if save:
        net.check_saving()
    if scale:
        scaling.scalable_layers(net)
    kept = inputs.Kept(source, held_out, seed, None if few_images else inputs.least_images(kind, value))
    with bars() as progress:
        outputs, labels = kept.outputs(net, cache, batch_size, progress)
        raw = evaluation.exit_quality(outputs, labels)
        fitted = scaling.fit_scaling(outputs, labels) if scale else None
        if fitted is not None:
            outputs = scaling.scaled(outputs, fitted)
        chosen, impossible = inputs.thresholds(net, outputs, labels, names, kind, value, progress)
    exits = {
        name: by_thresholds(outputs, net, name, c.thresholds).exit_index.bincount(minlength=net.num_exits + 1)
        for name, c in chosen.items()
    }
    quality = evaluation.exit_quality(outputs, labels)
    if save:
        if fitted is not None:
            scaling.fold_scaling(net, fitted)
        calibration.save_thresholds(net, network, chosen)
    if json_path != "-":
        say(f"\n{words(net)}, {len(labels):,} held-out images of {source.dataset}, {kind} {value:g}\n")
        rows = [[name, f"{c.accuracy:.2%}", f"{c.cost:.4f}", counts(exits[name])] for name, c in chosen.items()]
        say(table(["criterion", "accuracy", "mean cost", "images per exit"], rows))
        for name, why in impossible.items():
            say(f"{name}: {why}")
        say()
        say(quality_table(net, quality, before=raw if scale else None, scaling=fitted))
        say(f"\n{ECE_WORDS}")
        if save:
            say(f"\nsaved: {network}")
    figures = {
        "network": str(network),
        "dataset": source.dataset,
        "held_out": len(labels),
        "seed": kept.seed,
        "bound": {kind: value},
        "chosen": {name: {**asdict(c), "exits": exits[name].tolist()} for name, c in chosen.items()},
        "impossible": impossible,
        "exits": [asdict(q) for q in quality],
        "exits_before_scaling": [asdict(q) for q in raw] if scale else None,
        "scaling": asdict(fitted) if fitted is not None else None,
        "environment": environment.environment(),
    }
    write_json(json_path, figures)
