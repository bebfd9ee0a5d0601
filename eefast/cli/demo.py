"""`eefast demo`: the shipped network and MNIST's test images → a table and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Annotated

from typer import Option

from .options import Figure, Json
from .output import bars, check_writable, echo, stderr, write_json
from .pictures import canvas, check_picture
from .render import table


def command(
    batch_size: Annotated[int, Option(help="Images per call.", min=1)] = 256,
    images: Annotated[int, Option(help="Use only so many of the 10,000 test images.", min=2, max=10_000)] = 10_000,
    rounds: Annotated[int, Option(help="How often every way is timed.", min=2)] = 16,
    json_path: Json = "",
    figure: Figure = Path("eefast-demo.png"),
) -> None:
    """Run the shipped network on real MNIST test images in every way, and compare answers and speed."""
    from .. import ops
    from ..checkpoint.loading import load
    from ..data.mnist import mnist_test
    from ..measure import demonstration, environment
    from ..measure import figures as plot

    check_writable(json_path)
    check_picture(figure)
    if ops.CPP_MISSING:
        stderr.print(f"C++ kernels {ops.CPP_MISSING}; the exit op runs in plain PyTorch", style="yellow")
    assets = resources.files("eefast") / "assets" / "eenet-mnist"
    with resources.as_file(assets) as folder:
        net = load(folder)
        thresholds = json.loads((folder / "thresholds.json").read_text())
    others = {name: thresholds[name] for name in ("max_probability",)}
    pixels, labels = mnist_test()
    with bars() as progress:
        found = demonstration.run(
            net, others, pixels[:images], labels[:images], batch_size=batch_size, rounds=rounds, progress=progress
        )
    with canvas(figure, 11, 4.2) as drawn:
        left, right = drawn.subplots(1, 2)
        points = {row.name: (row.mean_cost, row.accuracy) for row in found.rows if row.images == found.rows[0].images}
        plot.accuracy_against_cost(left, found.curves, points)
        plot.exit_histogram(right, found.right, found.wrong, found.costs)
    figures = {"rows": [asdict(row) for row in found.rows], "environment": environment.environment()}
    more = {"network": found.network, "curves": found.curves, "right": found.right, "wrong": found.wrong}
    write_json(json_path, {**figures, **more})
    if json_path != "-":
        echo(f"\n{found.network} on {images:,} MNIST test images, batch {batch_size}:\n")
        rows = []
        for row in found.rows:
            speed, ratio = f"{row.images_per_s:,.0f}", f"{row.realised_ratio:.2f}"
            rows.append([row.name, speed, f"{row.mean_cost:.3f}", f"{row.accuracy:.2%}", ratio])
        echo(table(["", "images/s", "mean cost", "accuracy", "realised ratio"], rows))
        echo(
            "\nplain network: BatchNorm folded, channels-last, same batch"
            "\nrealised ratio: mean cost × time of the plain network ÷ time; 1 = all that theory promises over it\n"
        )
        for i, (kept, lost) in enumerate(zip(found.right, found.wrong, strict=True)):
            share = (kept + lost) / images
            echo(f"exit {i}  cost {found.costs[i]:.3f}  {kept + lost:>6,} images  {'█' * round(40 * share)}")
        echo(f"\nfigure: {figure}")
