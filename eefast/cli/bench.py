"""`eefast bench`: a network, held-out and test images → thresholds, and every way to run it, timed, with a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Option

from .budget import choose_thresholds, criterion_names, least_images, read_budget
from .held_out import HeldOutImages
from .inputs import check_saving, load_images, open_network
from .options import (
    Cache,
    DataRoot,
    Dataset,
    Device,
    Download,
    FewImages,
    Figure,
    HeldOut,
    Json,
    MaxAccuracyDrop,
    MaxCost,
    MinAccuracy,
    Network,
    OtherData,
    Seed,
    Workers,
)
from .output import bars, check_writable, echo, write_json
from .pictures import canvas, check_picture
from .render import counts, describe, table

if TYPE_CHECKING:
    from ..measure.benchmark import Bench
    from ..measure.environment import Row
    from ..thresholds.calibration import Calibration

# Images that go through all exits together.
BATCH = 64
LEGEND = (
    "× static: speed ÷ the fastest way without early exits, in the same rounds\n"
    "realised ratio: mean cost × that; 1 = all that theory promises"
)


def command(
    network: Network,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    download: Download = False,
    batch_sizes: Annotated[str, Option(help="Images per call, one after the other.")] = "1,16,256",
    images: Annotated[int | None, Option(help="Use only so many test images, chosen at random.", min=2)] = None,
    min_accuracy: MinAccuracy = None,
    max_accuracy_drop: MaxAccuracyDrop = None,
    max_cost: MaxCost = None,
    criterion: Annotated[str, Option(help="learned, max_probability, entropy, margin, or all; the best is taken.")] = (
        "all"
    ),
    own_thresholds: Annotated[
        bool, Option("--own-thresholds", help="Keep the network's criterion and thresholds; needs no held-out images.")
    ] = False,
    save: Annotated[bool, Option(help="Write criterion and thresholds into the network's folder.")] = False,
    held_out: HeldOut = None,
    seed: Seed = None,
    other_data: OtherData = False,
    few_images: FewImages = False,
    cache: Cache = None,
    dtype: Annotated[str, Option(help="Of the arithmetic in all ways: float32, float16, bfloat16.")] = "float32",
    with_compile: Annotated[
        bool, Option("--compile", help="Also torch.compile, which may take minutes for each batch size.")
    ] = False,
    seconds: Annotated[float, Option(help="Of timing for each batch size; three rounds at least.", min=0)] = 15.0,
    workers: Workers = 0,
    device: Device = "auto",
    json_path: Json = "",
    figure: Figure = Path("eefast-bench.png"),
) -> None:
    """Is early exit worth it on this machine, with which engine and thresholds? Every way checked, then timed."""
    import torch
    from torch.utils.data import Subset

    from ..data.loaders import batches
    from ..measure import benchmark, environment
    from ..thresholds import calibration, evaluation

    kind, value = read_budget(min_accuracy=min_accuracy, max_accuracy_drop=max_accuracy_drop, max_cost=max_cost)
    if own_thresholds and (save or criterion != "all" or {min_accuracy, max_accuracy_drop, max_cost} != {None}):
        raise ValueError("own_thresholds=True chooses nothing; leave out --criterion, --save and the budget, or itself")
    sizes = _sizes(batch_sizes)
    if dtype not in benchmark.DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(benchmark.DTYPES)}")
    check_saving(network, save)
    check_writable(json_path, cache)
    check_picture(figure)
    net, source = open_network(network, dataset, data_root, download, workers, device, other_data)
    names = criterion_names(criterion, net)
    if save:
        net.check_saving()
    least = None if few_images else least_images(kind, value)
    aside = None if own_thresholds else HeldOutImages(source, held_out, seed, least)
    whole = load_images(net, source, "test")
    # Data sets lie in the order of their classes, or with the easier images first.
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:images].tolist()
    tests = batches(Subset(whole, order), BATCH, workers)
    if len(order) < max(sizes):
        raise ValueError(f"batch_sizes={batch_sizes!r}: there are only {len(order)} test images; take smaller ones")
    chosen: Mapping[str, Calibration] = {}
    impossible: Mapping[str, str] = {}
    others: list[Sequence[float]] = []
    with bars() as progress:
        if aside is not None:
            try:
                outputs, kept = aside.outputs(net, cache, BATCH, progress)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}; or keep the network's thresholds: --own-thresholds") from error
            chosen, impossible = choose_thresholds(net, outputs, kept, names, kind, value, progress)
            best = _best(chosen, kind)
            net = net.with_criterion(best, chosen[best].thresholds).to(net.cost.device)
            final = evaluation.exit_quality(outputs[-1:], kept)[0].accuracy
            front = calibration.pareto_front(outputs, kept, net.cost, best)
            others = [c.thresholds for c in _by_cost([c for c in front if c.accuracy > final - 0.03], 6)]
        found = benchmark.run(
            net,
            tests.reported("test images", progress),
            batch_sizes=sizes,
            others=others,
            compared={name: c.thresholds for name, c in chosen.items()},
            dtype=benchmark.DTYPES[dtype],
            with_compile=with_compile,
            seconds=seconds,
            progress=progress,
        )
    if save:
        calibration.save_thresholds(net, network, chosen)
    change = found.early.accuracy - found.plain_accuracy
    lines = benchmark.code(str(network), net, found.verdicts, benchmark.DTYPES[dtype], save or own_thresholds)
    _draw(found, figure)
    if json_path != "-":
        echo(
            f"\n{describe(net)}, {dtype}, {found.early.images:,} test images of {source.dataset}, "
            f"{found.rows[0].images:,} of them timed\n"
        )
        echo(_criteria(found, chosen))
        for name, why in impossible.items():
            echo(f"{name}: {why}")
        whose = "the network's own" if own_thresholds else f"the best for {kind} {value:g}"
        echo(f"\n{whose}: {net.criterion.name}, thresholds {', '.join(f'{t:.4f}' for t in net.thresholds.tolist())}")
        taken = [right + wrong for right, wrong in zip(found.early.right, found.early.wrong, strict=True)]
        echo(f"images per exit: {counts(taken)}")
        for size in sizes:
            echo()
            echo(_speeds([row for row in found.rows if row.batch_size == size]))
        echo(f"\n{LEGEND}\n")
        for verdict in found.verdicts:
            echo(f"batch {verdict.batch_size}: {benchmark.words(verdict, change)}")
        if not own_thresholds and (excess := _excess(found, kind, value)):
            echo(excess)
        echo(f'engine="auto" takes {found.auto}')
        for name, why in found.left_out.items():
            echo(f"not compared: {name}, {why}")
        echo(f"\n{lines or 'keep the network without early exits'}\n")
        if save:
            echo(f"saved: {network}")
        echo(f"figure: {figure}")
    figures = {
        "network": str(network),
        "dataset": source.dataset,
        "device": str(net.cost.device),
        "dtype": dtype,
        "bound": None if own_thresholds else {kind: value},
        "chosen": {name: asdict(c) for name, c in chosen.items()},
        "impossible": impossible,
        "criterion": net.criterion.name,
        "thresholds": net.thresholds.tolist(),
        "accuracy_change": change,
        **asdict(found),
        "code": lines,
        "environment": environment.environment(),
    }
    write_json(json_path, figures)


def _criteria(found: Bench, chosen: Mapping[str, Calibration]) -> Table:
    rows = [["final exit", "", "", f"{found.plain_accuracy:.2%}", "1.0000"]]
    for name, (accuracy, cost) in found.criteria.items():
        held = [f"{chosen[name].accuracy:.2%}", f"{chosen[name].cost:.4f}"] if name in chosen else ["", ""]
        rows.append([name, *held, f"{accuracy:.2%}", f"{cost:.4f}"])
    return table(["criterion", "held-out", "mean cost", "test", "mean cost"], rows)


def _speeds(rows: Sequence[Row]) -> Table:
    """Of one batch size, measured against the fastest of them without early exits."""
    titles = [f"batch {rows[0].batch_size}", "images/s", "20 % … 80 %", "× static", "realised ratio"]
    lines = []
    for row in rows:
        low, high = row.images_per_s_quantiles
        ratio = "" if row.criterion is None else f"{row.realised_ratio:.2f}"
        lines.append([row.name, f"{row.images_per_s:,.0f}", f"{low:,.0f} … {high:,.0f}", f"{row.speedup:.2f}", ratio])
    return table(titles, lines)


def _by_cost(front: Sequence[Calibration], most: int) -> list[Calibration]:
    """Points whose costs lie as evenly as can be, both ends among them; `front` goes from cheap to dear."""
    steps = [front[0].cost + i / (most - 1) * (front[-1].cost - front[0].cost) for i in range(most)] if front else []
    nearest = [min(front, key=lambda point: abs(point.cost - step)) for step in steps]
    return list(dict.fromkeys(nearest))


def _best(chosen: Mapping[str, Calibration], kind: str) -> str:
    """The criterion that is cheapest within a budget of accuracy, or most accurate within one of cost."""
    if kind == "max_cost":
        return max(chosen, key=lambda name: (chosen[name].accuracy, -chosen[name].cost))
    return min(chosen, key=lambda name: (chosen[name].cost, -chosen[name].accuracy))


def _excess(found: Bench, kind: str, value: float) -> str:
    """What to say where the budget, kept on the held-out images, is not kept on the test images."""
    drop = found.plain_accuracy - found.early.accuracy
    measured, kept = {
        "max_accuracy_drop": (f"{drop:.4f}", drop <= value),
        "min_accuracy": (f"{found.early.accuracy:.4f}", found.early.accuracy >= value),
        "max_cost": (f"{found.early.mean_cost:.4f}", found.early.mean_cost <= value),
    }[kind]
    return "" if kept else f"the budget is not kept on the test images: {kind} {measured} instead of {value:g}"


def _sizes(text: str) -> list[int]:
    """1,16,256 → the numbers, ascending."""
    try:
        sizes = sorted({int(size) for size in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise ValueError(f"batch_sizes={text!r} must be numbers from 1 on, such as 1,16,256")
    return sizes


def _draw(found: Bench, figure: Path) -> None:
    from ..measure import figures as plot

    speedups: dict[str, dict[int, float]] = {}
    for row in found.rows:
        speedups.setdefault(row.name, {})[row.batch_size] = row.speedup
    static = [row.name for row in found.rows if row.criterion is None]
    largest = max(row.batch_size for row in found.rows)
    accuracies = {True: found.plain_accuracy, False: found.early.accuracy}
    points = {
        row.name: (row.images_per_s, accuracies[row.criterion is None])
        for row in found.rows
        if row.batch_size == largest
    }
    curve = [(point.images_per_s, point.accuracy) for point in found.curve]
    with canvas(figure, 11, 4.2) as drawn:
        left, right = drawn.subplots(1, 2)
        plot.speedup_over_batch_size(left, speedups, static)
        plot.accuracy_against_speed(right, points, static, curve, f"{found.auto}, other thresholds")
        right.set_title(f"batch {largest}", fontsize=10)
