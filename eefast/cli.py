"""The command line: `eefast demo`, `eefast train`; data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
talk = Console(stderr=True)


@app.callback()
def _root() -> None:
    """Early-exit CNNs that answer a whole batch as fast as the arithmetic they save."""


@app.command()
def demo(
    batch_size: Annotated[int, typer.Option(help="Images per call.", min=1)] = 256,
    images: Annotated[
        int, typer.Option(help="Use only so many of the 10,000 test images.", min=2, max=10_000)
    ] = 10_000,
    rounds: Annotated[int, typer.Option(help="How often every way is timed.", min=2)] = 16,
    json_path: Annotated[
        str, typer.Option("--json", help="Write the rows as JSON to this file, or - for stdout.")
    ] = "",
    figure: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("eefast-demo.png"),
) -> None:
    """Run the shipped network on real MNIST test images in every way, and compare answers and speed."""
    from . import demo as demonstration
    from . import ops, report
    from .checkpoint import load
    from .train.data import mnist_test

    if ops.CPP_MISSING:
        talk.print(f"[yellow]C++ kernels: {ops.CPP_MISSING}; the PyTorch reference of the exit op runs instead.")
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
            task = tasks[what] = tasks.get(what) or bars.add_task(what, total=total)
            bars.update(task, completed=done, total=total)

        found = demonstration.run(
            net, others, pixels[:images], labels[:images], batch_size=batch_size, rounds=rounds, progress=progress
        )
    _draw(found, figure)
    if json_path != "-":
        out = Console()
        out.print(f"\n{net.config['name']} on {images:,} MNIST test images, batch {batch_size}:\n")
        out.print(report.table(found.rows))
        out.print(
            "\nrealised ratio = mean cost × time of the plain network ÷ time; 1 = all that theory promises over it\n"
        )
        for i, (right, wrong) in enumerate(zip(found.right, found.wrong, strict=True)):
            share = (right + wrong) / images
            out.print(f"exit {i}  cost {found.costs[i]:.3f}  {right + wrong:>6,} images  {'█' * round(40 * share)}")
        out.print(f"\nfigure: {figure}")
    if json_path:
        text = report.as_json(found.rows, network=net.config, curves=found.curves, right=found.right, wrong=found.wrong)
        if json_path == "-":
            typer.echo(text, nl=False)
        else:
            Path(json_path).write_text(text)


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
    """Entry point of the `eefast` command: errors in one line, exit code 2."""
    try:
        app()
    except (ValueError, FileNotFoundError, ImportError) as error:
        talk.print(f"[red]error:[/] {error}")
        raise SystemExit(2) from error
