"""Training options → a folder with a trained network, its thresholds and the report: the steps of a run in order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import zoo
from ..checkpoint.loading import load
from ..checkpoint.weights import load_network
from ..data import datasets
from ..data.loaders import batches
from ..model import EarlyExitNet
from ..preprocessing import Preprocessing
from ..surgery import attach
from ..surgery import backbone as library_backbone
from ..system import files
from . import losses
from .batches import training_batches
from .folder import STARTED_FILE
from .images import RunImages, open_images
from .initial_weights import initialise
from .module import EarlyExitModule
from .options import TrainOptions
from .report import TrainReport, make_report, write_report
from .resume import find_checkpoint
from .trainer import fit, seed_everything
from .unseen_images import check_unseen

# Images per call where nothing is learned.
BATCH_SIZE = 500


def train(options: TrainOptions) -> TrainReport:
    """Train an early-exit network, choose its thresholds on held-out training images, save it to `options.output`.

    Raises `ValueError` for options and checkpoints that do not fit and `FileNotFoundError` for missing files, before
    anything is written; `RuntimeError` if the loss is NaN or infinite or if images cannot be read any more;
    `system.files.WriteError` on a full disk and the like. After these, `KeyboardInterrupt` or a killed process, the run
    can be resumed.
    """
    output = Path(options.output)
    checkpoint = find_checkpoint(output, options) if options.resume else None
    images = open_images(options)
    seed_everything(options.seed)
    network = _network(options, images)
    assert network.record is not None
    held_out = batches(images.held_out, BATCH_SIZE, options.workers)
    module = _module(options, images, network)
    train_batches = training_batches(images.augmented, options.batch_size, options.seed, options.workers)
    fitted = fit(module, train_batches, held_out, options, network.record.fingerprint, checkpoint)

    module.load_state_dict(fitted.best["state_dict"])
    network.eval().to(fitted.device)
    test = None if images.test is None else batches(images.test, BATCH_SIZE, options.workers)
    report = make_report(options, fitted, network, held_out, test)
    if fitted.is_first_process:
        with files.together():
            network.save(output)
            write_report(output, report)
        (output / STARTED_FILE).unlink(missing_ok=True)
    return report


def _network(options: TrainOptions, images: RunImages) -> EarlyExitNet:
    """The network to train, from PyTorch's random numbers or `options.weights`, with the record of its images.

    Raises `ValueError` for names, exits, weights and a maximum cost that do not fit.
    """
    info, normalization = images.info, (list(images.info.mean), list(images.info.std))
    if options.backbone:
        body = library_backbone(options.backbone, info.num_classes, info.shape[0])
        if options.weights is not None:
            initialise(body, options.backbone, options.weights, options.download, options.freeze_backbone)
        network = attach(
            body, options.exits, head=options.head, input_shape=info.shape, normalization=normalization,
            carry=options.carry,
        )  # fmt: skip
    else:
        network = zoo.eenet(
            options.net, options.num_exits, options.placement, options.head, info.num_classes, info.shape,
            normalization=normalization, carry=options.carry,
        )  # fmt: skip
        if options.weights is not None:
            others = load_network(network, options.weights)
            if others:
                print(
                    f"weights={str(options.weights)!r} has heads of another kind: exits {others} start from random "
                    "weights",
                    file=sys.stderr,
                )
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    name, held_out = options.backbone or options.net, len(images.held_out)
    network.record = datasets.record(
        name, network.num_classes, info.shape, options.dataset, images.whole, held_out, options.seed
    )
    network.preprocessing = Preprocessing(network.record.resize or min(info.shape[1:]))
    network.classes = network.record.classes
    if options.weights is not None and not options.other_data:
        check_unseen(options.weights, network.record)
    if options.max_cost is not None and not options.max_cost >= float(network.cost[0]):
        raise ValueError(f"max_cost={options.max_cost} is less than the first exit costs, {network.cost[0]:.4f}")
    return network


def _some(names: Sequence[str] | None) -> str:
    """The first names, for a message."""
    names = names or ()
    return ", ".join(names[:3]) + " …" * (len(names) > 3)


def _module(options: TrainOptions, images: RunImages, network: EarlyExitNet) -> EarlyExitModule:
    loss = losses.parse(options.loss, options.cost_weight)
    teacher = None if options.teacher is None else _teacher(options.teacher, network)
    return EarlyExitModule(
        network,
        loss,
        first_epochs=options.two_stage,
        optimizer=options.optimizer,
        schedule=options.schedule,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        shift=images.info.shift if options.shift is None else options.shift,
        flip=images.info.flip if options.flip is None else options.flip,
        frozen=options.freeze_backbone,
        self_labelled=options.self_labelled,
        balanced=options.balance_gradients,
        tag_batches=batches(images.unchanged, BATCH_SIZE, options.workers) if loss.uses_tags else None,
        seed=options.seed,
        teacher=teacher,
    )


def _teacher(folder: str | Path, network: EarlyExitNet) -> EarlyExitNet:
    """The network that teaches `network`; `ValueError` unless it takes the same images and knows the same classes."""
    path = Path(folder).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"teacher={str(folder)!r}: there is no such folder; give one that eefast train wrote")
    try:
        teacher = load(path)
    except ValueError as error:
        raise ValueError(f"teacher={str(folder)!r}: {error}") from error
    if not isinstance(teacher, EarlyExitNet):
        raise ValueError(f"teacher={str(folder)!r} is quantised; give the float network that it was made from")
    for name in ("num_classes", "input_shape"):
        found, wanted = getattr(teacher, name), getattr(network, name)
        if found != wanted:
            raise ValueError(
                f"teacher={str(folder)!r} has {name}={found}, the network to train {wanted}; choose a teacher for the "
                "same images and classes"
            )
    if teacher.classes is not None and network.classes is not None and teacher.classes != network.classes:
        raise ValueError(
            f"teacher={str(folder)!r} knows the classes {_some(teacher.classes)}, the network to train "
            f"{_some(network.classes)}; choose a teacher for the same images and classes"
        )
    learned, here = teacher.record, network.record
    # Where classes have no names, the data set tells them apart.
    nameless = teacher.classes is None and network.classes is None
    if nameless and learned is not None and here is not None and learned.dataset != here.dataset:
        raise ValueError(
            f"teacher={str(folder)!r} was trained on {learned.dataset}, and this is {here.dataset}; choose a teacher "
            "for the same images and classes"
        )
    if teacher.normalization is None:
        raise ValueError(
            f"teacher={str(folder)!r} has no normalization, so that it takes no images of a data set; save it with one "
            "(normalization=(mean, std) where it was made)"
        )
    return teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
