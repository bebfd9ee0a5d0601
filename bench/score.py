"""`eefast score` beside bare streaming, decoding, fewer workers, a local run: rates, memory, resuming, as rows."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import mix_of_cost, thresholds
from progress import track
from rows import ScoreRow, ServingRow, append, environment

import eefast
from eefast import zoo
from eefast.data import datasets
from eefast.data.cropping import pixels as pixels_of
from eefast.data.decoding import decode
from eefast.data.image_files import image_paths
from eefast.measure.tables import aligned
from eefast.scoring.tally import Scored
from eefast.thresholds.outputs import collect

SHAPE, CLASSES, COST = (3, 32, 32), 10, 0.5
SAMPLE = 2000
"""Images on which thresholds are chosen."""
RAY_SAMPLE = 4096
"""Images by whose speed those on Ray are counted."""


@dataclass(frozen=True)
class Place:
    """A network in a folder, its images as a .npy file and, where there are some, as JPEG files; a folder for rows.

    model: its name; images: number of them; rounds: of every measurement; large: images where memory and resuming are
        measured; ray_model: the network on Ray; ray_seconds: that its images take one local worker.
    """

    root: Path
    model: str
    ray_model: str
    images: int
    rounds: int
    large: int
    ray_seconds: float
    jpegs: Path | None

    @property
    def array(self) -> Path:
        return self.root / "images.npy"

    def folder_of(self, model: str) -> Path:
        return self.root / model

    def pixels(self) -> torch.Tensor:
        return torch.from_numpy(np.load(self.array))

    def output(self) -> Path:
        """Empty."""
        shutil.rmtree(self.root / "out", ignore_errors=True)
        return self.root / "out"


def prepare(place: Place, models: Iterable[str]) -> None:
    """Write networks and images."""
    if place.jpegs is not None:
        paths = sorted(image_paths(place.jpegs))[: place.images]
        how = eefast.Preprocessing(SHAPE[1])
        pixels = np.stack([pixels_of(decode(path), SHAPE, how) for path in paths])
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (place.images, *SHAPE), dtype=np.uint8)
    np.save(place.array, pixels)
    info = datasets.info("cifar10")
    some = torch.from_numpy(pixels[:: max(1, len(pixels) // SAMPLE)])
    for name in models:
        torch.manual_seed(0)
        net = zoo.eenet(name, 3, input_shape=SHAPE, num_classes=CLASSES, normalization=(info.mean, info.std)).eval()
        outputs = collect(net, [(part, torch.zeros(len(part))) for part in some.split(200)])[0]
        net.thresholds.copy_(torch.tensor(thresholds(outputs, mix_of_cost(net.cost.tolist(), COST))))
        net.preprocessing = eefast.Preprocessing(SHAPE[1])
        net.save(place.folder_of(name))


def check(place: Place, source: Path, model: str | None = None, **options: Any) -> None:
    """`ValueError` unless rows are those of one process, each image by its id."""
    from pyarrow.parquet import read_table

    output = place.output()
    folder = place.folder_of(model or place.model)
    eefast.score(folder, source, output, **options)
    rows = [row for path in sorted(output.glob("part-*")) for row in read_table(path).to_pylist()]
    answer = eefast.accelerate(eefast.load(folder))(place.pixels())
    expected = zip(answer.labels.tolist(), answer.exit_index.tolist(), answer.confidence.tolist(), strict=True)
    found = [(row["label"], row["exit"], row["confidence"]) for row in rows]
    if found != list(expected):
        raise ValueError(f"{source}: rows are not the answers of one process")


def rate(found: Scored) -> float:
    """Images/s without the time until the first worker was ready."""
    return (found.images - found.skipped) / (found.seconds - found.setup_seconds)


class Compared:
    """Two or more ways, measured one after the other in each round."""

    def __init__(self, rounds: int, *ways: Callable[[], float]) -> None:
        self.values = [[way() for way in ways] for _ in range(rounds)]

    def row(self, base: Callable[[list[float]], float], **more: object) -> ScoreRow:
        """The first way beside what `base` makes of the others."""
        pairs = [(first, base(rest)) for first, *rest in self.values]
        return ScoreRow(
            ours=statistics.median(ours for ours, _ in pairs),
            base=statistics.median(other for _, other in pairs),
            ratio=statistics.median(ours / other for ours, other in pairs),
            rounds=len(pairs),
            **more,  # type: ignore[arg-type]
        )


def first(values: list[float]) -> float:
    return values[0]


def scored(place: Place, source: Path, seen: list[float], model: str | None = None, **options: Any) -> float:
    """Images/s of a whole run; notes the seconds to start in `seen`."""
    folder = place.folder_of(model or place.model)
    found = eefast.score(folder, source, place.output(), **options)
    seen.append(found.setup_seconds)
    return rate(found)


def stream(place: Place) -> Iterator[ScoreRow]:
    """One worker beside `fast.stream` over the same images in memory."""
    fast, images = eefast.accelerate(eefast.load(place.folder_of(place.model)), frozen=True), place.pixels()
    threads, seen = torch.get_num_threads(), list[float]()
    fast.warmup()

    def bare() -> float:
        begin = time.perf_counter()
        count = sum(len(result.exit_index) for result in fast.stream(images.split(256)))
        return count / (time.perf_counter() - begin)

    check(place, place.array, workers=1, threads_per_worker=threads)
    ours = lambda: scored(place, place.array, seen, workers=1, threads_per_worker=threads)  # noqa: E731
    yield Compared(place.rounds, ours, bare).row(
        first, score="stream", model=place.model, input=".npy", images=len(images), unit="images/s",
        base_name=f"fast.stream, {threads} threads", bound=0.85, at_most=False, checked=True,
        startup_seconds=statistics.median(seen), details=str(fast.plan.engine),
    )  # fmt: skip


def workers(place: Place) -> Iterator[ScoreRow]:
    """Two workers with a thread each beside one with two threads."""
    check(place, place.array, workers=2, threads_per_worker=1)
    seen = list[float]()
    two = lambda: scored(place, place.array, seen, workers=2, threads_per_worker=1)  # noqa: E731
    one = lambda: scored(place, place.array, [], workers=1, threads_per_worker=2)  # noqa: E731
    yield Compared(place.rounds, two, one).row(
        first, score="workers", model=place.model, input=".npy", images=place.images, unit="images/s",
        base_name="1 worker × 2 threads", bound=0.9, at_most=False, checked=True,
        startup_seconds=statistics.median(seen),
    )  # fmt: skip


def jpeg(place: Place) -> Iterator[ScoreRow]:
    """From JPEG files, one thread that decodes and one that answers, beside the slower of both alone."""
    if place.jpegs is None:
        return
    paths, how, seen = sorted(image_paths(place.jpegs))[: place.images], eefast.Preprocessing(SHAPE[1]), list[float]()
    folder = place.root / "jpegs"
    if not folder.exists():
        folder.mkdir()
        for i, path in enumerate(paths):
            (folder / f"{i:06}.jpg").symlink_to(path.resolve())
    options: dict[str, Any] = {"workers": 1, "threads_per_worker": 1}

    def decoded(part: Sequence[Path]) -> None:
        pixels = np.empty((len(part), *SHAPE), np.uint8)
        for i, path in enumerate(part):
            pixels[i] = pixels_of(decode(path), SHAPE, how)

    def alone() -> float:
        begin = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            for _ in pool.map(decoded, [paths[start : start + 256] for start in range(0, len(paths), 256)]):
                pass
        return len(paths) / (time.perf_counter() - begin)

    check(place, folder, **options)
    ours = lambda: scored(place, folder, seen, **options)  # noqa: E731
    answering = lambda: scored(place, place.array, [], **options)  # noqa: E731
    compared = Compared(place.rounds, ours, alone, answering)
    _, decoding, answered = (statistics.median(values) for values in zip(*compared.values, strict=True))
    yield compared.row(
        min, score="jpeg", model=place.model, input="JPEG files", images=len(paths), unit="images/s",
        base_name="the slower of decoding alone and answering alone, 1 thread", bound=0.9, at_most=False, checked=True,
        startup_seconds=statistics.median(seen),
        details=f"decoding alone {decoding:,.0f}, answering alone {answered:,.0f} images/s",
    )  # fmt: skip


def command(place: Place, source: Path, model: str, *words: object) -> list[str]:
    fixed = [sys.executable, "-m", "eefast", "score", place.folder_of(model), source, "--output", place.root / "out"]
    return [str(word) for word in (*fixed, *words)]


def repeated(place: Place, count: int) -> Path:
    """A .npy file of `count` images, the ones of the place again and again."""
    path = place.root / f"{count}.npy"
    if not path.exists():
        made = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *SHAPE))
        images = np.load(place.array)
        for start in range(0, count, len(images)):
            made[start : start + len(images)] = images[: count - start]
        made.flush()
    return path


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for task in tasks for number in task.read_text().split()]


def resident_peak(process: int) -> int:
    """Kilobytes that it has held at most until now; 0 where it has ended. What waiting for it tells is not less than
    what the process that started it held.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def memory(place: Place) -> Iterator[ScoreRow]:
    """The largest process of a run on ten times as many images."""

    def peak(count: int) -> float:
        place.output()
        words = command(place, repeated(place, count), place.model, "--workers", 1)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        largest = 0
        while process.poll() is None:
            largest = max(largest, *map(resident_peak, (process.pid, *children(process.pid))))
            time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
        return largest / 1024

    few = max(place.large // 10, 1)
    yield Compared(1, lambda: peak(place.large), lambda: peak(few)).row(
        first, score="memory", model=place.model, input=".npy", images=place.large, unit="MB",
        base_name=f"{few:,} images", bound=1.2, at_most=True, checked=False,
    )  # fmt: skip


def resumed(place: Place) -> Iterator[ScoreRow]:
    """What a second run answers after the first was killed at half."""
    source, shard = repeated(place, place.large), 512

    def share() -> float:
        output = place.output()
        words = command(place, source, place.model, "--workers", 1, "--shard-size", shard)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(output.glob("part-*.parquet"))) < place.large // shard // 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = eefast.score(place.folder_of(place.model), source, output, workers=1, shard_size=shard)
        return float(found.images - found.skipped)

    yield Compared(1, share, lambda: float(place.large)).row(
        first, score="resumed", model=place.model, input=".npy", images=place.large, unit="images",
        base_name="all images", bound=0.55, at_most=True, checked=False,
    )  # fmt: skip


def on_ray(place: Place) -> Iterator[ScoreRow]:
    """One actor beside one local worker, a thread each, on images for `ray_seconds` by the speed of a short run."""
    try:
        import ray
    except ImportError:
        print("ray is not installed, so it is not measured", file=sys.stderr)
        return
    options: dict[str, Any] = {"model": place.ray_model, "workers": 1, "threads_per_worker": 1}
    speed = scored(place, repeated(place, min(place.images, RAY_SAMPLE)), [], **options)
    count, seen = round(speed * place.ray_seconds * 1.1), list[float]()
    source = repeated(place, count)
    begin = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    cluster = time.perf_counter() - begin
    check(place, place.array, ray="auto", **options)
    ours = lambda: scored(place, source, seen, ray="auto", **options)  # noqa: E731
    local = lambda: scored(place, source, [], **options)  # noqa: E731
    found = Compared(1, ours, local)
    ray.shutdown()
    yield found.row(
        first, score="ray", model=place.ray_model, input=".npy", images=count, unit="images/s",
        base_name="1 local worker × 1 thread", bound=0.7, at_most=False, checked=True,
        startup_seconds=statistics.median(seen),
        details=f"{count / found.values[0][1]:.0f} s of local work; the cluster started in {cluster:.1f} s before",
    )  # fmt: skip


MEASUREMENTS: dict[str, Callable[[Place], Iterator[ScoreRow]]] = {
    "stream": stream, "workers": workers, "jpeg": jpeg, "memory": memory, "resumed": resumed, "ray": on_ray,
}  # fmt: skip


def reached(row: ScoreRow | ServingRow) -> bool:
    return row.ratio <= row.bound if row.at_most else row.ratio >= row.bound


def written(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(rows: Sequence[ScoreRow | ServingRow]) -> str:
    titles = ["", "score", "beside", "", "ratio", "bound", ""]
    lines = []
    for row in rows:
        bound = f"{'≤' if row.at_most else '≥'} {row.bound:.2f}"
        figures = [f"{written(row.ours)} {row.unit}", written(row.base), row.base_name, f"{row.ratio:.2f}", bound]
        name = row.score if isinstance(row, ScoreRow) else row.serving
        lines.append([name, *figures, "" if reached(row) else "MISSED"])
    return "\n".join(aligned(titles, lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60_000, help="of the .npy file and of JPEG files; default 60,000")
    parser.add_argument("--large", type=int, default=200_000, help="for memory and resuming; default 200,000")
    parser.add_argument("--rounds", type=int, default=3, help="of what is timed; default 3")
    parser.add_argument("--jpegs", type=Path, help="folder with JPEG files; without it there are none")
    parser.add_argument("--model", default="eenet32")
    parser.add_argument("--ray-model", default="eenet110", help="default eenet110")
    parser.add_argument("--ray-seconds", type=float, default=60, help="that one local worker takes; default 60")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--details", default="", help="written into every row, such as what else was running")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    around, rows = environment("cpu"), list[ScoreRow]()
    with tempfile.TemporaryDirectory() as root:
        place = Place(
            Path(root), asked.model, asked.ray_model, asked.images, asked.rounds, asked.large, asked.ray_seconds,
            asked.jpegs,
        )  # fmt: skip
        prepare(place, {place.ray_model if name == "ray" else place.model for name in asked.only})
        for name in track(asked.only, "measuring"):
            for row in MEASUREMENTS[name](place):
                rows.append(replace(row, details="; ".join(filter(None, (row.details, asked.details)))))
                append(rows[-1:], around)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
