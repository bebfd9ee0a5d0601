"""Search options → a folder with the network whose exits were found, and the report: the steps of a run in order."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import zoo
from ..checkpoint.loading import load
from ..criteria import get
from ..data import datasets
from ..data.image_sets import fingerprint
from ..data.loaders import ImageLoader, batches
from ..preprocessing import Preprocessing
from ..record import TrainingRecord
from ..surgery import backbone as library_backbone
from ..system import files
from ..system.progress import Progress
from ..system.strict_json import json_text
from ..thresholds.calibration import THRESHOLDS_FILE, Calibration
from ..thresholds.evaluation import exit_quality
from ..thresholds.outputs import collect, exits_taken, outcome
from ..train.batches import training_batches
from ..train.folder import STARTED_FILE
from ..train.images import RunImages, open_images
from ..train.initial_weights import initialise
from ..train.module import EarlyExitModule
from ..train.resume import find_checkpoint
from ..train.run import BATCH_SIZE
from ..train.trainer import fit, seed_everything
from .candidates import Candidates
from .choice import Kept, choose
from .options import SearchOptions
from .schemes import scheme_exits
from .seconds import time_costs
from .supernet import Supernet, of_backbone, of_network

REPORT_FILE = "search.json"


@dataclass(frozen=True)
class Exits:
    """Early exits with their rule and thresholds; accuracy and mean cost are those of the held-out images.

    places: names of modules, or numbers of residual blocks before them; kinds: of their heads.
    """

    places: tuple[str | int, ...]
    kinds: tuple[str, ...]
    thresholds: Calibration


@dataclass(frozen=True)
class SearchReport:
    """What a search found; `search.json` holds the same.

    arguments: `SearchOptions.record`.
    candidates: place, kind, cost alone and held-out accuracy of all heads that were trained.
    final_accuracy: of the final exit on the held-out images. found: the best exits; exits: images at each of them.
    schemes: the best exits of each placement scheme of EENets within the same limit and by the same rule, from the same
        heads, see `schemes.scheme_exits`; empty without a limit of the cost or time.
    mean_cost: of `found`, in MACs with all heads; mean_time: the same in time, where that was the limit.
    parameters: of the network. front: of all subsets at shared levels, by ascending cost, in the unit of the limit.
    subsets, all_subsets, all_thresholds: see `choice.Choice`.
    test: of `found` and of the final exit on the test images, where they were asked for; schemes_test: of `schemes`.
    """

    arguments: dict[str, Any]
    candidates: tuple[dict[str, Any], ...]
    final_accuracy: float
    found: Exits
    exits: list[int]
    mean_cost: float
    mean_time: float | None
    parameters: int
    front: tuple[Exits, ...]
    schemes: dict[str, Exits]
    subsets: int
    all_subsets: bool
    all_thresholds: bool
    test: dict[str, float] | None
    schemes_test: dict[str, dict[str, float]]
    seconds_per_epoch: list[float]


def search(options: SearchOptions, progress: Progress) -> SearchReport:
    """Train heads at all places, find the exits that are best within the limits, save their network to `output`.

    Raises as `eefast.train.run.train`, and can be resumed as that; `ValueError` where no exits keep the limits, with
    the lowest cost that can be kept; a resumed run with other limits then needs no training.
    """
    output = Path(options.output)
    checkpoint = find_checkpoint(output, options) if options.resume else None
    images = open_images(options)
    seed_everything(options.seed)
    supernet = make_supernet(options, images)
    net = supernet.net
    held_out = batches(images.held_out, BATCH_SIZE, options.workers)
    module = _module(options, images, supernet)
    train_batches = training_batches(images.augmented, options.batch_size, options.seed, options.workers)
    assert net.record is not None
    fitted = fit(module, train_batches, held_out, options, net.record.fingerprint, checkpoint)
    module.load_state_dict(fitted.best["state_dict"])
    net.eval().to(fitted.device)

    outputs, labels = collect(net, held_out.reported("held-out images", progress))
    by_macs = Candidates(outputs, labels, net.stage_costs, supernet.place_numbers, supernet.parameters())
    candidates = by_macs
    if options.max_time is not None:
        candidates = replace(by_macs, costs=time_costs(net, _some(net, held_out), progress))
    limit = options.max_cost if options.max_time is None else options.max_time
    choice = choose(
        candidates, options.criteria, progress, max_cost=limit, max_parameters=options.max_parameters,
        limit_name="max_cost" if options.max_time is None else "max_time",
    )  # fmt: skip
    best = choice.best.thresholds
    schemes = {} if limit is None else scheme_exits(supernet, candidates, best.criterion, limit, progress)
    # Of exits that a local search did not compare, too, the best are kept.
    most = options.max_parameters or by_macs.parameters_of(tuple(range(len(supernet.kinds))))
    fitting = [kept for kept in schemes.values() if by_macs.parameters_of(kept.subset) <= most]
    chosen = max((choice.best, *fitting), key=lambda kept: (kept.thresholds.accuracy, -kept.thresholds.cost))
    best = chosen.thresholds
    network = supernet.network(chosen.subset, best.criterion, best.thresholds)
    seen = by_macs.outputs_of(chosen.subset)
    taken = exits_taken(seen, get(best.criterion), best.thresholds)
    test = None if images.test is None else batches(images.test, BATCH_SIZE, options.workers)
    report = SearchReport(
        arguments={**options.record(), "held_out": len(labels)},
        candidates=_described(supernet, by_macs),
        final_accuracy=exit_quality(outputs[-1:], labels)[0].accuracy,
        found=_named(supernet, chosen),
        exits=taken.bincount(minlength=len(seen)).tolist(),
        mean_cost=by_macs.cost_of(chosen.subset).double()[taken].mean().item(),
        mean_time=best.cost if options.max_time is not None else None,
        parameters=by_macs.parameters_of(chosen.subset),
        front=tuple(_named(supernet, point) for point in choice.front),
        schemes={name: _named(supernet, kept) for name, kept in schemes.items()},
        subsets=choice.subsets,
        all_subsets=choice.all_subsets,
        all_thresholds=choice.all_thresholds,
        test=None if test is None else _tested(network, best, test, progress),
        schemes_test={} if test is None or not schemes else _schemes_tested(supernet, by_macs, schemes, test, progress),
        seconds_per_epoch=fitted.seconds_per_epoch,
    )
    if fitted.is_first_process:
        with files.together():
            network.save(output)
            files.write(output / THRESHOLDS_FILE, json_text({best.criterion: list(best.thresholds)}))
            files.write(output / REPORT_FILE, json_text(asdict(report)))
        (output / STARTED_FILE).unlink(missing_ok=True)
    return report


def make_supernet(options: SearchOptions, images: RunImages) -> Supernet:
    """The network with all candidates, from the folder, file or name in `options`, with the record of its images."""
    info, where = images.info, Path(options.network).expanduser()
    places = list(options.exits) or None
    normalization = (list(info.mean), list(info.std))
    if where.exists():
        given = load(where) if where.is_dir() else load(where, input_shape=info.shape, normalization=normalization)
        if given.input_shape != tuple(info.shape) or given.num_classes != info.num_classes:
            raise ValueError(
                f"network={str(where)!r} takes images {given.input_shape} of {given.num_classes} classes, but those of "
                f"{options.dataset} are {tuple(info.shape)} of {info.num_classes}; name the data set it was trained on"
            )
        _check_images(options, images, given.record)
        given = given.float()
        if options.weights is not None:
            raise ValueError(f"weights={str(options.weights)!r}: {where} has its own; leave this out")
        supernet = of_network(given, options.kinds, places, options.most_places)
    elif ":" in str(options.network):
        if options.weights is None and options.freeze_backbone:
            raise ValueError(_random(options))
        body = library_backbone(str(options.network), info.num_classes, info.shape[0])
        if options.weights is not None:
            initialise(body, str(options.network), options.weights, options.download, options.freeze_backbone)
        supernet = of_backbone(body, info.shape, normalization, options.kinds, places, options.most_places)
    elif str(options.network) in zoo.names():
        if options.freeze_backbone:
            raise ValueError(_random(options))
        given = zoo.eenet(
            str(options.network), placement=[1], num_classes=info.num_classes, input_shape=info.shape,
            normalization=normalization,
        )  # fmt: skip
        supernet = of_network(given, options.kinds, places, options.most_places)
    else:
        raise FileNotFoundError(
            f"network={str(options.network)!r} is neither a folder or file nor one of {', '.join(zoo.names())}, "
            "torchvision:NAME, timm:NAME"
        )
    net = supernet.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.record = datasets.record(
        net.name, net.num_classes, info.shape, options.dataset, images.whole, len(images.held_out), options.seed
    )
    net.preprocessing = Preprocessing(net.record.resize or min(info.shape[1:]))
    net.classes = net.record.classes
    return supernet


def _check_images(options: SearchOptions, images: RunImages, record: TrainingRecord | None) -> None:
    """`ValueError` where images that the network was trained on would be held out."""
    if record is None or options.other_data:
        return
    known = options.dataset, len(images.whole), fingerprint(images.whole), len(images.held_out), options.seed  # type: ignore[arg-type]
    if known != (record.dataset, record.images, record.fingerprint, record.held_out, record.seed):
        raise ValueError(
            f"network={str(options.network)!r} was trained on the {record.images:,} images of {record.dataset} but for "
            f"{record.held_out:,} by seed {record.seed}; use these, or add --other-data (other_data=True) to use others"
        )


def _random(options: SearchOptions) -> str:
    return (
        f"network={str(options.network)!r} has random weights, which a frozen backbone keeps; give a folder with a "
        "trained network, weights of a backbone (--weights), or train it too: --train-backbone (freeze_backbone=False)"
    )


def _module(options: SearchOptions, images: RunImages, supernet: Supernet) -> EarlyExitModule:
    return EarlyExitModule(
        supernet.net,
        options.loss,
        optimizer=options.optimizer,
        schedule=options.schedule,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        shift=images.info.shift if options.shift is None else options.shift,
        flip=images.info.flip if options.flip is None else options.flip,
        frozen=options.freeze_backbone,
        balanced=options.balance_gradients,
        seed=options.seed,
    )


def _some(net: Any, held_out: ImageLoader) -> Tensor:
    images, _ = next(iter(held_out))
    prepared: Tensor = net.prepare(images.to(net.cost.device))
    return prepared


def _named(supernet: Supernet, kept: Kept) -> Exits:
    places, kinds = ([part[e] for e in kept.subset] for part in (supernet.places, supernet.kinds))
    return Exits(tuple(places), tuple(kinds), kept.thresholds)  # type: ignore[arg-type]


def _described(supernet: Supernet, candidates: Candidates) -> tuple[dict[str, Any], ...]:
    quality = exit_quality(candidates.outputs, candidates.labels)
    cost = supernet.net.cost.tolist()
    return tuple(
        {"place": place, "kind": kind, "cost": cost[e], "accuracy": quality[e].accuracy}
        for e, (place, kind) in enumerate(zip(supernet.places, supernet.kinds, strict=True))
    )


def _schemes_tested(
    supernet: Supernet, candidates: Candidates, schemes: dict[str, Kept], test: ImageLoader, progress: Progress
) -> dict[str, dict[str, float]]:
    """Accuracy and mean cost in MACs of every scheme's exits; candidates: with costs in MACs."""
    outputs, labels = collect(supernet.net, test.reported("test images, schemes", progress))
    tested = replace(candidates, outputs=outputs, labels=labels)
    found = {
        name: outcome(
            tested.outputs_of(kept.subset), labels, tested.cost_of(kept.subset), kept.thresholds.criterion,
            kept.thresholds.thresholds,
        )
        for name, kept in schemes.items()
    }  # fmt: skip
    return {name: {"accuracy": accuracy, "mean_cost": cost} for name, (accuracy, cost) in found.items()}


def _tested(network: Any, best: Calibration, test: ImageLoader, progress: Progress) -> dict[str, float]:
    outputs, labels = collect(network, test.reported("test images", progress))
    accuracy, cost = outcome(outputs, labels, network.path_cost, best.criterion, best.thresholds)
    return {
        "accuracy": accuracy,
        "mean_cost": cost,
        "final_accuracy": exit_quality(outputs[-1:], labels)[0].accuracy,
    }
