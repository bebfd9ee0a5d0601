"""One measurement as one line of JSON, beside the machine, the versions and the commit that it was measured with."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from energy import meter

from eefast.measure.environment import inspect_environment

RESULTS = Path(__file__).parent / "results"

SEED = 1
"""Of trained networks whose name does not tell another one."""

Record = dict[str, Any]
"""A row of any kind as it was read, or the environment beside it."""


@dataclass(frozen=True)
class OpRow:
    """One op at one shape, run in one way.

    provider: "eefast" or what a user would write instead.
    timing: "launch" (one call after the other, caches flushed between them on a GPU, the host's part included),
        "graph" (replayed in a CUDA graph on the same inputs: no host, and inputs that fit the L2 cache stay there).
    exit_rate: share of the samples that exit.
    microseconds: 20 %, 50 % and 80 % quantile of a call; None where nothing was timed, and `note` says why.
    typical: the median on a GPU; the 20 % quantile on a CPU, where other processes only ever add time. All that follows
        is computed from it.
    bytes, flops: that the work itself needs, the same for all providers.
    copy_share: bytes per second ÷ those of a plain copy of a large tensor (read + written) in the same run.
    bound_share: the longer of bytes ÷ copy bandwidth and flops ÷ rate of a large matrix product, ÷ time of this row.
    speedup: time of the eager chain in the same timing ÷ time of this row.
    checked: the output agreed with a float64 computation before it was timed.
    """

    op: str
    provider: str
    timing: str
    samples: int
    channels: int
    height: int
    width: int
    classes: int
    dtype: str
    layout: str
    criterion: str
    exit_rate: float
    bytes: int
    flops: int
    checked: bool
    note: str = ""
    microseconds: tuple[float, float, float] | None = None
    typical: float | None = None
    gigabytes_per_s: float | None = None
    copy_share: float | None = None
    bound_share: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class CeilingRow:
    """What the device does at best, measured in the same run: "copy" in GB/s (read + written), "matmul" in TFLOP/s."""

    ceiling: str
    dtype: str
    value: float


@dataclass(frozen=True)
class TrainedPoint:
    """Thresholds chosen on held-out images, and what they do there and on the test images.

    cost: mean cost of the exits taken; path_cost: with all heads on the way; exits: test images per exit.
    """

    thresholds: tuple[float, ...]
    held_out_accuracy: float
    held_out_cost: float
    accuracy: float
    cost: float
    path_cost: float
    exits: tuple[int, ...]


@dataclass(frozen=True)
class TrainingRow:
    """A network trained beside its plain twin, under one criterion.

    training, model: names of the data set and of the network; options: of `eefast train`, besides the twin's loss.
    first: options of an earlier run of the plain network alone, from whose weights both started; empty: none.
    seconds: of training: of that first run if there was one, the network's, its twin's.
    allowed_drop, allowed_cost: what the accuracy may lack to the twin's, and the mean cost, at most.
    twin_accuracy, exit_accuracy: on all test images; the twin's, and each exit's of the network if all exit there.
    at_accuracy: the thresholds of lowest cost whose held-out accuracy is the twin's less the allowed drop; at_cost: the
        most accurate ones within the allowed cost; None where held-out images allow none, and `note` says so.
    at_goals: (mean cost, the most accurate thresholds within it) of each goal, see `training_goals.GOALS`.
    curve: (accuracy, mean cost) on the test images, of thresholds chosen on held-out images, by ascending cost.
    macs: multiply-accumulates of an image that exits last; 0: not counted.
    """

    training: str
    model: str
    criterion: str
    exit_costs: tuple[float, ...]
    options: dict[str, Any]
    first: dict[str, Any]
    seconds: tuple[float, ...]
    test_images: int
    allowed_drop: float
    allowed_cost: float
    twin_held_out_accuracy: float
    twin_accuracy: float
    exit_accuracy: tuple[float, ...]
    at_accuracy: TrainedPoint | None
    at_cost: TrainedPoint | None
    note: str
    curve: tuple[tuple[float, float], ...]
    macs: int = 0
    at_goals: tuple[tuple[float, TrainedPoint], ...] = ()


@dataclass(frozen=True)
class PlainRow:
    """A plain network, to be compared with larger ones that have exits.

    plain, trained_on: names of the network and of the data set.
    macs: multiply-accumulates per image.
    options, seconds: as in `TrainingRow`; accuracies: on held-out and on all test images.
    """

    plain: str
    trained_on: str
    macs: int
    options: dict[str, Any]
    seconds: tuple[float, ...]
    held_out_accuracy: float
    accuracy: float


@dataclass(frozen=True)
class RecipeRow:
    """How a network was trained, and what it answers on held-out training images; test images are not looked at.

    recipe: name of its folder; model, trained_on: names of the network and of the data set.
    options: of `eefast train` that differ from the defaults; seconds: of training, without runs it went on from.
    exit_accuracy: of each exit if all images exit there. accuracy: at the mean `costs`, by the largest probability, of
        halves of the images that did not choose the thresholds.
    """

    recipe: str
    model: str
    trained_on: str
    options: dict[str, Any]
    seconds: float
    images: int
    exit_costs: tuple[float, ...]
    exit_accuracy: tuple[float, ...]
    costs: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class NetworkRow:
    """One network at one batch size, run in one way.

    mix: share of the images that the thresholds were chosen to let exit at each exit.
    images_per_s: 20 %, 50 % and 80 % quantile over rounds; None where nothing was timed, and `note` says why.
    mean_cost: of the exits taken, in MACs, 1 = the plain network.
    time_cost: the same in time, of the stages up to each exit ÷ of the plain network, as `time_way` runs them, see
        `eefast.measure.time_costs`; of float ways.
    realised_ratio: median over paired rounds of mean cost × time of the best static provider ÷ time of this row; int8
        against int8, all else against the dtype of the device's float ways. It is (mean_cost ÷ time_cost) × what the
        loop and its kernels make of the time that they could save.
    best_static: that provider's name.
    across_ratio, across_static: the same against the best static provider of the other precision, int8 or float.
    other_answers: images whose largest logit is another class's than the float32 network's, which exits where the same
        thresholds let it.
    exits: images that exited at each exit; flips: of those that took another exit than the float32 network says, all
        closer to a threshold than `flip_margin`, in int8 but for 1 % of the images.
    setting: "no exits", "cost 0.25", "own thresholds"; empty where a network has only one.
    setup_seconds: until the first answer: export, compilation, first call; details: versions, settings.
    host_waits: calls in one batch that wait for the device, see `launch_gaps.host_waits`.
    launch_gaps: share of the median batch's time in which the GPU does nothing; how long it works tells a trace, which
        is taken last, since it slows the host down.
    peak_memory: bytes while the way is made and answers all batches once, see `peak_memory.peak_memory`. On a CPU it is
        the whole process that the ways of one family share, on a GPU what a way shares with one before is not in it.
    joules_per_image: of the whole device, see `energy.Meter`; the environment's `energy` says what counts it, or
        why nothing does.
    None: not measured, as also in rows from before there were these figures.
    """

    network: str
    provider: str
    batch_size: int
    dtype: str
    mix: tuple[float, ...]
    checked: bool
    note: str = ""
    images_per_s: tuple[float, float, float] | None = None
    mean_cost: float | None = None
    realised_ratio: float | None = None
    best_static: str | None = None
    exits: tuple[int, ...] = ()
    flips: int = 0
    flip_margin: float = 0.0
    setting: str = ""
    setup_seconds: float | None = None
    details: str = ""
    host_waits: int | None = None
    launch_gaps: float | None = None
    peak_memory: int | None = None
    joules_per_image: float | None = None
    across_ratio: float | None = None
    across_static: str | None = None
    other_answers: int | None = None
    time_cost: float | None = None
    time_way: str = ""


@dataclass(frozen=True)
class LatencyRow:
    """One way to run a network in one scenario.

    scenario: "Offline" (all images are there, batches of `most`), "Server" (single images arrive at random; what has
        arrived is answered together, at most `most`), "SingleStream" (the next image comes when the last is answered).
    model, setting: the network and its thresholds; load: images/s offered ÷ images/s of the plain network offline.
    offered, images_per_s: images/s that arrived and that were answered.
    milliseconds: 50 %, 90 % and 99 % quantile, from an image's arrival to its answer, over `images` of them.
    batch: mean number of images answered together.
    checked: the answers were right before they were timed; note: why nothing was timed.
    """

    scenario: str
    model: str
    provider: str
    setting: str
    most: int
    checked: bool
    note: str = ""
    load: float | None = None
    offered: float | None = None
    images_per_s: float | None = None
    milliseconds: tuple[float, float, float] | None = None
    images: int = 0
    batch: float | None = None
    details: str = ""


@dataclass(frozen=True)
class ParityRow:
    """Answers of one way beside those of the float32 network that is asked about one image at a time.

    parity: name of the network and its images; engine: of eefast, and what of it was held fixed.
    flips: images that took another exit; flip_distances: median and largest |confidence - threshold| among them, by the
        network's confidence at the earlier of the two exits; None without flips. All must be within `flip_margin`.
    logit_differences: largest and root mean square, over the images that took the same exit; None without such.
    other_answers: images whose largest logit is another class's; accuracy: None without labels; mean_cost: of the exits
        taken; *_change: this way's less the network's.
    unsteady: images whose exit, logits and confidence were not the same bits in all batch sizes of this way, in the
        images' order and in the reverse one; the same number in the rows of all batch sizes.
    note: empty where the answers are right, else why there are none, or what is wrong with them.
    """

    parity: str
    criterion: str
    engine: str
    dtype: str
    batch_size: int
    images: int
    flip_margin: float
    note: str = ""
    flips: int | None = None
    flip_distances: tuple[float, float] | None = None
    logit_differences: tuple[float, float] | None = None
    other_answers: int | None = None
    accuracy: float | None = None
    accuracy_change: float | None = None
    mean_cost: float | None = None
    cost_change: float | None = None
    unsteady: int | None = None
    details: str = ""


@dataclass(frozen=True)
class Int8Row:
    """A trained network in float32 or in eight bits, by one choice of thresholds, on test images.

    quantized: the network and what it was trained on; way: "float32", "int8, direct", "int8, F(2, 3)" or
        "int8, F(2×2, 3×3)" wherever it can be, or "int8", as `eefast.quantize` chooses; `details` says where.
    origin: of the thresholds, "of float32" or "recalibrated": the most accurate ones on held-out images, by the way's
        outputs, whose mean cost there is at most that of the float32 network with its thresholds.
    images: of the test; calibration_images: held-out ones from which ranges were taken.
    exits: images per exit; elsewhere, other_answers: images that take another exit, or get another class, than in
        float32 with its thresholds.
    last_accuracy: of the last exit alone.
    """

    quantized: str
    way: str
    criterion: str
    origin: str
    thresholds: tuple[float, ...]
    images: int
    calibration_images: int
    accuracy: float
    mean_cost: float
    exits: tuple[int, ...]
    elsewhere: int
    other_answers: int
    last_accuracy: float
    details: str = ""


@dataclass(frozen=True)
class BoundRow:
    """Thresholds chosen under a bound again and again, judged by images that did not choose them.

    bounded: the network and what it was trained on; bound: name and value, see `eefast.thresholds.calibration`.
    assurance: with which the bound was asked for; None: on the choosing images only.
    images, new_images: that choose and that judge, drawn `draws` times from the same images.
    refused: draws without thresholds; broken: draws whose bound is not kept on the judging images.
    drops: of the accuracy below the final exit's, mean and largest; costs: mean and largest mean cost; both on the
        judging images.
    seconds: of the processor, for one choice.
    """

    bounded: str
    criterion: str
    bound: dict[str, float]
    assurance: float | None
    images: int
    new_images: int
    draws: int
    refused: int
    broken: int
    drops: tuple[float, float] | None
    costs: tuple[float, float] | None
    seconds: float


@dataclass(frozen=True)
class RuleRow:
    """An exit rule at several mean costs, judged by images that neither fitted it nor chose its thresholds.

    ruled: the network and what it was trained on; rule: name in `eefast.criteria`.
    images, new_images: that fit and choose, and that judge, divided `splits` times from the same images.
    costs: mean costs of the judging images. accuracy: at each of them, mean over splits; gains, spreads: mean and
        standard deviation over splits of the accuracy above that of the largest probability; first: accuracy of the
        first split, in which the test images judge.
    seconds: of the processor, for one fit.
    """

    ruled: str
    rule: str
    images: int
    new_images: int
    splits: int
    costs: tuple[float, ...]
    accuracy: tuple[float, ...]
    gains: tuple[float, ...]
    spreads: tuple[float, ...]
    first: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class DriftRow:
    """A stream of test images that are turned and blurred from some batch on, answered in one way.

    drifting: the network and what it was trained on; way: see `drift.ways`; target: mean cost, of "budget" and of the
        held-out images for "fixed thresholds"; price: of "bandit"; None where a way has none.
    turned, blurred: degrees and standard deviation in pixels of each batch.
    accuracy, cost, confidence: means of each batch; before, after: of the batches without any drift and with all of it,
        in this order.
    profiles: with "bandit", the profile of each batch.
    """

    drifting: str
    way: str
    criterion: str
    batch_size: int
    target: float | None
    price: float | None
    turned: tuple[float, ...]
    blurred: tuple[float, ...]
    accuracy: tuple[float, ...]
    cost: tuple[float, ...]
    confidence: tuple[float, ...]
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreRow:
    """`eefast score` beside what it is compared with, one after the other in each of `rounds` rounds.

    score: what is compared, see `score.MEASUREMENTS`; model, input: in words; images: of the input.
    ours, base: medians over the rounds, in `unit`; base_name: what the base is. startup_seconds: until the first
        worker was ready, which is not in the rates; median.
    ratio: median over the rounds of ours ÷ base of the same round; bound: what it must be at least, or at most where
        `at_most`; checked: rows were compared with the answers of `eefast.accelerate` in one process first.
    """

    score: str
    model: str
    input: str
    images: int
    unit: str
    ours: float
    base: float
    base_name: str
    ratio: float
    bound: float
    at_most: bool
    rounds: int
    checked: bool
    startup_seconds: float | None = None
    details: str = ""


@dataclass(frozen=True)
class ServingRow:
    """`eefast.serving` beside what it is compared with, one after the other in each of `rounds` rounds.

    serving: what is compared, see `serving.MEASUREMENTS`; capacity: images/s of `fast.stream`; load: images/s that
        arrive ÷ capacity, None: as fast as they are answered.
    ours, base, base_name, unit, ratio, bound, at_most: as in `ScoreRow`. checked: all images took the exits of a batch.
    """

    serving: str
    model: str
    unit: str
    ours: float
    base: float
    base_name: str
    ratio: float
    bound: float
    rounds: int
    capacity: float
    checked: bool
    at_most: bool = False
    load: float | None = None
    details: str = ""


@dataclass(frozen=True)
class RatioRow:
    """One way of eefast beside another, in turns in each of `rounds` rounds, in one thread by the time of the process.

    compared: what is, see `ratios.MEASUREMENTS`; model: in words; batch_size: images, windows.
    ours, base: medians over the rounds, in `unit`; base_name: what the base is.
    ratio: median over the rounds of ours ÷ base or, of a realised ratio, mean cost · base ÷ ours; bound: what it must
        be at least, or at most where `at_most`. checked: the answers were right.
    """

    compared: str
    model: str
    batch_size: int
    unit: str
    ours: float
    base: float
    base_name: str
    ratio: float
    bound: float
    at_most: bool
    rounds: int
    checked: bool
    details: str = ""


@dataclass(frozen=True)
class HostTimeRow:
    """Host time of a streamed batch of the resident engine on a GPU, with launches replaced by nothing.

    host_time: the network; microseconds: process time per batch, the 20 % quantile over `turns`, since other processes
        only ever add time; without the driver's own.
    calls: of CUDA for streams, events and the kernel with its memset that the host would have made per batch.
    base: the commit of eefast beside it, in turns, "" for the same one; base_microseconds, base_calls: its figures;
        ratio: its time ÷ that of this commit.
    """

    host_time: str
    batch_size: int
    microseconds: float
    calls: float
    base: str
    base_microseconds: float
    base_calls: float
    ratio: float
    turns: int


def environment(device: str) -> Record:
    """What is written beside every row; `COMMIT` names the commit where git does not know it.

    load: processes that wanted to run in the last minute, those of the measurement among them.
    """
    found = inspect_environment()
    on_gpu = device == "cuda"
    return {
        **found,
        "commit": os.environ.get("COMMIT") or found["commit"],
        "device": torch.cuda.get_device_name() if on_gpu else found["processor"],
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "triton": _triton() if on_gpu else None,
        "energy": meter(device).source,
        "load": round(os.getloadavg()[0], 1),
        "date": now(),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: Exception) -> str:
    """For a row's note."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


Measured = OpRow | CeilingRow | NetworkRow | LatencyRow | ParityRow | TrainingRow | Int8Row | RuleRow
Row = Measured | PlainRow | RecipeRow | BoundRow | DriftRow | ScoreRow | ServingRow | HostTimeRow | RatioRow


def append(rows: Iterable[Row], around: Record) -> None:
    """Add lines to `bench/results/<device>.jsonl`, and to the same file in the folder `$OUT` where that is set."""
    lines = "".join(json.dumps({**asdict(row), "environment": around}) + "\n" for row in rows)
    target = results_file(around)
    for folder in {target.parent, Path(os.environ.get("OUT") or target.parent)}:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / target.name).open("a") as file:
            file.write(lines)


def results_file(around: dict[str, Any]) -> Path:
    return RESULTS / f"{slug(around['device'])}.jsonl"


def slug(text: str) -> str:
    """For the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def named(model: str, dataset: str, seed: int) -> str:
    """Of a trained network."""
    return f"{model} on {dataset}" + f", seed {seed}" * (seed != SEED)


def seed_of(row: Record) -> int:
    """Of a row with options of `eefast train`."""
    return int(row["options"].get("seed", SEED))


def trained_name(row: Record) -> str:
    """Of the network in a `TrainingRow`."""
    return named(row["model"], row["training"], seed_of(row))


def read(paths: Iterable[Path], since: str = "") -> list[Record]:
    """All rows in `paths` dated `since` or later, oldest first; old rows of networks have the fields of today."""
    later = {f.name: f.default for f in fields(NetworkRow) if f.default is not MISSING}
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    rows = [{**later, **row} if "network" in row else row for row in rows]
    return sorted((r for r in rows if r["environment"]["date"] >= since), key=lambda r: r["environment"]["date"])


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
