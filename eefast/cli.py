"""The command line: train, calibrate, evaluate and draw networks; data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typer import Argument, Option

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
talk = Console(stderr=True)


@app.callback()
def _root() -> None:
    """Early-exit CNNs that answer a whole batch as fast as the arithmetic they save."""


@app.command()
def demo(
    batch_size: Annotated[int, Option(help="Images per call.", min=1)] = 256,
    images: Annotated[int, Option(help="Use only so many of the 10,000 test images.", min=2, max=10_000)] = 10_000,
    rounds: Annotated[int, Option(help="How often every way is timed.", min=2)] = 16,
    json_path: Annotated[str, Option("--json", help="Write the rows as JSON to this file, or - for stdout.")] = "",
    figure: Annotated[Path, Option(help="Where the picture goes.")] = Path("eefast-demo.png"),
) -> None:
    """Run the shipped network on real MNIST test images in every way, and compare answers and speed."""
    from . import demo as demonstration
    from . import ops, report
    from .checkpoint import load
    from .train.data import mnist_test

    _check_folders(figure, json_path)
    if ops.CPP_MISSING:
        talk.print(f"C++ kernels {ops.CPP_MISSING}; the exit op runs in plain PyTorch", style="yellow")
    assets = resources.files("eefast") / "assets" / "eenet-mnist"
    with resources.as_file(assets) as folder:
        net = load(folder)
        thresholds = json.loads((folder / "thresholds.json").read_text())
    others = {name: thresholds[name] for name in ("max_probability",)}
    pixels, labels = mnist_test()
    with _bars() as progress:
        found = demonstration.run(
            net, others, pixels[:images], labels[:images], batch_size=batch_size, rounds=rounds, progress=progress
        )
    _draw(found, figure)
    more = {"network": found.network, "curves": found.curves, "right": found.right, "wrong": found.wrong}
    _write_json(json_path, report.as_json(found.rows, **more))
    if json_path != "-":
        out = Console()
        out.print(f"\n{found.network} on {images:,} MNIST test images, batch {batch_size}:\n")
        out.print(report.table(found.rows))
        out.print(
            "\nplain network: BatchNorm folded, channels-last, same batch"
            "\nrealised ratio: mean cost × time of the plain network ÷ time; 1 = all that theory promises over it\n"
        )
        for i, (right, wrong) in enumerate(zip(found.right, found.wrong, strict=True)):
            share = (right + wrong) / images
            out.print(f"exit {i}  cost {found.costs[i]:.3f}  {right + wrong:>6,} images  {'█' * round(40 * share)}")
        out.print(f"\nfigure: {figure}", soft_wrap=True)


def _options_from_file(context: typer.Context, config: Path | None) -> Path | None:
    """Let the options in a YAML file take the place of defaults; what stands on the command line still wins."""
    if config is None:
        return None
    import yaml

    try:
        found = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config={str(config)!r} is not YAML ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"config={str(config)!r} must hold lines such as `epochs: 12`")
    options = [parameter for parameter in context.command.params if parameter.name not in ("config", "help")]
    names = {word.lstrip("-").replace("-", "_"): option.name for option in options for word in option.opts}
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            close = get_close_matches(str(key).replace("-", "_"), names) or sorted(set(names.values()))
            raise ValueError(f"config={str(config)!r}: {key!r} is no option of train; near are {', '.join(close)}")
        if name in values:
            raise ValueError(f"config={str(config)!r}: {key!r} is given twice, under two names")
        values[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    context.default_map = values
    return config


@app.command()
def train(
    config: Annotated[
        Path | None,
        Option(
            help="YAML file with options by their names here, such as `epochs: 12`; the command line wins.",
            callback=_options_from_file,
            is_eager=True,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    net: Annotated[str, Option("--net", "--model", help="eenet8 … eenet152.")] = "eenet20",
    dataset: Annotated[
        str, Option(help="mnist, fashion-mnist, svhn, cifar10, tiny-imagenet, imagenet, folder.")
    ] = "mnist",
    data_root: Annotated[Path, Option("--data-root", "--data-dir", help="Folder with the published files.")] = Path(
        "data"
    ),
    output: Annotated[Path, Option(help="Folder for the network, its thresholds and the report.")] = Path(
        "runs/trained"
    ),
    download: Annotated[bool, Option(help="Fetch missing files into the data folder, where torchvision can.")] = False,
    image_size: Annotated[
        int | None, Option("--image-size", "--img-size", help="Of imagenet and folder, 224 by default.", min=1)
    ] = None,
    num_exits: Annotated[int, Option(help="Number of early exits.", min=1)] = 3,
    placement: Annotated[str, Option(help="fine, pareto, linear, gold_ratio, or blocks: 2,4,6.")] = "fine",
    head: Annotated[str, Option(help="pool, bnpool, plain, conv1, conv2, conv3.")] = "pool",
    backbone: Annotated[
        str | None, Option(help="torchvision:NAME or timm:NAME instead of --net; exits are attached to it.")
    ] = None,
    exits: Annotated[str, Option(help="The backbone's modules behind which exits stand: layer1,layer2.")] = "",
    weights: Annotated[
        Path | None,
        Option("--weights", "--initial-checkpoint", help="Weights to start from: of the backbone, or of all of --net."),
    ] = None,
    freeze_backbone: Annotated[bool, Option(help="Train the early heads only.")] = False,
    self_labelled: Annotated[bool, Option(help="The frozen backbone's own answers stand for the labels.")] = False,
    epochs: Annotated[int, Option(help="Passes over the training images.", min=1)] = 12,
    batch_size: Annotated[int, Option("--batch-size", "-b", help="Images per step and device.", min=2)] = 128,
    learning_rate: Annotated[float, Option("--learning-rate", "--lr", help="At the peak of the schedule.")] = 0.01,
    optimizer: Annotated[str, Option("--optimizer", "--opt", help="adamw, adam, sgd.")] = "adamw",
    schedule: Annotated[str, Option("--schedule", "--sched", help="one-cycle, cosine, step, constant.")] = "one-cycle",
    weight_decay: Annotated[float, Option(help="Of the optimiser.")] = 1e-4,
    loss: Annotated[
        str, Option(help="Weighted sum of losses: v0 … v4, pteenet_v0, _v2, _v5, _v6, correctness.")
    ] = "deep_supervision+correctness",
    two_stage: Annotated[int, Option(help="So many epochs minimise v0 before --loss.", min=0)] = 0,
    cost_weight: Annotated[float, Option(help="λ, the price of cost in the losses v1 … v4.")] = 1.0,
    shift: Annotated[
        int | None, Option(help="Move training images by up to so many pixels; by default as in the papers.", min=0)
    ] = None,
    flip: Annotated[bool | None, Option(help="Mirror training images; by default as in the papers.")] = None,
    held_out: Annotated[int, Option(help="Training images kept aside to choose thresholds on.", min=1)] = 5000,
    max_accuracy_drop: Annotated[
        float, Option(help="Thresholds: cheapest with at most this drop in accuracy.")
    ] = 0.005,
    max_cost: Annotated[float | None, Option(help="Thresholds instead: most accurate with at most this cost.")] = None,
    seed: Annotated[int, Option(help="Of weights, order and held-out images.")] = 1,
    precision: Annotated[str, Option(help="32-true, 16-mixed, bf16-mixed.")] = "32-true",
    amp: Annotated[bool, Option("--amp", help="Mixed precision: 16-mixed on CUDA, bf16-mixed elsewhere.")] = False,
    device: Annotated[str, Option(help="auto, cpu, cuda.")] = "auto",
    devices: Annotated[int, Option(help="How many of them on each node; -1 = all.", min=-1)] = 1,
    nodes: Annotated[int, Option(help="How many machines.", min=1)] = 1,
    strategy: Annotated[str, Option(help="How they share the work: ddp, fsdp … as Lightning calls it.")] = "auto",
    workers: Annotated[int, Option("--workers", "-j", help="Processes that decode images.", min=0)] = 0,
    tensorboard: Annotated[bool, Option(help="Write logs for TensorBoard too.")] = False,
    resume: Annotated[bool, Option(help="Go on from last.ckpt in the output folder.")] = False,
    test: Annotated[bool, Option(help="Measure the test images once, at the end.")] = False,
    json_path: Annotated[str, Option("--json", help="Write the report as JSON to this file, or - for stdout.")] = "",
) -> None:
    """Train an early-exit network, choose its thresholds on held-out training images, save it."""
    arguments = {name: value for name, value in locals().items() if name not in ("config", "amp", "json_path")}
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from .train.run import train as run

    _check_folders(json_path)
    arguments["exits"] = [name.strip() for name in exits.split(",") if name.strip()]
    if placement.replace(",", "").isdigit():
        arguments["placement"] = [int(blocks) for blocks in placement.split(",")]
    if amp:
        on_cuda = device in ("cuda", "gpu") or (device == "auto" and torch.cuda.is_available())
        arguments["precision"] = "16-mixed" if on_cuda else "bf16-mixed"
    found = run(**arguments)
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    if json_path != "-":
        out = Console()
        out.print(f"weights of epoch {found.best_epoch}, held-out loss {found.best_held_out_loss:.4f}", highlight=False)
        for where, results, agreement in (
            ("held-out", found.held_out, found.held_out_agreement),
            ("test", found.test or {}, found.test_agreement or {}),
        ):
            for name, c in results.items():
                out.print(
                    f"{where:9} {name:16} accuracy {c.accuracy:.2%}  as the final exit {agreement[name]:.2%}  "
                    f"mean cost {c.cost:.3f}",
                    highlight=False,
                    soft_wrap=True,
                )
        out.print(f"\nsaved: {output}", highlight=False, soft_wrap=True)
    _write_json(json_path, json.dumps(asdict(found), indent=2) + "\n")


@app.command()
def calibrate_device(
    device: Annotated[str, Option(help="A CUDA device, such as cuda or cuda:1.")] = "cuda",
    json_path: Annotated[str, Option("--json", help="Write the table as JSON to this file, or - for stdout.")] = "",
) -> None:
    """Measure what a GPU takes for launches and waits, and keep it for the plans of all later runs; takes a second."""
    import torch

    from . import device_table

    _check_folders(json_path)
    if not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch finds no CUDA device here; on the CPU nothing needs calibration")
    table = device_table.calibrate(torch.device(device))
    if json_path != "-":
        out = Console()
        out.print(f"launch of a CUDA graph, on the host    {1e6 * table.launch:6.1f} µs", highlight=False)
        out.print(f"wait for a count, the device idle      {1e6 * table.wait:6.1f} µs", highlight=False)
        out.print(f"\nkept in {device_table.path(torch.device(device))}", highlight=False, soft_wrap=True)
    _write_json(json_path, json.dumps(asdict(table), indent=2) + "\n")


Network = Annotated[Path, Argument(help="A folder of net.save(), or a checkpoint of the reference repository.")]
Dataset = Annotated[str, Option(help="mnist, fashion-mnist, svhn, cifar10, tiny-imagenet, imagenet, folder.")]
DataRoot = Annotated[
    Path | None, Option(help="Folder with the data set's published files; data, or for MNIST's test images none.")
]
Download = Annotated[bool, Option(help="Fetch missing files into the data folder, where torchvision can.")]
Split = Annotated[str, Option(help="test, or train.")]
Images = Annotated[int | None, Option(help="Use only the first so many images.", min=1)]
HeldOut = Annotated[int, Option(help="Training images that were kept aside, as in eefast train.", min=1)]
Seed = Annotated[int, Option(help="Of the held-out images, as in eefast train.")]
Cache = Annotated[
    Path | None, Option(help="File (.safetensors) that keeps all exits' outputs on the held-out images for next time.")
]
BatchSize = Annotated[int, Option(help="Images per call.", min=1)]
Workers = Annotated[int, Option(help="Processes that decode images.", min=0)]
Device = Annotated[str, Option(help="auto, cpu, cuda.")]
CriterionName = Annotated[str, Option(help="learned, max_probability, entropy, margin, or all; the network's own.")]
Json = Annotated[str, Option("--json", help="Write the figures as JSON to this file, or - for stdout.")]


MinAccuracy = Annotated[float | None, Option(help="Cheapest with at least this accuracy, 0 … 1.")]
MaxAccuracyDrop = Annotated[
    float | None, Option(help="Cheapest with at most this drop below the final exit's accuracy; 0.005.")
]
MaxCost = Annotated[float | None, Option(help="Most accurate with at most this mean cost.")]


ECE_WORDS = (
    "all images at each exit; ECE: expected calibration error (15 bins)\n"
    "of the largest probability and of the learned confidence"
)

# Images that go through all exits together, in `bench`.
BENCH_BATCH = 64
BENCH_WORDS = (
    "× static: speed ÷ the fastest way without early exits, in the same rounds\n"
    "realised ratio: mean cost × that; 1 = all that theory promises"
)


@app.command()
def calibrate(
    network: Network,
    dataset: Dataset = "mnist",
    data_root: DataRoot = None,
    download: Download = False,
    min_accuracy: MinAccuracy = None,
    max_accuracy_drop: MaxAccuracyDrop = None,
    max_cost: MaxCost = None,
    criterion: CriterionName = "",
    scale: Annotated[
        bool, Option(help="First fit temperatures per exit, and the confidence row; part of what is saved.")
    ] = False,
    save: Annotated[bool, Option(help="Write the thresholds into the network's folder.")] = False,
    held_out: HeldOut = 5000,
    seed: Seed = 1,
    cache: Cache = None,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    json_path: Json = "",
) -> None:
    """Choose thresholds under a budget on held-out training images, and compare criteria on the same network."""
    from . import calibrate as calibration
    from . import evaluate as evaluation
    from . import report

    kind, value = _budget(min_accuracy=min_accuracy, max_accuracy_drop=max_accuracy_drop, max_cost=max_cost)
    _check_saving(network, save)
    _check_folders(json_path, *([cache] if cache else []))
    net = _network(network, dataset, data_root, device)
    names = _criteria(criterion, net)
    with _bars() as progress:
        outputs, labels = _held_out(
            net, dataset, data_root, download, held_out, seed, cache, batch_size, workers, progress
        )
        raw = evaluation.exit_quality(outputs, labels)
        scaling = calibration.fit_scaling(outputs, labels) if scale else None
        if scaling is not None:
            outputs = calibration.scaled(outputs, scaling)
        chosen, impossible = _chosen(net, outputs, labels, names, kind, value, progress)
    exits = {
        name: evaluation.by_thresholds(outputs, net, name, c.thresholds).exit_index.bincount(
            minlength=net.num_exits + 1
        )
        for name, c in chosen.items()
    }
    quality = evaluation.exit_quality(outputs, labels)
    if save:
        if scaling is not None:
            calibration.fold_scaling(net, scaling)
        calibration.save_thresholds(net, network, chosen)
    if json_path != "-":
        out = Console()
        out.print(f"\n{_words(net)}, {len(labels):,} held-out images of {dataset}, {kind} {value:g}\n", highlight=False)
        rows = [[name, f"{c.accuracy:.2%}", f"{c.cost:.4f}", _counts(exits[name])] for name, c in chosen.items()]
        out.print(_table(["criterion", "accuracy", "mean cost", "images per exit"], rows))
        for name, why in impossible.items():
            out.print(f"{name}: {why}", highlight=False, soft_wrap=True)
        out.print()
        out.print(_quality_table(net, quality, raw if scale else None, scaling))
        out.print(f"\n{ECE_WORDS}", highlight=False)
        if save:
            out.print(f"\nsaved: {network}", highlight=False, soft_wrap=True)
    figures = {
        "network": str(network),
        "dataset": dataset,
        "held_out": len(labels),
        "seed": seed,
        "bound": {kind: value},
        "chosen": {name: {**asdict(c), "exits": exits[name].tolist()} for name, c in chosen.items()},
        "impossible": impossible,
        "exits": [asdict(q) for q in quality],
        "exits_before_scaling": [asdict(q) for q in raw] if scale else None,
        "scaling": asdict(scaling) if scaling is not None else None,
        "environment": report.environment(),
    }
    _write_json(json_path, json.dumps(figures, indent=2) + "\n")


@app.command()
def evaluate(
    network: Network,
    dataset: Dataset = "mnist",
    data_root: DataRoot = None,
    download: Download = False,
    split: Split = "test",
    images: Images = None,
    engine: Annotated[str, Option(help="auto, resident, compact, reference.")] = "auto",
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    json_path: Json = "",
) -> None:
    """Measure accuracy, cost and exits, of the whole and of every class and exit, and compare with the reference."""
    from . import evaluate as evaluation
    from . import report
    from .api import accelerate
    from .calibrate import collect

    _check_folders(json_path)
    net = _network(network, dataset, data_root, device)
    fast = accelerate(net, engine=engine)
    batches = evaluation.batches(_images(net, dataset, data_root, download, split, images), batch_size, workers)
    where = net.thresholds.device
    with _bars() as progress:
        result, labels = evaluation.answers(fast, evaluation.reported(batches, fast.plan.engine, progress), where)
        found = evaluation.evaluate(result, labels, net)
        reference, _ = evaluation.answers(net, evaluation.reported(batches, "reference", progress), where)
        outputs, _ = collect(net, evaluation.reported(batches, "asking every exit", progress))
    quality = evaluation.exit_quality(outputs, labels)
    flips = evaluation.flips(result, reference, outputs, net)
    if json_path != "-":
        out = Console()
        out.print(f"\n{_words(net)}, {found.images:,} images of {dataset} ({split})", highlight=False)
        out.print(f"criterion {net.criterion.name}, engine {fast.plan.engine}\n", highlight=False)
        furthest = f", at most {flips.distance:.1g} from a threshold" if flips.count else ""
        for what, figure in (
            ("accuracy", f"{found.accuracy:.2%}"),
            ("mean cost", f"{found.mean_cost:.4f}"),
            ("with every head on the way", f"{found.mean_path_cost:.4f}"),
            ("other exit than net.eval()", f"{flips.count:,} images{furthest}"),
        ):
            out.print(f"{what:28}{figure}", highlight=False)
        out.print()
        out.print(_quality_table(net, quality, right=found.right, wrong=found.wrong))
        out.print(f"\n{ECE_WORDS}\n", highlight=False)
        known = [k for k, a in enumerate(found.class_accuracy) if a is not None]
        shown = known if len(known) <= 20 else sorted(known, key=lambda k: found.class_accuracy[k])[:20]  # type: ignore[arg-type, return-value]
        rows = [
            [str(k), f"{sum(found.class_exits[k]):,}", f"{found.class_accuracy[k]:.2%}", _counts(found.class_exits[k])]
            for k in shown
        ]
        out.print(_table(["class", "images", "accuracy", "images per exit"], rows))
        if len(shown) < len(known):
            out.print(f"the 20 least accurate of {len(known)} classes; --json has all", highlight=False)
    figures = {
        "network": str(network),
        "dataset": dataset,
        "split": split,
        "engine": fast.plan.engine,
        "criterion": net.criterion.name,
        "thresholds": net.thresholds.tolist(),
        "evaluation": asdict(found),
        "exits": [asdict(q) for q in quality],
        "flips": asdict(flips),
        "environment": report.environment(),
    }
    _write_json(json_path, json.dumps(figures, indent=2) + "\n")


@app.command()
def bench(
    network: Network,
    dataset: Dataset = "mnist",
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
    held_out: HeldOut = 5000,
    seed: Seed = 1,
    cache: Cache = None,
    dtype: Annotated[str, Option(help="Of the arithmetic in all ways: float32, float16, bfloat16.")] = "float32",
    with_compile: Annotated[
        bool, Option("--compile", help="Also torch.compile, which may take minutes for each batch size.")
    ] = False,
    seconds: Annotated[float, Option(help="Of timing for each batch size; three rounds at least.", min=0)] = 15.0,
    workers: Workers = 0,
    device: Device = "auto",
    json_path: Json = "",
    figure: Annotated[Path, Option(help="Where the picture goes.")] = Path("eefast-bench.png"),
) -> None:
    """Is early exit worth it on this machine, with which engine and thresholds? Every way checked, then timed."""
    import torch
    from torch.utils.data import Subset

    from . import bench as benchmark
    from . import calibrate as calibration
    from . import evaluate as evaluation
    from . import report

    kind, value = _budget(min_accuracy=min_accuracy, max_accuracy_drop=max_accuracy_drop, max_cost=max_cost)
    if own_thresholds and (save or criterion != "all" or {min_accuracy, max_accuracy_drop, max_cost} != {None}):
        raise ValueError("own_thresholds=True chooses nothing; leave out --criterion, --save and the budget, or itself")
    sizes = _sizes(batch_sizes)
    if dtype not in benchmark.DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(benchmark.DTYPES)}")
    _check_saving(network, save)
    _check_folders(json_path, figure, *([cache] if cache else []))
    net = _network(network, dataset, data_root, device)
    names = _criteria(criterion, net)
    whole = _images(net, dataset, data_root, download, "test")
    # Data sets lie in the order of their classes, or with the easier images first.
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:images].tolist()
    tests = evaluation.batches(Subset(whole, order), BENCH_BATCH, workers)
    if len(order) < max(sizes):
        raise ValueError(f"batch_sizes={batch_sizes!r}: there are only {len(order)} test images; take smaller ones")
    chosen: dict[str, Any] = {}
    impossible: dict[str, str] = {}
    others = []
    with _bars() as progress:
        if not own_thresholds:
            try:
                outputs, kept = _held_out(
                    net, dataset, data_root, download, held_out, seed, cache, BENCH_BATCH, workers, progress
                )
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}; or keep the network's thresholds: --own-thresholds") from error
            chosen, impossible = _chosen(net, outputs, kept, names, kind, value, progress)
            best = _best(chosen, kind)
            net = net.with_criterion(best, chosen[best].thresholds).to(net.cost.device)
            final = evaluation.exit_quality(outputs[-1:], kept)[0].accuracy
            front = calibration.pareto_front(outputs, kept, net.cost, best)
            others = [c.thresholds for c in _by_cost([c for c in front if c.accuracy > final - 0.03], 6)]
        found = benchmark.run(
            net,
            evaluation.reported(tests, "test images", progress),
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
    _draw_bench(found, figure)
    if json_path != "-":
        out = Console()
        out.print(
            f"\n{_words(net)}, {dtype}, {found.early.images:,} test images of {dataset}, "
            f"{found.rows[0].images:,} of them timed\n",
            highlight=False,
            soft_wrap=True,
        )
        rows = [["final exit", "", "", f"{found.plain_accuracy:.2%}", "1.0000"]]
        for name, (accuracy, cost) in found.criteria.items():
            held = [f"{chosen[name].accuracy:.2%}", f"{chosen[name].cost:.4f}"] if name in chosen else ["", ""]
            rows.append([name, *held, f"{accuracy:.2%}", f"{cost:.4f}"])
        out.print(_table(["criterion", "held-out", "mean cost", "test", "mean cost"], rows))
        for name, why in impossible.items():
            out.print(f"{name}: {why}", highlight=False, soft_wrap=True)
        taken = [right + wrong for right, wrong in zip(found.early.right, found.early.wrong, strict=True)]
        thresholds = ", ".join(f"{t:.4f}" for t in net.thresholds.tolist())
        whose = "the network's own" if own_thresholds else f"the best for {kind} {value:g}"
        out.print(f"\n{whose}: {net.criterion.name}, thresholds {thresholds}", highlight=False, soft_wrap=True)
        out.print(f"images per exit: {_counts(taken)}", highlight=False)
        for size in sizes:
            out.print()
            out.print(report.speed_table([row for row in found.rows if row.batch_size == size]))
        out.print(f"\n{BENCH_WORDS}\n", highlight=False)
        for verdict in found.verdicts:
            sentence = f"batch {verdict.batch_size}: {benchmark.words(verdict, change)}"
            out.print(sentence, highlight=False, soft_wrap=True)
        if not own_thresholds and (excess := _excess(found, kind, value)):
            out.print(excess, highlight=False, soft_wrap=True)
        out.print(f'engine="auto" takes {found.auto}', highlight=False)
        for name, why in found.left_out.items():
            out.print(f"not compared: {name}, {why}", highlight=False, soft_wrap=True)
        advice = lines or "keep the network without early exits"
        out.print(f"\n{advice}\n", highlight=False, markup=False, soft_wrap=True)
        if save:
            out.print(f"saved: {network}", highlight=False, soft_wrap=True)
        out.print(f"figure: {figure}", highlight=False, soft_wrap=True)
    figures = {
        "network": str(network),
        "dataset": dataset,
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
        "environment": report.environment(),
    }
    _write_json(json_path, json.dumps(figures, indent=2) + "\n")


@app.command()
def plot(
    network: Network,
    dataset: Dataset = "mnist",
    data_root: DataRoot = None,
    download: Download = False,
    split: Split = "test",
    images: Images = None,
    twin: Annotated[
        list[str] | None, Option(help="A static network as a point: name=accuracy[,cost], such as ResNet-20=0.991,0.6.")
    ] = None,
    criterion: CriterionName = "all",
    held_out: HeldOut = 5000,
    seed: Seed = 1,
    cache: Cache = None,
    same_images: Annotated[
        bool, Option(help="Choose the curves' thresholds on the images that are measured: optimistic, needs no others.")
    ] = False,
    examples: Annotated[int, Option(help="Images right, and as many wrong, per exit.", min=1)] = 6,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    output: Annotated[Path, Option(help="Where the picture goes.")] = Path("eefast-plot.png"),
) -> None:
    """Draw accuracy against mean cost beside static networks, images per exit, and examples of who leaves where."""
    import torch

    from . import calibrate as calibration
    from . import evaluate as evaluation

    points = dict(map(_twin, twin or []))
    _check_folders(output, *([cache] if cache else []))
    net = _network(network, dataset, data_root, device)
    names = _criteria(criterion, net)
    measured = evaluation.batches(_images(net, dataset, data_root, download, split, images), batch_size, workers)
    with _bars() as progress:
        kept = None
        if not same_images:
            kept = _held_out(net, dataset, data_root, download, held_out, seed, cache, batch_size, workers, progress)
        pixels = []

        def seen():  # type: ignore[no-untyped-def]
            for x, y in evaluation.reported(measured, "asking every exit", progress):
                pixels.append(x)
                yield x, y

        outputs, labels = calibration.collect(net, seen())
        chosen_on = kept or (outputs, labels)
        curves = {}
        for i, name in enumerate(names):
            progress("choosing thresholds", i, len(names))
            front = calibration.pareto_front(chosen_on[0], chosen_on[1], net.cost, name)
            line = [calibration.outcome(outputs, labels, net.cost, name, c.thresholds) for c in _thinned(front)]
            line.sort(key=lambda point: point[1])
            curves[name] = [cost for _, cost in line], [accuracy for accuracy, _ in line]
        progress("choosing thresholds", len(names), len(names))
    result = evaluation.by_thresholds(outputs, net, net.criterion.name, net.thresholds.tolist())
    found = evaluation.evaluate(result, labels, net)
    points = {
        f"{net.criterion.name}, as saved": (found.mean_cost, found.accuracy),
        "final exit": (1.0, evaluation.exit_quality(outputs[-1:], labels)[0].accuracy),
        **points,
    }
    kept_words = "the same images: optimistic" if kept is None else f"{len(kept[1]):,} held-out training images"
    title = (
        f"{_words(net)}, {len(labels):,} images of {dataset} ({split})\nthresholds of the curves chosen on {kept_words}"
    )
    _draw_network(output, title, net, curves, points, found, torch.cat(pixels), labels, result, examples)
    Console().print(f"figure: {output}", highlight=False, soft_wrap=True)


def _draw_network(output, title, net, curves, points, found, pixels, labels, result, examples) -> None:  # type: ignore[no-untyped-def]
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from . import plot as drawing

    costs = net.cost.tolist()
    figure: Any = pyplot.figure(figsize=(15, max(7.5, 1.0 * len(costs) + 1.5)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    above, below = left.subplots(2, 1)
    drawing.accuracy_against_cost(above, curves, points)
    drawing.exit_histogram(below, found.right, found.wrong, costs)
    drawing.examples(right, pixels, labels, result.labels, result.exit_index, costs, examples)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def _twin(text: str) -> tuple[str, tuple[float, float]]:
    """name=accuracy[,cost] → name, (cost, accuracy)."""
    name, _, numbers = text.rpartition("=")
    try:
        accuracy, cost = map(float, numbers.split(",") if "," in numbers else (numbers, "1"))
    except ValueError:
        accuracy = cost = -1
    if not name or not 0 <= accuracy <= 1 or cost < 0:
        raise ValueError(
            f"twin={text!r} must be name=accuracy[,cost] with an accuracy in 0 … 1, such as ResNet-20=0.991"
        )
    return name, (cost, accuracy)


def _by_cost(front, most: int):  # type: ignore[no-untyped-def]
    """Points whose costs lie as evenly as can be, both ends among them; `front` goes from cheap to dear."""
    steps = [front[0].cost + i / (most - 1) * (front[-1].cost - front[0].cost) for i in range(most)] if front else []
    nearest = [min(front, key=lambda point: abs(point.cost - step)) for step in steps]
    return list(dict.fromkeys(nearest))


def _thinned(front, most: int = 60):  # type: ignore[no-untyped-def]
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)] if len(front) > most else front


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one per kind of work: called with (what, steps done, steps in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield progress


def _network(path: Path, dataset: str, data_root: Path | None, device: str):  # type: ignore[no-untyped-def]
    """The network on its device; one of the reference gets the data set's shape and normalisation, which it lacks."""
    import torch

    from .checkpoint import load
    from .train import data

    if device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch finds no CUDA device here; take cpu")
    found = data.info(dataset, data_root or "data")
    lacking: dict[str, Any] = {"input_shape": found.shape, "normalization": (found.mean, found.std)}
    net = load(path, **(lacking if path.is_file() else {}))
    if net.num_classes != found.num_classes or net.input_shape[0] != found.shape[0]:
        raise ValueError(
            f"{path} takes images of {net.input_shape[0]} channels and knows {net.num_classes} classes, but {dataset} "
            f"has {found.shape[0]} and {found.num_classes}; name its own data set with --dataset"
        )
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return net.to(torch.device(chosen))


def _words(net) -> str:  # type: ignore[no-untyped-def]
    return f"{(net.config or {}).get('name', 'network')} with {net.num_exits} early exits"


def _criteria(name: str, net) -> list[str]:  # type: ignore[no-untyped-def]
    from . import criteria

    return list(criteria.CRITERIA) if name == "all" else [criteria.get(name or net.criterion.name).name]


def _budget(**bounds: float | None) -> tuple[str, float]:
    """The one budget that was given, or the default."""
    given = {name: value for name, value in bounds.items() if value is not None} or {"max_accuracy_drop": 0.005}
    if len(given) > 1:
        raise ValueError(f"{', '.join(f'{k}={v}' for k, v in given.items())}: give one of them")
    ((name, value),) = given.items()
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in 0 … 1")
    return name, value


def _best(chosen, kind) -> str:  # type: ignore[no-untyped-def]
    """The criterion that is cheapest within a budget of accuracy, or most accurate within one of cost."""
    if kind == "max_cost":
        return max(chosen, key=lambda name: (chosen[name].accuracy, -chosen[name].cost))
    return min(chosen, key=lambda name: (chosen[name].cost, -chosen[name].accuracy))


def _excess(found, kind: str, value: float) -> str:  # type: ignore[no-untyped-def]
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


def _check_saving(network: Path, save: bool) -> None:
    if save and not network.is_dir():
        raise ValueError(f"{network} is a file; eefast.load(…).save(folder) makes the folder that --save can write to")


def _chosen(net, outputs, labels, names, kind, value, progress):  # type: ignore[no-untyped-def]
    """The best thresholds of every criterion within the budget, and why others have none; at least one has."""
    from . import calibrate as calibration
    from . import evaluate as evaluation

    final = evaluation.exit_quality(outputs[-1:], labels)[0].accuracy
    bound = {kind: value} if kind != "max_accuracy_drop" else {"min_accuracy": final - value}
    chosen, impossible = {}, {}
    for i, name in enumerate(names):
        progress("choosing thresholds", i, len(names))
        try:
            chosen[name] = calibration.calibrate(outputs, labels, net.cost, name, **bound)
        except ValueError as error:
            impossible[name] = str(error)
    progress("choosing thresholds", len(names), len(names))
    if not chosen:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))
    return chosen, impossible


def _images(net, dataset, data_root, download, split, count=None):  # type: ignore[no-untyped-def]
    from torch.utils.data import Subset

    from .train import data

    if data_root is None and (dataset, split) == ("mnist", "test"):
        found: Any = data.ImageTensors(*data.mnist_test())
    else:
        # Photographs come in all sizes; they are brought to the one that the network's costs were counted for.
        size = net.input_shape[1] if dataset in ("imagenet", "folder") else None
        found = data.dataset(dataset, data_root or "data", split, download, image_size=size)
    return found if count is None or count >= len(found) else Subset(found, range(count))


def _held_out(net, dataset, data_root, download, held_out, seed, cache, batch_size, workers, progress):  # type: ignore[no-untyped-def]
    """All exits' outputs on the held-out training images, from the cache if it has them."""
    from . import calibrate as calibration
    from . import evaluate as evaluation

    made_of = {"network": calibration.fingerprint(net), "images": f"{held_out} of {dataset} by seed {seed}"}
    if cache is not None and cache.exists():
        return calibration.load_outputs(cache, made_of)
    kept = evaluation.held_out(_images(net, dataset, data_root, download, "train"), held_out, seed)
    batches = evaluation.batches(kept, batch_size, workers)
    found = calibration.collect(net, evaluation.reported(batches, "held-out images", progress))
    if cache is not None:
        calibration.save_outputs(cache, *found, made_of)
    return found


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]):  # type: ignore[no-untyped-def]
    from rich.table import Table

    out = Table(box=None, header_style="bold", pad_edge=False)
    for i, title in enumerate(titles):
        out.add_column(title, justify="left" if i == 0 else "right")
    for row in rows:
        out.add_row(*row)
    return out


def _counts(images) -> str:  # type: ignore[no-untyped-def]
    return " ".join(str(int(count)) for count in images)


def _quality_table(net, quality, before=None, scaling=None, right=None, wrong=None):  # type: ignore[no-untyped-def]
    """A line per exit: who leaves there, where known, and what it would be worth for all images."""
    titles = ["exit", "cost", *(["images", "wrong"] if right else []), "accuracy", "ECE", "ECE learned"]

    def errors(q) -> tuple[str, str]:  # type: ignore[no-untyped-def]
        return f"{q.probability_error:.4f}", f"{q.confidence_error:.4f}"

    rows = []
    for i, (q, cost) in enumerate(zip(quality, net.cost.tolist(), strict=True)):
        row = [str(i), f"{cost:.3f}", *([f"{right[i] + wrong[i]:,}", f"{wrong[i]:,}"] if right else [])]
        shown = [errors(q)] if before is None else [errors(before[i]), errors(q)]
        row += [f"{q.accuracy:.2%}", *map(" → ".join, zip(*shown, strict=True))]
        if scaling is not None:
            row += [f"{scaling.temperature[i]:.2f}", f"{scaling.slope[i]:.2f} · z {scaling.offset[i]:+.2f}"]
        rows.append(row)
    return _table(titles + (["temperature", "row"] if scaling is not None else []), rows)


def _check_folders(*files: str | Path) -> None:
    for file in map(Path, files):
        if not file.parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no folder {file.parent}; make it first")


def _write_json(path: str, text: str) -> None:
    if path == "-":
        typer.echo(text, nl=False)
    elif path:
        Path(path).write_text(text)


def _draw_bench(found, figure: Path) -> None:  # type: ignore[no-untyped-def]
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from . import plot

    fig, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    speedups: dict[str, dict[int, float]] = {}
    for row in found.rows:
        speedups.setdefault(row.name, {})[row.batch_size] = row.speedup
    static = [row.name for row in found.rows if row.criterion is None]
    plot.speedup_over_batch_size(left, speedups, static)
    largest = max(row.batch_size for row in found.rows)
    accuracies = {True: found.plain_accuracy, False: found.early.accuracy}
    points = {
        row.name: (row.images_per_s, accuracies[row.criterion is None])
        for row in found.rows
        if row.batch_size == largest
    }
    curve = [(point.images_per_s, point.accuracy) for point in found.curve]
    plot.accuracy_against_speed(right, points, static, curve, f"{found.auto}, other thresholds")
    right.set_title(f"batch {largest}", fontsize=10)
    fig.savefig(figure, dpi=120)
    pyplot.close(fig)


def _draw(found, figure: Path) -> None:  # type: ignore[no-untyped-def]
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from . import plot

    fig, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    points = {row.name: (row.mean_cost, row.accuracy) for row in found.rows if row.images == found.rows[0].images}
    plot.accuracy_against_cost(left, found.curves, points)
    plot.exit_histogram(right, found.right, found.wrong, found.costs)
    fig.savefig(figure, dpi=120)
    pyplot.close(fig)


def main() -> None:
    """Entry point of the `eefast` command: exit code 2 for wrong usage or files, 1 for answers that disagree."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        talk.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from error
