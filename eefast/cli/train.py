"""`eefast train`: a data set's name → a folder with a trained network and its thresholds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from ..heads import HEADS
from ..train.options import TrainOptions
from .options import (
    Json,
    data_option,
    machine_option,
    network_option,
    run_option,
    thresholds_option,
    training_option,
)
from .output import check_writable, echo, next_step, write_json

if TYPE_CHECKING:
    from ..train.report import TrainReport

DEFAULT = TrainOptions()


def _options_from_file(context: typer.Context, config: Path | None) -> Path | None:
    """Options in a YAML file replace defaults; those on the command line replace both."""
    if config is None:
        return None
    import yaml

    try:
        found = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config={str(config)!r} is not YAML ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"config={str(config)!r} must hold lines such as `epochs: 12`")
    options = [parameter for parameter in context.command.params if parameter.name not in ("config", "help")]
    names = {word.lstrip("-").replace("-", "_"): option.name for option in options for word in option.opts}
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            close = get_close_matches(str(key).replace("-", "_"), names) or sorted(set(names.values()))
            raise ValueError(
                f"config={str(config)!r}: {key!r} is no option of train; similar ones are {', '.join(close)}"
            )
        if name in values:
            raise ValueError(f"config={str(config)!r}: {key!r} is given twice, under two names")
        values[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    context.default_map = values
    return config


def command(
    config: Annotated[
        Path | None,
        Option(
            help="YAML file with options by their long names, such as `epochs: 12`; the command line has priority.",
            callback=_options_from_file,
            is_eager=True,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    dataset: Annotated[
        str, data_option(help="mnist, fashion-mnist, svhn, cifar10, tiny-imagenet, imagenet, folder.")
    ] = DEFAULT.dataset,
    data_root: Annotated[
        Path, data_option("--data-root", "--data-dir", help="Folder with the data set's published files.")
    ] = Path(DEFAULT.data_root),
    download: Annotated[
        bool, data_option(help="Fetch missing files: data, where torchvision can, and published --weights.")
    ] = DEFAULT.download,
    image_size: Annotated[
        int | None,
        data_option(
            "--image-size", "--img-size", help="Height and width of images of imagenet and folder; default: 224.", min=1
        ),
    ] = DEFAULT.image_size,
    crop_fraction: Annotated[
        float | None,
        data_option(
            "--crop-fraction",
            "--crop-pct",
            help="Share of a photograph's shorter side that is measured; default: 0.875, or 1 for images of this size.",
        ),
    ] = DEFAULT.crop_fraction,
    held_out: Annotated[
        int | None,
        data_option(
            help="Number of training images held out for choosing thresholds; default: 5000, at most a fifth.", min=1
        ),
    ] = DEFAULT.held_out,
    train_images: Annotated[
        int | None,
        data_option(help="Number of training images to train on; default: all that are not held out.", min=2),
    ] = DEFAULT.train_images,
    shift: Annotated[
        int | None,
        data_option(help="Largest random shift of training images, in pixels; default: as in the papers.", min=0),
    ] = DEFAULT.shift,
    flip: Annotated[
        bool | None, data_option(help="Mirror training images at random; default: as in the papers.")
    ] = DEFAULT.flip,
    test: Annotated[bool, data_option(help="Measure the test images once, at the end.")] = DEFAULT.test,
    net: Annotated[str, network_option("--net", "--model", help="eenet8 … eenet152.")] = DEFAULT.net,
    num_exits: Annotated[int, network_option(help="Number of early exits.", min=1)] = DEFAULT.num_exits,
    placement: Annotated[
        str,
        network_option(
            help="Where the early exits are: fine, pareto, linear, gold_ratio, or after blocks: 2,4,6; 0: the stem."
        ),
    ] = "fine",
    head: Annotated[
        str,
        network_option(help=f"Kind of the early exits' heads: {', '.join(HEADS)}; one for all, or a list: pool,conv1."),
    ] = "pool",
    carry: Annotated[
        str | None,
        network_option(help="features: the final exit also reads the pooled features of the last early one (T-RecX)."),
    ] = DEFAULT.carry,
    backbone: Annotated[
        str | None, network_option(help="torchvision:NAME or timm:NAME instead of --net; exits are attached to it.")
    ] = DEFAULT.backbone,
    exits: Annotated[
        str, network_option(help="Modules of the backbone after which exits are attached: layer1,layer2.")
    ] = "",
    weights: Annotated[
        Path | None,
        network_option(
            "--weights",
            "--initial-checkpoint",
            help="File with initial weights, of the backbone or of all of --net, or the name of a backbone's published "
            "ones, such as IMAGENET1K_V1; for other classes or heads they start from random ones.",
        ),
    ] = None,
    freeze_backbone: Annotated[bool, network_option(help="Train the early heads only.")] = DEFAULT.freeze_backbone,
    self_labelled: Annotated[
        bool, network_option(help="The frozen backbone's answers replace the labels.")
    ] = DEFAULT.self_labelled,
    other_data: Annotated[
        bool,
        data_option("--other-data", help="Hold out what --seed says, even if --weights learned from these images."),
    ] = DEFAULT.other_data,
    teacher: Annotated[
        Path | None,
        training_option(help="For a --loss with taught: folder of a trained network that all exits learn from."),
    ] = None,
    epochs: Annotated[int, training_option(help="Passes over the training images.", min=1)] = DEFAULT.epochs,
    batch_size: Annotated[
        int, training_option("--batch-size", "-b", help="Images per step and device.", min=2)
    ] = DEFAULT.batch_size,
    learning_rate: Annotated[
        float, training_option("--learning-rate", "--lr", help="At the peak of the schedule.")
    ] = DEFAULT.learning_rate,
    optimizer: Annotated[str, training_option("--optimizer", "--opt", help="adamw, adam, sgd.")] = DEFAULT.optimizer,
    schedule: Annotated[
        str, training_option("--schedule", "--sched", help="one-cycle, cosine, step, constant.")
    ] = DEFAULT.schedule,
    weight_decay: Annotated[float, training_option(help="Of the optimiser.")] = DEFAULT.weight_decay,
    loss: Annotated[
        str,
        training_option(help="Weighted sum: v0 … v4, pteenet_v0, _v2, _v5, _v6, correctness, distillation, taught."),
    ] = DEFAULT.loss,
    two_stage: Annotated[
        int, training_option(help="Number of first epochs that minimise v0 instead of --loss.", min=0)
    ] = DEFAULT.two_stage,
    balance_gradients: Annotated[
        bool, training_option(help="The trunk learns from the mean of the exits' gradients, not from their sum.")
    ] = DEFAULT.balance_gradients,
    cost_weight: Annotated[
        float, training_option(help="λ, the price of cost in the losses v1 … v4.")
    ] = DEFAULT.cost_weight,
    seed: Annotated[int, training_option(help="Of weights, order and held-out images.")] = DEFAULT.seed,
    max_accuracy_drop: Annotated[
        float, thresholds_option(help="Lowest cost with at most this drop in accuracy.")
    ] = DEFAULT.max_accuracy_drop,
    max_cost: Annotated[
        float | None, thresholds_option(help="Instead: highest accuracy with at most this mean cost, 0 … 1.")
    ] = DEFAULT.max_cost,
    precision: Annotated[str, machine_option(help="32-true, 16-mixed, bf16-mixed.")] = DEFAULT.precision,
    amp: Annotated[
        bool, machine_option("--amp", help="Mixed precision: 16-mixed on CUDA, bf16-mixed elsewhere.")
    ] = False,
    device: Annotated[str, machine_option(help="auto, cpu, cuda.")] = DEFAULT.device,
    devices: Annotated[int, machine_option(help="Number of devices on each node; -1: all.", min=-1)] = DEFAULT.devices,
    nodes: Annotated[int, machine_option(help="Number of machines.", min=1)] = DEFAULT.nodes,
    strategy: Annotated[
        str, machine_option(help="How devices share the work: ddp, fsdp …, as in Lightning.")
    ] = DEFAULT.strategy,
    workers: Annotated[
        int, machine_option("--workers", "-j", help="Processes that decode images.", min=0)
    ] = DEFAULT.workers,
    output: Annotated[Path, run_option(help="Folder for the network, its thresholds and the report.")] = Path(
        DEFAULT.output
    ),
    resume: Annotated[
        bool,
        run_option(help="Continue from last.ckpt in the output folder; a run that finished no epoch starts again."),
    ] = DEFAULT.resume,
    tensorboard: Annotated[bool, run_option(help="Write logs for TensorBoard too.")] = DEFAULT.tensorboard,
    json_path: Json = "",
) -> None:
    """Train an early-exit network, choose its thresholds on held-out training images, save it."""
    check_writable(json_path)
    options = TrainOptions(
        net=net, dataset=dataset, data_root=data_root, output=output, download=download, image_size=image_size,
        crop_fraction=crop_fraction,
        num_exits=num_exits, placement=_blocks(placement), head=_kinds(head), carry=carry, backbone=backbone,
        exits=[name.strip() for name in exits.split(",") if name.strip()], weights=weights,
        freeze_backbone=freeze_backbone, self_labelled=self_labelled, other_data=other_data, teacher=teacher,
        train_images=train_images, epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, optimizer=optimizer, schedule=schedule, weight_decay=weight_decay, loss=loss,
        two_stage=two_stage, balance_gradients=balance_gradients, cost_weight=cost_weight, shift=shift, flip=flip,
        held_out=held_out, max_accuracy_drop=max_accuracy_drop, max_cost=max_cost, seed=seed,
        precision=_mixed_precision(device) if amp else precision, device=device, devices=devices, nodes=nodes,
        strategy=strategy, workers=workers, tensorboard=tensorboard, resume=resume, test=test,
    )  # fmt: skip
    from lightning.pytorch.utilities import rank_zero_only

    from ..train.folder import LAST_FILE
    from ..train.run import train

    try:
        report = train(options)
    except KeyboardInterrupt as stop:
        more = "--resume goes on from there" if (output / LAST_FILE).is_file() else "--resume starts it again"
        raise KeyboardInterrupt(str(stop) or more) from stop
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    if json_path != "-":
        _show(report)
        echo(f"\nsaved: {output}")
        next_step(f"eefast evaluate {output}, then eefast bench {output}: is early exit worth it on this machine?")
    write_json(json_path, asdict(report))


def _blocks(placement: str) -> str | Sequence[int]:
    """The numbers in "2,4,6"; another text as it is."""
    if re.fullmatch(r"\d{1,9}(,\d{1,9})*", placement, re.ASCII):
        return [int(block) for block in placement.split(",")]
    return placement


def _kinds(head: str) -> str | Sequence[str]:
    """The names in "pool,conv1"; one name as it is."""
    kinds = [kind.strip() for kind in head.split(",")]
    return kinds[0] if len(kinds) == 1 else kinds


def _mixed_precision(device: str) -> str:
    import torch

    on_cuda = device in ("cuda", "gpu") or (device == "auto" and torch.cuda.is_available())
    return "16-mixed" if on_cuda else "bf16-mixed"


def _show(report: TrainReport) -> None:
    echo(f"weights of epoch {report.best_epoch}, held-out loss {report.best_held_out_loss:.4f}")
    for where, results, agreement in (
        ("held-out", report.held_out, report.held_out_agreement),
        ("test", report.test or {}, report.test_agreement or {}),
    ):
        for name, c in results.items():
            echo(
                f"{where:9} {name:16} accuracy {c.accuracy:.2%}  as the final exit {agreement[name]:.2%}  "
                f"mean cost {c.cost:.3f}"
            )
