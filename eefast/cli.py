"""The command line: `eefast demo`, `train`, `calibrate-device`; data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typer import Option

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
talk = Console(stderr=True)


@app.callback()
def _root() -> None:
    """Early-exit CNNs that answer a whole batch as fast as the arithmetic they save."""


@app.command()
def demo(
    batch_size: Annotated[int, Option(help="Images per call.", min=1)] = 256,
    images: Annotated[int, Option(help="Use only so many of the 10,000 test images.", min=2, max=10_000)] = 10_000,
    rounds: Annotated[int, Option(help="How often every way is timed.", min=2)] = 16,
    json_path: Annotated[str, Option("--json", help="Write the rows as JSON to this file, or - for stdout.")] = "",
    figure: Annotated[Path, Option(help="Where the picture goes.")] = Path("eefast-demo.png"),
) -> None:
    """Run the shipped network on real MNIST test images in every way, and compare answers and speed."""
    from . import demo as demonstration
    from . import ops, report
    from .checkpoint import load
    from .train.data import mnist_test

    _check_folders(figure, json_path)
    if ops.CPP_MISSING:
        talk.print(f"C++ kernels {ops.CPP_MISSING}; the exit op runs in plain PyTorch", style="yellow")
    assets = resources.files("eefast") / "assets" / "eenet-mnist"
    with resources.as_file(assets) as folder:
        net = load(folder)
        thresholds = json.loads((folder / "thresholds.json").read_text())
    others = {name: thresholds[name] for name in ("max_probability",)}
    pixels, labels = mnist_test()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        found = demonstration.run(
            net, others, pixels[:images], labels[:images], batch_size=batch_size, rounds=rounds, progress=progress
        )
    _draw(found, figure)
    more = {"network": found.network, "curves": found.curves, "right": found.right, "wrong": found.wrong}
    _write_json(json_path, report.as_json(found.rows, **more))
    if json_path != "-":
        out = Console()
        out.print(f"\n{found.network} on {images:,} MNIST test images, batch {batch_size}:\n")
        out.print(report.table(found.rows))
        out.print(
            "\nplain network: BatchNorm folded, channels-last, same batch"
            "\nrealised ratio: mean cost × time of the plain network ÷ time; 1 = all that theory promises over it\n"
        )
        for i, (right, wrong) in enumerate(zip(found.right, found.wrong, strict=True)):
            share = (right + wrong) / images
            out.print(f"exit {i}  cost {found.costs[i]:.3f}  {right + wrong:>6,} images  {'█' * round(40 * share)}")
        out.print(f"\nfigure: {figure}", soft_wrap=True)


@app.command()
def train(
    net: Annotated[str, Option(help="eenet8 … eenet152.")] = "eenet20",
    dataset: Annotated[str, Option(help="mnist, fashion-mnist, svhn, cifar10, tiny-imagenet, imagenet.")] = "mnist",
    data_root: Annotated[Path, Option(help="Folder with the data set's published files.")] = Path("data"),
    output: Annotated[Path, Option(help="Folder for the network, its thresholds and the report.")] = Path(
        "runs/trained"
    ),
    download: Annotated[bool, Option(help="Fetch missing files into the data folder, where torchvision can.")] = False,
    num_exits: Annotated[int, Option(help="Number of early exits.", min=1)] = 3,
    placement: Annotated[str, Option(help="fine, pareto, linear, gold_ratio, or blocks: 2,4,6.")] = "fine",
    head: Annotated[str, Option(help="pool, bnpool, plain, conv1, conv2, conv3.")] = "pool",
    epochs: Annotated[int, Option(help="Passes over the training images.", min=1)] = 12,
    batch_size: Annotated[int, Option(help="Images per step.", min=2)] = 128,
    learning_rate: Annotated[float, Option(help="At the peak of the one-cycle schedule.")] = 0.01,
    optimizer: Annotated[str, Option(help="adamw or sgd.")] = "adamw",
    weight_decay: Annotated[float, Option(help="Of the optimiser.")] = 1e-4,
    loss: Annotated[str, Option(help="Weighted sum of losses: v0, v2, correctness.")] = "deep_supervision+correctness",
    cost_weight: Annotated[float, Option(help="λ, the price of cost in the loss v2.")] = 1.0,
    shift: Annotated[int, Option(help="Move training images at random by up to so many pixels.", min=0)] = 0,
    held_out: Annotated[int, Option(help="Training images kept aside to choose thresholds on.", min=1)] = 5000,
    max_accuracy_drop: Annotated[
        float, Option(help="Thresholds: cheapest with at most this drop in accuracy.")
    ] = 0.005,
    max_cost: Annotated[float | None, Option(help="Thresholds instead: most accurate with at most this cost.")] = None,
    seed: Annotated[int, Option(help="Of weights, order and held-out images.")] = 1,
    device: Annotated[str, Option(help="auto, cpu, cuda.")] = "auto",
    workers: Annotated[int, Option(help="Processes that decode images.", min=0)] = 0,
    test: Annotated[bool, Option(help="Measure the test images once, at the end.")] = False,
    json_path: Annotated[str, Option("--json", help="Write the report as JSON to this file, or - for stdout.")] = "",
) -> None:
    """Train an EENet, choose its thresholds on held-out training images, save it for `eefast.load`."""
    arguments = {name: value for name, value in locals().items() if name != "json_path"}
    from .train.run import train as run

    _check_folders(json_path)
    if placement.replace(",", "").isdigit():
        arguments["placement"] = [int(blocks) for blocks in placement.split(",")]
    found = run(**arguments)
    if json_path != "-":
        out = Console()
        for where, results in (("held-out", found.held_out), ("test", found.test or {})):
            for name, c in results.items():
                out.print(f"{where:9} {name:16} accuracy {c.accuracy:.2%}  mean cost {c.cost:.3f}", highlight=False)
        out.print(f"\nsaved: {output}", highlight=False)
    _write_json(json_path, json.dumps(asdict(found), indent=2) + "\n")


@app.command()
def calibrate_device(
    device: Annotated[str, Option(help="A CUDA device, such as cuda or cuda:1.")] = "cuda",
    json_path: Annotated[str, Option("--json", help="Write the table as JSON to this file, or - for stdout.")] = "",
) -> None:
    """Measure what a GPU takes for launches and waits, and keep it for the plans of all later runs; takes a second."""
    import torch

    from . import device_table

    _check_folders(json_path)
    if not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch finds no CUDA device here; on the CPU nothing needs calibration")
    table = device_table.calibrate(torch.device(device))
    if json_path != "-":
        out = Console()
        out.print(f"launch of a CUDA graph, on the host    {1e6 * table.launch:6.1f} µs", highlight=False)
        out.print(f"wait for a count, the device idle      {1e6 * table.wait:6.1f} µs", highlight=False)
        out.print(f"\nkept in {device_table.path(torch.device(device))}", highlight=False, soft_wrap=True)
    _write_json(json_path, json.dumps(asdict(table), indent=2) + "\n")


def _check_folders(*files: str | Path) -> None:
    for file in map(Path, files):
        if not file.parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no folder {file.parent}; make it first")


def _write_json(path: str, text: str) -> None:
    if path == "-":
        typer.echo(text, nl=False)
    elif path:
        Path(path).write_text(text)


def _draw(found, figure: Path) -> None:  # type: ignore[no-untyped-def]
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from . import plot

    fig, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    points = {row.name: (row.mean_cost, row.accuracy) for row in found.rows if row.images == found.rows[0].images}
    plot.accuracy_against_cost(left, found.curves, points)
    plot.exit_histogram(right, found.right, found.wrong, found.costs)
    fig.savefig(figure, dpi=120)
    pyplot.close(fig)


def main() -> None:
    """Entry point of the `eefast` command: exit code 2 for wrong usage or files, 1 for answers that disagree."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        talk.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from error
