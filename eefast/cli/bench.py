"""`eefast bench`: a network, held-out and test images → thresholds, and every way to run it, timed, with a verdict."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from . import bench_report, choices
from .budget import criterion_names, least_images, read_budget
from .held_out import HeldOutImages
from .inputs import check_saving, load_images, open_network
from .options import (
    CRITERION_NAMES,
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
    Stages,
    Workers,
)
from .output import bars, check_writable, echo, next_step, write_json
from .pictures import check_picture
from .render import describe

if TYPE_CHECKING:
    from ..measure.assessment import Assessment

# Images that go through all exits together.
BATCH = 64


def command(
    network: Network,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    download: Download = False,
    batch_sizes: Annotated[str, Option(help="Images per call; sizes separated by commas.")] = "1,16,256",
    images: Annotated[int | None, Option(help="Number of test images to sample.", min=2)] = None,
    min_accuracy: MinAccuracy = None,
    max_accuracy_drop: MaxAccuracyDrop = None,
    max_cost: MaxCost = None,
    criterion: Annotated[str, Option(help=f"{CRITERION_NAMES}, or all; the best is taken.")] = "all",
    own_thresholds: Annotated[
        bool, Option("--own-thresholds", help="Keep the network's criterion and thresholds; needs no held-out images.")
    ] = False,
    save: Annotated[bool, Option(help="Write criterion and thresholds into the network's folder.")] = False,
    held_out: HeldOut = None,
    seed: Seed = None,
    other_data: OtherData = False,
    few_images: FewImages = False,
    cache: Cache = None,
    dtype: Annotated[
        str, Option(help="Arithmetic of everything that is timed: float32, float16, bfloat16.")
    ] = "float32",
    stages: Stages = "auto",
    with_compile: Annotated[
        bool, Option("--compile", help="Also torch.compile, which may take minutes for each batch size.")
    ] = False,
    int8: Annotated[
        bool,
        Option("--int8", help="Also the network in INT8, on the CPU, made from the held-out images, and others' INT8."),
    ] = False,
    seconds: Annotated[
        float, Option(help="Seconds of timing for each batch size; three rounds at least.", min=0)
    ] = 15.0,
    workers: Workers = 0,
    device: Device = "auto",
    json_path: Json = "",
    figure: Figure = Path("eefast-bench.png"),
) -> None:
    """Is early exit worth it on this machine, with which engine and thresholds? All answers checked, then timed."""
    from ..measure import assessment, verdicts
    from ..planning import check_engine
    from ..runtimes import RUNTIMES
    from ..thresholds import calibration

    kind, value = read_budget(min_accuracy=min_accuracy, max_accuracy_drop=max_accuracy_drop, max_cost=max_cost)
    if own_thresholds and (save or criterion != "all" or {min_accuracy, max_accuracy_drop, max_cost} != {None}):
        raise ValueError("own_thresholds=True chooses nothing; leave out --criterion, --save and the budget, or itself")
    sizes = _sizes(batch_sizes)
    if dtype not in assessment.DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(assessment.DTYPES)}")
    check_engine("auto", stages)
    if stages in RUNTIMES and dtype != "float32":
        raise ValueError(f"stages={stages!r} runs stages in float32; leave out --dtype or --stages")
    if int8 and (own_thresholds or dtype != "float32"):
        raise ValueError("int8=True needs held-out images and dtype=float32; leave out --own-thresholds and --dtype")
    check_saving(network, save)
    check_writable(json_path, cache)
    check_picture(figure)
    net, source = open_network(network, dataset, data_root, download, workers, device, other_data)
    if int8 and net.cost.device.type != "cpu":
        raise ValueError(f"int8=True is measured on the CPU, not on {net.cost.device}; add --device cpu")
    names = criterion_names(criterion, net)
    if save:
        net.check_saving()
    least = None if few_images else least_images({kind: value})
    aside = None if own_thresholds else HeldOutImages(source, held_out, seed, least)
    tests = _tests(load_images(net, source, "test"), images, workers)
    if len(tests.dataset) < max(sizes):
        raise ValueError(
            f"batch_sizes={batch_sizes!r}: there are only {len(tests.dataset)} test images; take smaller ones"
        )
    choice = choices.Choice(net)
    with bars() as progress:
        if aside is not None:
            choice = choices.choose(net, aside, names, kind, value, cache, BATCH, progress)
        in_int8 = choices.in_int8(choice, aside, BATCH, progress) if int8 and aside is not None else None
        found = assessment.assess(
            choice.net,
            tests.reported("test images", progress),
            batch_sizes=sizes,
            others=choice.others,
            compared={name: c.thresholds for name, c in choice.chosen.items()},
            dtype=assessment.DTYPES[dtype],
            with_compile=with_compile,
            in_int8=in_int8,
            stages=stages,
            seconds=seconds,
            progress=progress,
        )
    if save:
        calibration.save_thresholds(choice.net, network, choice.chosen)
    saved = save or own_thresholds
    lines = verdicts.code(str(network), choice.net, found.verdicts, assessment.DTYPES[dtype], saved, stages)
    budget = None if own_thresholds else (kind, value)
    device = str(choice.net.cost.device)
    bench_report.draw(found, figure, f"{describe(choice.net)} on {source.dataset}, {dtype}, {device}")
    if json_path != "-":
        for part in bench_report.parts(found, choice, source.dataset, dtype, budget, lines):
            echo(part)
        if save:
            echo(f"saved: {network}")
        echo(f"figure: {figure}")
        if lines:
            next_step(f"the lines above, or as a server: eefast serve {network}")
    write_json(json_path, _record(network, source.dataset, dtype, budget, choice, found, lines))


def _sizes(text: str) -> list[int]:
    """1,16,256 → the numbers, ascending."""
    try:
        sizes = sorted({int(size) for size in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise ValueError(f"batch_sizes={text!r} must be numbers from 1 on, such as 1,16,256")
    return sizes


def _tests(whole: Any, count: int | None, workers: int) -> Any:
    """Batches of `count` test images, or of all, in random order: data sets come by class, or easy ones first."""
    import torch
    from torch.utils.data import Subset

    from ..data.loaders import batches

    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return batches(Subset(whole, order), BATCH, workers)


def _record(
    network: Path,
    dataset: str,
    dtype: str,
    budget: tuple[str, float] | None,
    choice: choices.Choice,
    found: Assessment,
    code: str,
) -> dict[str, Any]:
    """What --json writes."""
    from ..measure import environment

    return {
        "network": str(network),
        "dataset": dataset,
        "device": str(choice.net.cost.device),
        "dtype": dtype,
        "bound": budget and dict([budget]),
        "chosen": {name: asdict(c) for name, c in choice.chosen.items()},
        "impossible": choice.impossible,
        "criterion": choice.net.criterion.name,
        "thresholds": choice.net.thresholds.tolist(),
        "accuracy_change": found.early.accuracy - found.plain_accuracy,
        **asdict(found),
        "code": code,
        "environment": environment.inspect_environment(),
    }
