"""Networks trained beside their plain twins, what they are worth on test images as rows, and training.md from these.

Finished runs are reused and interrupted ones continue, so the command can be repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cpu_ways
import data_sets
import torch
import training_page
from command import add_device_option, chosen_device, run_command
from data_sets import CIFAR10_JPEG
from gpu_ways import GpuWays
from network_runs import run as measure
from peers import KEY_PEERS
from rows import (
    RESULTS,
    SEED,
    PlainRow,
    Record,
    TrainedPoint,
    TrainingRow,
    append,
    environment,
    named,
    read,
    results_file,
    slug,
)
from subjects import Network, on_images
from summary import failures
from torch import Tensor
from training_goals import goals_of
from workloads import OWN, Workload

import eefast
from eefast.cost import macs
from eefast.criteria import CRITERIA, get
from eefast.data.loaders import batches, split
from eefast.result import ExitOutput
from eefast.thresholds.calibration import Calibration, calibrate, pareto_front
from eefast.thresholds.candidates import make_candidate
from eefast.thresholds.outputs import collect, exits_taken, outcome
from eefast.thresholds.scaling import fold_scaling
from eefast.train.folder import LAST_FILE, REPORT_FILE
from eefast.train.losses import parse

ROOT = Path(__file__).parents[1]
LOG_FILE = "train.log"
HELD_OUT = 5000
LOSS, TWIN_LOSS = "deep_supervision+correctness", "final_supervision"
# Early exits that weigh less leave the final one nearer to its twin.
GENTLE_LOSS = "final_supervision+0.3*deep_supervision+0.1*correctness"
NETWORK_OPTIONS = (
    "num_exits", "placement", "shift", "flip", "batch_size", "precision", "optimizer", "schedule", "weight_decay",
)  # fmt: skip
EARLY_OPTIONS = ("head", "balance_gradients")
"""What the twin does without: it trains no early exit."""
# All exits learn from the twin, and the final one more from labels than early ones.
TAUGHT_LOSS = "+0.1*deep_supervision+0.3*taught+0.05*correctness"
# The same for a plain network.
PLAIN_TAUGHT_LOSS = "0.6*final_supervision+0.3*final_taught"
# What thresholds may use up of the allowed drop and cost on held-out images, since test images differ a little.
CAUTION = 0.95
CURVE_POINTS = 40
COMPARED = (*CRITERIA, "carried")
BATCH_SIZES = {"cpu": (256, 16, 1), "cuda": (4096, 256)}
# On a GPU, of one network; torch.compile takes minutes for deep ones, which the row's best static way tells.
GPU_SECONDS, COMPILE_SECONDS = 30, {"eenet20": 12}


@dataclass(frozen=True)
class Goal:
    """What a data set's network is to reach on the test images: accuracy below its twin's, and mean cost, at most."""

    drop: float
    cost: float


GOALS = {"mnist": Goal(0.002, 0.12), "fashion-mnist": Goal(0.005, 0.30), CIFAR10_JPEG: Goal(0.005, 0.45)}


@dataclass(frozen=True)
class Run:
    """A call of `eefast train`: folder to fill, data set, options, folder whose weights it starts from, teacher."""

    output: Path
    dataset: str
    options: dict[str, Any]
    weights: Path | None = None
    teacher: Path | None = None


@dataclass(frozen=True)
class Training:
    """A network to train beside its plain twin, which has its layers but no early exit to learn for.

    dataset: its name in rows, see `data_sets`.
    options: of `eefast train` for both, besides the twin's loss and the kind of early heads, which it does not train;
        if the loss has the term "taught", the twin teaches the network.
    first: options of a run that trains the plain network, from whose weights both go on; empty: both start untrained.
    smaller: plain networks that are trained as the twin is and, where that one teaches, with it as teacher; to be
        compared at their cost.
    teacher: of a smaller one, the network whose twin teaches it; "": its own twin.
    seed: of weights, order of the images, and which of them are held out.
    """

    dataset: str
    net: str
    options: dict[str, Any]
    first: dict[str, Any] = field(default_factory=dict)
    smaller: tuple[str, ...] = ()
    teacher: str = ""
    seed: int = SEED

    def __str__(self) -> str:
        return named(self.name, self.dataset, self.seed)

    @property
    def name(self) -> str:
        """Of the network; a smaller one has no early exits."""
        return self.net.replace("eenet", "resnet") if self.teacher else self.net

    def begin(self, folder: Path) -> Run | None:
        """The run that both start from, where there is one."""
        output = folder / f"{self._stem}-first"
        return Run(output, self.dataset, {**self._shared, **self.first, "loss": TWIN_LOSS}) if self.first else None

    def both(self, folder: Path) -> tuple[Run, Run]:
        """Of the network, and of its twin."""
        stem, begin = self._stem, self.begin(folder)
        weights = None if begin is None else begin.output
        options = {**self._shared, "loss": LOSS, **self.options}
        plain = {name: value for name, value in options.items() if name not in EARLY_OPTIONS}
        twin = Run(folder / f"{stem}-twin", self.dataset, {**plain, "loss": TWIN_LOSS}, weights)
        teacher = replace(self, net=self.teacher or self.net, teacher="")
        learns_from = folder / f"{teacher._stem}-twin" if self.is_taught else None
        return Run(folder / stem, self.dataset, options, weights, learns_from), twin

    def alone(self) -> list[Training]:
        """Of the smaller plain networks, see `runs`."""
        options = {name: value for name, value in self.options.items() if name not in EARLY_OPTIONS}
        options |= {"num_exits": 1, "placement": [1]} | ({"loss": PLAIN_TAUGHT_LOSS} if self.is_taught else {})
        return [replace(self, net=net, options=options, smaller=(), teacher=self.net) for net in self.smaller]

    def runs(self, folder: Path) -> list[Run]:
        """Of a plain network: the twin, and what a teacher makes of it."""
        early, twin = self.both(folder)
        return [twin, early] if early.teacher else [twin]

    @property
    def is_taught(self) -> bool:
        return parse(self.options.get("loss", LOSS)).uses_teacher

    @property
    def _stem(self) -> str:
        return slug(f"{self.dataset}-{self.name}" + f"-seed{self.seed}" * (self.seed != SEED))

    @property
    def _shared(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.options.items() if name in NETWORK_OPTIONS}
        return {**data_sets.options_of(self.dataset), "net": self.net, "held_out": HELD_OUT, "seed": self.seed, **kept}


def continued(dataset: str, net: str, placement: Sequence[int], epochs: tuple[int, int], **options: Any) -> Training:
    """Epochs: of the plain network, then of both that go on from it."""
    shared = {
        "num_exits": len(placement),
        "placement": list(placement),
        "shift": 2,
        "flip": dataset != "mnist",
        **options,
    }
    first, then = epochs
    continuation = {**shared, "epochs": then, "learning_rate": 0.005, "loss": GENTLE_LOSS}
    return Training(dataset, net, continuation, {"epochs": first})


def taught(dataset: str, net: str, exits: dict[int, str], epochs: int, final: float = 0.5, **options: Any) -> Training:
    """Trained as a whole from random weights, so that the first blocks learn features that early exits can use, too.

    exits: block → kind of the head after it; 0: the stem. final: what the labels weigh more at the final exit.
    """
    shared = {
        "num_exits": len(exits),
        "placement": list(exits),
        "head": list(exits.values()),
        "shift": 4 if dataset == CIFAR10_JPEG else 2,
        "flip": dataset != "mnist",
        "batch_size": 128,
        "precision": "bf16-mixed",
        "optimizer": "sgd",
        "schedule": "one-cycle",
        "weight_decay": 5e-4,
        "learning_rate": 0.2,
        "epochs": epochs,
        "loss": f"{final}*final_supervision{TAUGHT_LOSS}",
    }
    smaller = ("eenet20", "eenet14", "resnet8") if dataset == CIFAR10_JPEG and net != "eenet20" else ()
    return Training(dataset, net, {**shared, **options}, smaller=smaller)


# As the rest of a ResNet-8, and a smaller one after the stem.
HEADS = {0: "strided3", 1: "deep2", 3: "deep2"}
# By device; what matters most comes first.
TRAININGS = {
    "cpu": (
        taught(CIFAR10_JPEG, "eenet32", {**HEADS, 7: "deep1"}, 18),
        taught("fashion-mnist", "eenet32", {**HEADS, 7: "deep1"}, 6, final=0.8),
        taught(
            "mnist",
            "eenet32",
            dict.fromkeys((0, 1, 2, 4), "strided3"),
            4,
            learning_rate=0.1,
            loss="0.9*final_supervision+0.1*deep_supervision+0.2*taught+0.05*correctness",
        ),
        taught(CIFAR10_JPEG, "eenet20", {0: "strided3", 1: "deep2", 4: "deep1"}, 18),
        Training("mnist", "eenet20", {"num_exits": 3, "epochs": 4, "shift": 2}),
    ),
    "cuda": (
        taught(CIFAR10_JPEG, "eenet110", {**HEADS, 7: "deep2", 14: "deep2", 20: "deep1"}, 30, batch_size=256),
        taught(CIFAR10_JPEG, "eenet56", {**HEADS, 6: "deep2", 12: "deep1"}, 50, batch_size=256),
        *(
            continued(dataset, net, placement, epochs, head="conv1", batch_size=256, precision="bf16-mixed")
            for net, placement, epochs in (
                ("eenet56", (2, 4, 6, 10, 12, 14), (10, 6)),
                ("eenet20", (1, 2, 3, 4, 6), (12, 8)),
                ("eenet110", (3, 6, 8, 10, 12, 14, 19, 24), (6, 4)),
            )
            for dataset in ("fashion-mnist", "mnist")
        ),
    ),
}


def train(
    trainings: Sequence[Training], folder: Path, device: str, data_root: Path, seconds: float, jobs: int = 0
) -> dict[Path, str]:
    """Train what is missing, `jobs` networks at a time; per folder what went wrong, "" where it is there.

    jobs: 0: one per CPU core, 3 on a GPU.
    What has not ended after `seconds` in all is stopped; given again, the command goes on from its last epoch.
    """
    cores = os.cpu_count() or 1
    end, jobs = time.monotonic() + seconds, jobs or (3 if device == "cuda" else cores)
    threads = max(cores // jobs, 1)
    smaller = [small for training in trainings for small in training.alone()]
    notes: dict[Path, str] = {}
    both = [run for training in trainings for run in training.both(folder)]
    for runs in (
        [training.begin(folder) for training in (*trainings, *smaller)],
        [run for run in both if run.teacher is None],
        [*(run for run in both if run.teacher), *(run for small in smaller for run in small.runs(folder))],
    ):
        runs = [run for run in runs if run is not None]
        todo = [run for run in runs if not finished(run)]
        notes |= dict.fromkeys((run.output for run in runs), "")
        with ThreadPoolExecutor(jobs) as pool:
            made = {
                run.output: pool.submit(_train_one, run, _missing(run, notes), device, data_root, threads, end)
                for run in todo
            }
            _follow(made, sum(run.options["epochs"] for run in todo))
        notes |= {output: one.result() for output, one in made.items()}
    return notes


def _missing(run: Run, notes: dict[Path, str]) -> Path | None:
    """The folder that it starts from or learns from, where something went wrong with that one."""
    return next((folder for folder in (run.weights, run.teacher) if folder and notes.get(folder)), None)


def finished(run: Run) -> bool:
    """Whether it has ended; `ValueError` where its folder holds another one."""
    if not (run.output / REPORT_FILE).is_file():
        return False
    before = _report(run.output)["arguments"]
    for name, value in run.options.items():
        if before.get(name) != value:
            found = f"{name}={before.get(name)!r}, not {value!r}"
            raise ValueError(f"{run.output} was trained with {found}; delete or move it")
    return True


def _train_one(run: Run, missing: Path | None, device: str, data_root: Path, threads: int, end: float) -> str:
    """In a separate process, so that several train at a time and one may be stopped; what went wrong, or nothing.

    missing: a folder that it needs.
    """
    if missing or time.monotonic() >= end:
        return f"not begun: {missing} is not there" if missing else "not begun within the budget of seconds"
    run.output.mkdir(parents=True, exist_ok=True)
    config, log_file = run.output / "options.yaml", run.output / LOG_FILE
    config.write_text(json.dumps(run.options))  # JSON is YAML
    command = [sys.executable, "-m", "eefast", "train", "--config", str(config)]
    command += ["--output", str(run.output), "--device", device]
    command += ["--data-root", str(data_sets.root_of(run.dataset, data_root))]
    command += ["--weights", str(run.weights)] if run.weights else []
    command += ["--teacher", str(run.teacher)] if run.teacher else []
    command += ["--resume"] if (run.output / LAST_FILE).is_file() else []
    with log_file.open("a") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=log, timeout=end - time.monotonic() if end < math.inf else None, cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return "stopped: the budget of seconds has ended"
    last = ["it wrote nothing", *log_file.read_text().strip().splitlines()][-1]
    return "" if code == 0 else f"exit code {code}: {last[:200]}"


def _follow(runs: dict[Path, Future[str]], epochs: int) -> None:
    """A bar of all epochs at a terminal, else a line per run that ends."""
    from rich.console import Console
    from rich.progress import Progress

    talk = Console(stderr=True)
    with Progress(console=talk, transient=True, disable=not talk.is_terminal) as progress:
        bar = progress.add_task("training, epochs", total=epochs)
        waiting = {run: output for output, run in runs.items()}
        while waiting:
            done, _ = wait(waiting, timeout=2)
            for run in done:
                output = waiting.pop(run)
                talk.print(f"{output.name}: {run.result() or 'trained'}", highlight=False, soft_wrap=True)
            progress.update(bar, completed=sum(map(_epochs_of, runs)))


def _epochs_of(output: Path) -> int:
    log = output / LOG_FILE
    return log.read_text().count("\nepoch ") + log.read_text().startswith("epoch ") if log.is_file() else 0


@dataclass(frozen=True)
class Seen:
    """What all exits of a network say about images, and what these are."""

    outputs: list[ExitOutput]
    labels: Tensor

    def accuracy(self, exit_index: int) -> float:
        return float((self.outputs[exit_index].logits.argmax(dim=1) == self.labels).double().mean())


def seen(net: eefast.EarlyExitNet, training: Training, data_root: Path) -> tuple[Seen, Seen]:
    """On the images held out of training, and on the test images."""
    _, held_out = split(data_sets.open_images(training.dataset, data_root, "train"), HELD_OUT, training.seed)
    parts = (held_out, data_sets.open_images(training.dataset, data_root, "test"))
    first, second = (Seen(*collect(net, batches(images, 256, 0))) for images in parts)
    return first, second


def worth(training: Training, folder: Path, data_root: Path) -> list[TrainingRow]:
    """A row per criterion; thresholds, and the numbers of a fitted rule, come from held-out images alone."""
    early, alone = training.both(folder)
    begin, goal = training.begin(folder), GOALS[training.dataset]
    net, twin = (eefast.load(run.output).eval() for run in (early, alone))
    seconds = [sum(_report(run.output)["seconds_per_epoch"]) for run in (begin, early, alone) if run]
    held_out, test = seen(net, training, data_root)
    twin_held_out, twin_test = (part.accuracy(-1) for part in seen(twin, training, data_root))
    bounds = {
        "accuracy": {"min_accuracy": twin_held_out - CAUTION * goal.drop},
        "cost": {"max_cost": CAUTION * goal.cost},
    }
    rows = []
    for criterion in COMPARED:
        candidate = make_candidate(criterion, held_out.outputs, held_out.labels)
        choose, judge = (Seen(candidate.outputs(part.outputs), part.labels) for part in (held_out, test))
        front = pareto_front(choose.outputs, choose.labels, net.cost, criterion)
        step = math.ceil(len(front) / CURVE_POINTS)
        points, notes = {}, []
        for name, bound in bounds.items():
            try:
                points[name] = _point(
                    net, calibrate(choose.outputs, choose.labels, net.cost, criterion, **bound), judge
                )
            except ValueError as error:
                notes.append(str(error))
        rows.append(
            TrainingRow(
                training=training.dataset,
                model=training.net,
                criterion=criterion,
                exit_costs=tuple(net.cost.tolist()),
                options=early.options,
                first=training.first,
                seconds=tuple(seconds),
                test_images=len(test.labels),
                allowed_drop=goal.drop,
                allowed_cost=goal.cost,
                twin_held_out_accuracy=twin_held_out,
                twin_accuracy=twin_test,
                exit_accuracy=tuple(test.accuracy(i) for i in range(len(test.outputs))),
                at_accuracy=points.get("accuracy"),
                at_cost=points.get("cost"),
                at_goals=tuple(_at_goals(training, net, choose, judge, criterion)),
                note="; ".join(notes),
                macs=_plain_macs(net),
                curve=tuple(
                    outcome(judge.outputs, judge.labels, net.cost, criterion, c.thresholds) for c in front[::step]
                ),
            )
        )
    return rows


def _at_goals(
    training: Training, net: eefast.EarlyExitNet, choose: Seen, judge: Seen, criterion: str
) -> Iterator[tuple[float, TrainedPoint]]:
    """For each goal that held-out images allow."""
    for _, cost in goals_of(training.dataset, training.net):
        with suppress(ValueError):
            found = calibrate(choose.outputs, choose.labels, net.cost, criterion, max_cost=CAUTION * cost)
            yield cost, _point(net, found, judge)


def worth_alone(training: Training, folder: Path, data_root: Path) -> list[PlainRow]:
    """A row per smaller plain network that is trained."""
    rows = []
    for small in training.alone():
        begin = small.begin(folder)
        for run in filter(finished, small.runs(folder)):
            net = eefast.load(run.output).eval()
            held_out, test = (part.accuracy(-1) for part in seen(net, training, data_root))
            seconds = [sum(_report(each.output)["seconds_per_epoch"]) for each in (begin, run) if each]
            name = small.name + ", taught" * (run.teacher is not None)
            rows.append(PlainRow(name, training.dataset, _plain_macs(net), run.options, tuple(seconds), held_out, test))
    return rows


def _plain_macs(net: eefast.EarlyExitNet) -> int:
    """Multiply-accumulates of an image that exits last."""
    return macs(net.plain(), net.input_shape)[0]


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text())
    return found


def _point(net: eefast.EarlyExitNet, chosen: Calibration, test: Seen) -> TrainedPoint:
    accuracy, cost = outcome(test.outputs, test.labels, net.cost, chosen.criterion, chosen.thresholds)
    taken = exits_taken(test.outputs, get(chosen.criterion), chosen.thresholds)
    exits = taken.bincount(minlength=net.num_exits + 1)
    return TrainedPoint(
        chosen.thresholds, chosen.accuracy, chosen.cost, accuracy, cost,
        float(net.path_cost.double()[taken].mean()), tuple(exits.tolist()),
    )  # fmt: skip


def chosen(
    training: Training, folder: Path, rows: Sequence[TrainingRow], data_root: Path
) -> eefast.EarlyExitNet | None:
    """The trained network with the rule and thresholds that its rows propose; None where they propose none."""
    row = training_page.proposed([asdict(row) for row in rows])
    if row["at_cost"] is None:
        return None
    net = eefast.load(training.both(folder)[0].output).eval()
    held_out, _ = seen(net, training, data_root)
    candidate = make_candidate(row["criterion"], held_out.outputs, held_out.labels)
    if candidate.scaling is not None:
        fold_scaling(net, candidate.scaling)
    return net.with_criterion(candidate.criterion, row["at_cost"]["thresholds"]).eval()


def speeds(training: Training, net: eefast.EarlyExitNet, data_root: Path, around: Record) -> None:
    """Append rows of the ways without exits and eefast on test images, measured as `bench/throughput.py` does it."""
    test = data_sets.open_images(training.dataset, data_root, "test")
    pixels = torch.cat([images for images, _ in batches(test, 500)])
    shape, source = net.input_shape, partial(on_images, net, pixels)
    network = Network(str(training), shape, net.num_classes, (), real=source)
    if around["cuda"] is not None:
        most, *others = BATCH_SIZES["cuda"]
        works = [Workload(network, most, compile_seconds=COMPILE_SECONDS.get(training.net, 0))]
        measure([*works, *(Workload(network, n) for n in others)], around, GPU_SECONDS, GpuWays())
    else:
        works = [Workload(network, n, OWN) for n in BATCH_SIZES["cpu"]]
        measure(works, around, float("inf"), cpu_ways.started(KEY_PEERS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_option(parser)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='what has this in its name, such as "eenet20 on mnist"'
    )
    parser.add_argument(
        "--data-root", type=Path, default=ROOT / "data", help="folder with mnist/, fashion-mnist/, cifar10-jpeg/; data"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "build" / "training",
        help="for networks and logs; default: build/training",
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop training after this time; given again, it goes on"
    )
    parser.add_argument("--jobs", type=int, default=0, help="networks trained at a time; default: one per CPU core")
    parser.add_argument(
        "--seed", type=int, default=SEED, help=f"of weights, order and held-out images; default: {SEED}"
    )
    asked = parser.parse_args()
    if asked.jobs < 0:
        parser.error(f"--jobs {asked.jobs} must be at least 0")
    device = chosen_device(parser, asked, "train on")
    known = [replace(training, seed=asked.seed) for training in TRAININGS[device]]
    trainings = [training for training in known if asked.only in str(training)]
    if not trainings:
        parser.error(f"--only {asked.only!r} is in none of {', '.join(map(str, known))}")
    for name in dict.fromkeys(training.dataset for training in trainings):
        data_sets.open_images(name, asked.data_root, "train")  # what is missing is said before hours are spent
    notes = train(trainings, asked.output, device, asked.data_root, asked.seconds, asked.jobs)
    around = environment(device)
    for training in trainings:
        if any(notes[run.output] for run in training.both(asked.output)):
            continue
        rows = worth(training, asked.output, asked.data_root)
        append([*rows, *worth_alone(training, asked.output, asked.data_root)], around)
        net = chosen(training, asked.output, rows, asked.data_root)
        if net is not None:
            early = training.both(asked.output)[0].output
            net.save(early.with_name(f"{early.name}-chosen"))  # for bench/int8_accuracy.py and the like
            if training.seed == SEED:  # speed hardly depends on it
                speeds(training, net, asked.data_root, around)
    for path in training_page.write(sorted(RESULTS.glob("*.jsonl"))):
        print(path.relative_to(ROOT))
    for output, note in notes.items():
        if note:
            print(f"{output.name}: {note}", file=sys.stderr)
    return int(any(notes.values()) or failures(read([results_file(around)], around["date"])))


if __name__ == "__main__":
    run_command(main)
