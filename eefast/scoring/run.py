"""Network, input, output folder → files of rows: checks, manifest, what is left to do, workers, summary."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..api import check_engine
from ..model import EarlyExitNet
from ..system import files
from . import part_files
from .chunks import Shard
from .manifest import describe_network, write_manifest
from .output_lock import locked
from .part_files import Totals
from .pipeline import Job
from .predictions import ON_ERROR
from .preparation import preprocessing_of
from .processes import run_in_processes
from .sources import decodes, files_of, folder_of, open_source
from .tally import Scored, Standing, Tally


@dataclass(frozen=True)
class ScoreOptions:
    """The options of `eefast.score`, where they are explained."""

    workers: int | None = None
    threads_per_worker: int | None = None
    engine: str = "auto"
    device: str = "auto"
    batch_size: int = 256
    shard_size: int = 4096
    on_error: str = "fail"
    logits: bool = False
    image_column: str | None = None
    id_column: str | None = None
    crop_fraction: float | None = None
    overwrite: bool = False
    shard_of: tuple[int, int] | None = None
    ray: str | None = None
    stages: str = "auto"

    def __post_init__(self) -> None:
        for name in ("workers", "threads_per_worker", "batch_size", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error={self.on_error!r} is unknown; choose {' or '.join(ON_ERROR)}")
        if self.shard_of is not None and not 0 <= self.shard_of[0] < self.shard_of[1]:
            i, n = self.shard_of
            raise ValueError(f"shard_of={i}/{n}: the first number must be in 0 … {n - 1}, the second at least 1")
        if self.ray is not None and self.shard_of is not None:
            raise ValueError("ray and shard_of: Ray shares the shards among its machines; leave one of them out")


def scored(
    net: EarlyExitNet,
    source: str | Path,
    output: str | Path,
    options: ScoreOptions,
    progress: Callable[[Standing], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Scored:
    """See `eefast.score`; progress: called about twice a second; note: gets what is decided, in words."""
    begin = time.monotonic()
    import_module("pyarrow")  # whose lack should show before work starts
    output, say = Path(output), note or (lambda text: None)
    folder = folder_of(source)
    if folder is not None and output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{output} is inside {folder}, which is read; name a folder elsewhere")
    found = open_source(source, net.input_shape, options.image_column, options.id_column)
    if inside := next((path for path in files_of(found) if path.resolve().parent == output.resolve()), None):
        raise ValueError(f"{inside}, which is read, is in {output}; name another folder for the rows")
    how = preprocessing_of(net, options.crop_fraction) if decodes(found) else None
    if how is None and options.crop_fraction is not None:
        raise ValueError(f"crop_fraction={options.crop_fraction}: the input is pixels already; leave it out")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.ray is None:  # else its machines have other libraries
        check_engine(options.engine, options.stages)
    told = None if options.shard_of is not None or options.ray is not None else _share_of_environment()
    share = options.shard_of or told or (0, 1)
    workers, threads = _room(options, device, 1 if told is None else int(os.environ.get("LOCAL_WORLD_SIZE") or 1), say)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{output} cannot be made: {error.strerror}; name another folder") from error
    with locked(output, share):
        manifest = write_manifest(
            output,
            describe_network(net, how),
            found,
            _told(options),
            options.shard_size,
            options.overwrite,
        )
        mine = list(manifest.shards[share[0] :: share[1]])
        part_files.remove_partial(output, {shard.number for shard in mine})
        there = _there(output, mine, manifest.digest, options.on_error)
        todo = [shard for shard in mine if shard.number not in there]
        if there:
            say(f"skipped {len(there):,} of {len(mine):,} shards, whose rows are there")
        job = Job(
            _for_workers(net), found, output, manifest.digest, how, options.on_error, options.logits, options.engine,
            options.batch_size, threads, device, options.stages,
        )  # fmt: skip
        run = Tally(mine, there, progress)
        try:
            if options.ray is None:
                run_in_processes(job, todo, workers, run)
            elif todo:
                from .ray_cluster import run_on_ray

                run_on_ray(job, todo, workers, run)
        finally:
            part_files.remove_partial(output, {shard.number for shard in mine})
        result = run.result(begin)
        name = "summary.json" if share[1] == 1 else f"summary-{share[0]}-of-{share[1]}.json"
        files.write(output / name, json.dumps(asdict(result), indent=2) + "\n")
    return result


def _told(options: ScoreOptions) -> dict[str, Any]:
    """What of the options the rows depend on; rows written before there was `stages` are those of "auto"."""
    stages = {} if options.stages == "auto" else {"stages": options.stages}
    return {"logits": options.logits, "engine": options.engine, **stages}


def _room(options: ScoreOptions, device: str, processes: int, say: Callable[[str], None]) -> tuple[int, int]:
    """Number of workers, and threads of each; processes: that share this machine's cores."""
    if options.ray is not None:
        from .ray_cluster import check_room, connect

        cpus = connect(options.ray)
        threads = options.threads_per_worker or 1
        workers = options.workers or max(1, int(cpus - 1) // threads)
        check_room(cpus, workers, threads)
        return workers, threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes)
    workers = options.workers or (torch.cuda.device_count() if device == "cuda" else max(1, cores // 4))
    if workers > cores:
        raise ValueError(f"workers={workers}: this machine has {cores} cores; take at most as many")
    threads = options.threads_per_worker or max(1, cores // workers)
    if workers * threads > cores:
        say(f"{workers} workers × {threads} threads are more than the {cores} cores of this machine, which is slower")
    return workers, threads


def _share_of_environment() -> tuple[int, int] | None:
    """What torchrun and the like tell each of their processes."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world is None:
        return None
    with suppress(ValueError):
        if 0 <= int(rank) < int(world):
            return int(rank), int(world)
    raise ValueError(f"RANK={rank}, WORLD_SIZE={world} in the environment are no share; unset them, or give shard_of")


def _for_workers(net: EarlyExitNet) -> EarlyExitNet:
    """The network as it is pickled: on the CPU, in eval mode; `net` itself is not changed."""
    from copy import deepcopy

    return deepcopy(net).cpu().eval()


def _there(folder: Path, shards: Sequence[Shard], digest: str, on_error: str) -> dict[int, Totals]:
    """Shards whose rows are there, and whole; with "fail" those with errors are not: they say again what is wrong."""
    found = {shard.number: part_files.read_totals(folder, shard.number, digest) for shard in shards}
    return {
        number: totals
        for number, totals in found.items()
        if totals is not None and not (totals.failed and on_error == "fail")
    }
