"""`eefast demo`: the shipped network and MNIST's test images → a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Option

from .options import Figure, Json
from .output import bars, check_writable, echo, next_step, stderr, write_json
from .pictures import canvas, check_picture
from .render import table

if TYPE_CHECKING:
    from ..measure.demonstration import Demonstration

LEGEND = """
cost: mean share of the plain network's multiply-adds
× faster: than the plain network (BatchNorm folded, channels-last, same batch)
realised: × faster ÷ what the cost promises (1 ÷ cost); 1 = the whole saving arrives
"""


def command(
    batch_size: Annotated[int, Option(help="Images per call.", min=1)] = 256,
    images: Annotated[int, Option(help="Number of test images, of 10,000.", min=2, max=10_000)] = 10_000,
    rounds: Annotated[int, Option(help="How often each candidate is timed.", min=2)] = 16,
    json_path: Json = "",
    figure: Figure = Path("eefast-demo.png"),
) -> None:
    """Run the shipped network on real MNIST test images in every way, and compare answers and speed."""
    from .. import ops
    from ..checkpoint.loading import load
    from ..data.mnist import mnist_test
    from ..measure import demonstration, environment

    check_writable(json_path)
    check_picture(figure)
    if ops.CPP_MISSING:
        stderr.print(f"C++ kernels {ops.CPP_MISSING}; the exit op runs in plain PyTorch", style="yellow")
    assets = resources.files("eefast") / "assets" / "eenet-mnist"
    with resources.as_file(assets) as folder:
        net = load(folder)
        others = {"max_probability": json.loads((folder / "thresholds.json").read_text())["max_probability"]}
    pixels, labels = mnist_test()
    with bars() as progress:
        found = demonstration.demonstrate(
            net, others, pixels[:images], labels[:images], batch_size=batch_size, rounds=rounds, progress=progress
        )
    draw(found, figure)
    figures = {"rows": [asdict(row) for row in found.rows], "environment": environment.inspect_environment()}
    more = {"network": found.network, "curves": found.curves, "right": found.right, "wrong": found.wrong}
    write_json(json_path, {**figures, **more})
    if json_path != "-":
        echo(f"\n{found.network} on {images:,} MNIST test images, batch {batch_size}:\n")
        for part in parts(found, images):
            echo(part)
        echo(f"\nfigure: {figure}")
        next_step("a network of your own: eefast train --help")


def parts(found: Demonstration, images: int) -> Iterator[str | Table]:
    """What is printed, part by part."""
    rows = []
    for row in found.rows:
        speed, gain = f"{row.images_per_s:,.0f}", f"{row.realised_ratio / row.mean_cost:.1f}"
        rows.append([row.name, speed, gain, f"{row.mean_cost:.3f}", f"{row.accuracy:.2%}", f"{row.realised_ratio:.2f}"])
    yield table(["", "images/s", "× faster", "cost", "accuracy", "realised"], rows)
    yield LEGEND
    for i, (right, wrong, cost) in enumerate(zip(found.right, found.wrong, found.costs, strict=True)):
        count = right + wrong
        yield f"exit {i}  cost {cost:.3f}  {count:>6,} images  {'█' * round(40 * count / images)}"


def draw(found: Demonstration, path: Path) -> None:
    """Accuracy against cost, and the images of each exit."""
    from ..measure import figures

    # The one-by-one loop answers too few images for an accuracy to be compared.
    points = {row.name: (row.mean_cost, row.accuracy) for row in found.rows if row.images == found.rows[0].images}
    with canvas(path, 11, 4.2) as drawn:
        left, right = drawn.subplots(1, 2)
        figures.accuracy_against_cost(left, found.curves, points)
        figures.exit_histogram(right, found.right, found.wrong, found.costs)
