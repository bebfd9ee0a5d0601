"""`eefast score`: a network and any number of images → parquet files of answers, on many processes, resumable."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from typer import Argument, Option
from typer.core import TyperCommand

from .options import BatchSize, CropFraction, Device, Engine, Json, Network, Stages
from .output import check_writable, echo, next_step, note, stderr, write_json

if TYPE_CHECKING:
    from ..scoring.tally import Scored, Standing

LINE_SECONDS = 30.0
"""Between two lines of progress where stderr is no terminal."""


def command(
    network: Network,
    source: Annotated[
        str,
        Argument(
            metavar="INPUT",
            help="A folder of image files, or .parquet, .tar (webdataset), .npy or idx files: one, a pattern "
            "(a/b-*.tar, a/b-{00..99}.tar), or a folder of them.",
        ),
    ],
    output: Annotated[Path, Option(help="Folder for the rows, manifest.json and summary.json.")],
    workers: Annotated[
        int | None,
        Option(help="Worker processes; by default one for 4 cores, or for each GPU.", min=1, show_default=False),
    ] = None,
    threads_per_worker: Annotated[
        int | None, Option(help="By default the workers share all cores.", min=1, show_default=False)
    ] = None,
    engine: Engine = "auto",
    stages: Stages = "auto",
    device: Device = "auto",
    batch_size: BatchSize = 256,
    shard_size: Annotated[int, Option(help="Rows of each file, the unit of resuming.", min=1)] = 4096,
    on_error: Annotated[
        str, Option(help="At an image that cannot be read: fail (stop) or record (a row with the error).")
    ] = "fail",
    logits: Annotated[bool, Option("--logits", help="Write the logits of the exit that was taken, too.")] = False,
    image_column: Annotated[
        str | None,
        Option(
            help="Of parquet files, default: image; of tar files the ending of the images, jpg.", show_default=False
        ),
    ] = None,
    id_column: Annotated[
        str | None, Option(help="Of parquet files; default: id, or file and row.", show_default=False)
    ] = None,
    crop_fraction: CropFraction = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Remove rows of another network, input or options from the output folder.")
    ] = False,
    shard_of: Annotated[
        str | None,
        Option(
            metavar="I/N",
            help="Answer every N-th shard, from I on (0 … N-1); default: RANK and WORLD_SIZE, where they are set.",
            show_default=False,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        Option(
            metavar="[ADDRESS]", help="Run on a cluster of Ray: at this address, by default auto.", show_default=False
        ),
    ] = None,
    json_path: Json = "",
) -> None:
    """Answer any number of images: rows in parquet files, resumed where a run ended.

    The same command again skips files that are whole. Columns: id, label, exit, confidence, cost, error.
    """
    from .. import score
    from .inputs import chosen_device

    check_writable(json_path)
    share = None if shard_of is None else _share(shard_of)
    with _shown() as progress:
        found = score(
            network,
            source,
            output,
            workers=workers,
            threads_per_worker=threads_per_worker,
            engine=engine,
            stages=stages,
            device=chosen_device(device),
            batch_size=batch_size,
            shard_size=shard_size,
            on_error=on_error,
            logits=logits,
            image_column=image_column,
            id_column=id_column,
            crop_fraction=crop_fraction,
            overwrite=overwrite,
            shard_of=share,
            ray=ray,
            progress=progress,
            note=note,
        )
    if found.failed:
        note(f"{found.failed:,} of {found.images:,} images could not be read")
    if json_path != "-":
        for line in lines(found):
            echo(line)
        echo(f"rows: {output}")
        next_step(f"pandas.read_parquet({str(output)!r}), or pyarrow.dataset.dataset of it")
    write_json(json_path, {"network": str(network), "input": source, "output": str(output), **asdict(found)})


class RayAlone(TyperCommand):
    """The command, in which `--ray` without an address means `--ray auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = []
        for word, after in zip(args, [*args[1:], "-"], strict=True):
            words += [word, "auto"] if word == "--ray" and after.startswith("-") else [word]
        return super().parse_args(ctx, words)


def _share(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal()):
        raise ValueError(f"--shard-of {text}: give two numbers, such as 0/2 and 1/2 for two processes")
    return int(i), int(n)


def lines(found: Scored) -> Iterator[str]:
    """What is printed at the end."""
    work = found.seconds - found.setup_seconds
    images = found.images - found.skipped
    shards = "1 shard" if found.shards == 1 else f"{found.shards:,} shards"
    yield f"{found.images:,} images in {shards}, of which {images:,} were answered now"
    if images and work > 0:
        yield f"{images / work:,.0f} images/s in {work:.1f} s, after {found.setup_seconds:.1f} s to start workers"
    if found.mean_cost is not None:
        yield f"mean cost {found.mean_cost:.3f}, images per exit {' '.join(map(str, found.exits))}"


@contextmanager
def _shown() -> Iterator[Callable[[Standing], None]]:
    """A bar on stderr, or lines where it is no terminal."""
    if not stderr.is_terminal:
        yield lines_now_and_then()
        return
    columns = (TextColumn("{task.description}"), BarColumn())
    with Bars(*columns, console=stderr) as bar:
        task = bar.add_task("starting workers", total=None)

        def progress(standing: Standing) -> None:
            bar.update(task, description=described(standing), completed=standing.images, total=standing.total)

        yield progress


def lines_now_and_then() -> Callable[[Standing], None]:
    last = time.monotonic()

    def progress(standing: Standing) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(described(standing), file=sys.stderr, flush=True)

    return progress


def described(standing: Standing) -> str:
    """Images, images/s, mean cost, time left, errors."""
    parts = [f"{standing.images:,} of {standing.total:,} images", f"{standing.images_per_s:,.0f}/s"]
    if standing.mean_cost is not None:
        parts.append(f"mean cost {standing.mean_cost:.3f}")
    if standing.left is not None:
        minutes, seconds = divmod(round(standing.left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    if standing.failed:
        parts.append(f"{standing.failed:,} could not be read")
    return ", ".join(parts)
