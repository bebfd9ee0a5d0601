"""`eefast.predict` and `eefast.score`: what they need is imported when they are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model import EarlyExitNet

if TYPE_CHECKING:
    from .predictions import Prediction
    from .tally import Scored, Standing


def predict(
    net: EarlyExitNet | str | Path,
    images: Any,
    *,
    top: int = 1,
    crop_fraction: float | None = None,
    on_error: str = "fail",
    engine: str = "auto",
    device: str | None = None,
    batch_size: int = 64,
    stages: str = "auto",
) -> list[Prediction]:
    """The answers for image files, or images of Pillow, prepared as the network was trained, and for rows of arrays.

    net: a network with a `preprocessing` and a `normalization`, or the folder of one.
    images: a path, an image of Pillow, or an iterable of them; of a folder all image files in it and below, sorted; of
        a .npy file all rows: pixels as the network takes them, windows [N, C, L] or [N, L, C] for a network on rows.
    top: number of most probable classes in each answer.
    crop_fraction: share of an image's shorter side in the centre that is looked at, timm's `crop_pct`; by default as
        the network was trained, and needed where it does not say so.
    on_error: "fail" raises `ValueError`, which names the file, for an image that cannot be read; "record" gives it a
        `Prediction` with an error.
    engine, stages: see `eefast.accelerate`; device: where the network is moved to, by default where it is.
    batch_size: images per call.
    Raises `ValueError` without images and for networks that do not say how images are prepared.
    """
    from . import predictions

    return predictions.predicted(
        _network(net), images, top, crop_fraction, on_error, engine, device, batch_size, stages
    )


def score(
    net: EarlyExitNet | str | Path,
    source: str | Path,
    output: str | Path,
    *,
    workers: int | None = None,
    threads_per_worker: int | None = None,
    engine: str = "auto",
    device: str = "auto",
    batch_size: int = 256,
    shard_size: int = 4096,
    on_error: str = "fail",
    logits: bool = False,
    image_column: str | None = None,
    id_column: str | None = None,
    crop_fraction: float | None = None,
    overwrite: bool = False,
    shard_of: tuple[int, int] | None = None,
    ray: str | None = None,
    stages: str = "auto",
    progress: Callable[[Standing], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Scored:
    """Answer all images at `source` in worker processes; rows go to parquet files in the folder `output`.

    net: a network, or the folder of one. source: a folder of image files; parquet, tar (webdataset), .npy or idx files:
        one, a pattern, or a folder of them.
    output: gets part-00000.parquet and so on, with the columns id, label, exit, confidence, cost, error; manifest.json;
        summary.json. A second run with the same network, input and options answers only what is missing.
    workers: processes, by default one for four cores, or for each GPU; threads_per_worker: by default they share all
        cores.
    engine, stages: see `eefast.accelerate`; device: "auto", "cpu", "cuda"; batch_size: images per call.
    shard_size: rows of a file, and what is lost at most when a worker dies.
    on_error: "fail" ends the run at an image that cannot be read; "record" makes it a row with an error.
    logits: also a column of the logits of the exit that was taken.
    image_column: of parquet files, by default "image"; of tar files the ending of the images' names, such as "jpg".
    id_column: of parquet files, by default "id" where there is one, else the file's name and the row's number.
    crop_fraction: see `predict`. overwrite: remove the rows of another network, input or options.
    shard_of: (i, n) answers every n-th shard, from number i on, so that n processes or machines share the work; by
        default what RANK and WORLD_SIZE say, where they are set.
    ray: address of a cluster of Ray whose machines see the same files, or "auto".
    progress: called about twice a second; note: gets what was decided, in words.
    Raises `ValueError`, `OSError` and `ModuleNotFoundError` for wrong arguments before any work;
    `eefast.scoring.failures.ScoreError` for images that could not be answered, after which finished shards stay.
    """
    from .run import ScoreOptions, scored

    options = ScoreOptions(
        workers, threads_per_worker, engine, device, batch_size, shard_size, on_error, logits, image_column, id_column,
        crop_fraction, overwrite, shard_of, ray, stages,
    )  # fmt: skip
    return scored(_network(net), source, output, options, progress, note)


def _network(net: Any) -> EarlyExitNet:
    """The network itself, that of an accelerated one, or the one in a folder."""
    from ..api import Accelerated
    from ..checkpoint.loading import load

    if isinstance(net, Accelerated):
        return net.net
    return net if isinstance(net, EarlyExitNet) else load(net)
