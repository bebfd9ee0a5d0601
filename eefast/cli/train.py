"""`eefast train`: a data set's name → a folder with a trained network and its thresholds."""

from __future__ import annotations

import re
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from .options import Json
from .output import check_writable, echo, write_json


def _options_from_file(context: typer.Context, config: Path | None) -> Path | None:
    """Let the options in a YAML file take the place of defaults; what stands on the command line still wins."""
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
            raise ValueError(f"config={str(config)!r}: {key!r} is no option of train; near are {', '.join(close)}")
        if name in values:
            raise ValueError(f"config={str(config)!r}: {key!r} is given twice, under two names")
        values[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    context.default_map = values
    return config


def command(
    config: Annotated[
        Path | None,
        Option(
            help="YAML file with options by their names here, such as `epochs: 12`; the command line wins.",
            callback=_options_from_file,
            is_eager=True,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    net: Annotated[str, Option("--net", "--model", help="eenet8 … eenet152.")] = "eenet20",
    dataset: Annotated[
        str, Option(help="mnist, fashion-mnist, svhn, cifar10, tiny-imagenet, imagenet, folder.")
    ] = "mnist",
    data_root: Annotated[Path, Option("--data-root", "--data-dir", help="Folder with the published files.")] = Path(
        "data"
    ),
    output: Annotated[Path, Option(help="Folder for the network, its thresholds and the report.")] = Path(
        "runs/trained"
    ),
    download: Annotated[bool, Option(help="Fetch missing files into the data folder, where torchvision can.")] = False,
    image_size: Annotated[
        int | None, Option("--image-size", "--img-size", help="Of imagenet and folder, 224 by default.", min=1)
    ] = None,
    num_exits: Annotated[int, Option(help="Number of early exits.", min=1)] = 3,
    placement: Annotated[str, Option(help="fine, pareto, linear, gold_ratio, or blocks: 2,4,6.")] = "fine",
    head: Annotated[str, Option(help="pool, bnpool, plain, conv1, conv2, conv3.")] = "pool",
    backbone: Annotated[
        str | None, Option(help="torchvision:NAME or timm:NAME instead of --net; exits are attached to it.")
    ] = None,
    exits: Annotated[str, Option(help="The backbone's modules behind which exits stand: layer1,layer2.")] = "",
    weights: Annotated[
        Path | None,
        Option(
            "--weights",
            "--initial-checkpoint",
            help="Weights to start from: of the backbone, or of all of --net; heads of another kind start anew.",
        ),
    ] = None,
    freeze_backbone: Annotated[bool, Option(help="Train the early heads only.")] = False,
    self_labelled: Annotated[bool, Option(help="The frozen backbone's own answers stand for the labels.")] = False,
    epochs: Annotated[int, Option(help="Passes over the training images.", min=1)] = 12,
    batch_size: Annotated[int, Option("--batch-size", "-b", help="Images per step and device.", min=2)] = 128,
    learning_rate: Annotated[float, Option("--learning-rate", "--lr", help="At the peak of the schedule.")] = 0.01,
    optimizer: Annotated[str, Option("--optimizer", "--opt", help="adamw, adam, sgd.")] = "adamw",
    schedule: Annotated[str, Option("--schedule", "--sched", help="one-cycle, cosine, step, constant.")] = "one-cycle",
    weight_decay: Annotated[float, Option(help="Of the optimiser.")] = 1e-4,
    loss: Annotated[
        str, Option(help="Weighted sum of losses: v0 … v4, pteenet_v0, _v2, _v5, _v6, correctness.")
    ] = "deep_supervision+correctness",
    two_stage: Annotated[int, Option(help="So many epochs minimise v0 before --loss.", min=0)] = 0,
    cost_weight: Annotated[float, Option(help="λ, the price of cost in the losses v1 … v4.")] = 1.0,
    shift: Annotated[
        int | None, Option(help="Move training images by up to so many pixels; by default as in the papers.", min=0)
    ] = None,
    flip: Annotated[bool | None, Option(help="Mirror training images; by default as in the papers.")] = None,
    held_out: Annotated[
        int | None,
        Option(help="Training images kept aside to choose thresholds on; 5000, of small data sets a fifth.", min=1),
    ] = None,
    max_accuracy_drop: Annotated[
        float, Option(help="Thresholds: cheapest with at most this drop in accuracy.")
    ] = 0.005,
    max_cost: Annotated[float | None, Option(help="Thresholds instead: most accurate with at most this cost.")] = None,
    seed: Annotated[int, Option(help="Of weights, order and held-out images.")] = 1,
    precision: Annotated[str, Option(help="32-true, 16-mixed, bf16-mixed.")] = "32-true",
    amp: Annotated[bool, Option("--amp", help="Mixed precision: 16-mixed on CUDA, bf16-mixed elsewhere.")] = False,
    device: Annotated[str, Option(help="auto, cpu, cuda.")] = "auto",
    devices: Annotated[int, Option(help="How many of them on each node; -1 = all.", min=-1)] = 1,
    nodes: Annotated[int, Option(help="How many machines.", min=1)] = 1,
    strategy: Annotated[str, Option(help="How they share the work: ddp, fsdp … as Lightning calls it.")] = "auto",
    workers: Annotated[int, Option("--workers", "-j", help="Processes that decode images.", min=0)] = 0,
    tensorboard: Annotated[bool, Option(help="Write logs for TensorBoard too.")] = False,
    resume: Annotated[
        bool,
        Option(
            help="Go on from last.ckpt in the output folder; a run broken off in its first epoch starts again.",
        ),
    ] = False,
    test: Annotated[bool, Option(help="Measure the test images once, at the end.")] = False,
    json_path: Json = "",
) -> None:
    """Train an early-exit network, choose its thresholds on held-out training images, save it."""
    arguments = {name: value for name, value in locals().items() if name not in ("config", "amp", "json_path")}
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from ..train.run import LAST_FILE
    from ..train.run import train as run

    check_writable(json_path)
    arguments["exits"] = [name.strip() for name in exits.split(",") if name.strip()]
    if re.fullmatch(r"\d{1,9}(,\d{1,9})*", placement, re.ASCII):
        arguments["placement"] = [int(blocks) for blocks in placement.split(",")]
    if amp:
        on_cuda = device in ("cuda", "gpu") or (device == "auto" and torch.cuda.is_available())
        arguments["precision"] = "16-mixed" if on_cuda else "bf16-mixed"
    try:
        found = run(**arguments)
    except KeyboardInterrupt as stop:
        more = "--resume goes on from there" if (output / LAST_FILE).is_file() else "--resume starts it again"
        raise KeyboardInterrupt(str(stop) or more) from stop
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    if json_path != "-":
        echo(f"weights of epoch {found.best_epoch}, held-out loss {found.best_held_out_loss:.4f}")
        for where, results, agreement in (
            ("held-out", found.held_out, found.held_out_agreement),
            ("test", found.test or {}, found.test_agreement or {}),
        ):
            for name, c in results.items():
                echo(
                    f"{where:9} {name:16} accuracy {c.accuracy:.2%}  as the final exit {agreement[name]:.2%}  "
                    f"mean cost {c.cost:.3f}"
                )
        echo(f"\nsaved: {output}")
    write_json(json_path, asdict(found))
