"""`eefast search`: a trained network or backbone → a folder with the network whose exits are best within a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..criteria import CRITERIA
from ..heads import HEADS
from ..search.options import SearchOptions
from .options import Json
from .output import bars, check_writable, echo, next_step, note, write_json

if TYPE_CHECKING:
    from ..model import EarlyExitNet
    from ..record import TrainingRecord
    from ..search.run import Exits, SearchReport

DEFAULT = SearchOptions(max_cost=1.0)
# Rows of the table of the front.
MOST_ROWS = 12
limit_option, place_option, training_option, data_option, run_option = (
    partial(Option, rich_help_panel=title)
    for title in ("Limits", "Places and heads", "Training of the heads", "Data", "Run and output")
)


def command(
    network: Annotated[
        str, Argument(help="A folder that net.save() wrote, or torchvision:NAME, timm:NAME, eenet20 … eenet152.")
    ],
    max_cost: Annotated[
        float | None, limit_option(help="Highest mean cost in MACs, as a share of the network without exits.")
    ] = None,
    max_time: Annotated[
        float | None, limit_option(help="Instead: highest mean time on this machine, as a share of that network's.")
    ] = None,
    max_parameters: Annotated[
        int | None, limit_option(help="Highest number of parameters; alone or beside another limit.", min=1)
    ] = None,
    criterion: Annotated[
        str, limit_option(help=f"{', '.join(CRITERIA)}, several of them with commas, or all: the best is taken.")
    ] = "all",
    kinds: Annotated[
        str, place_option(help=f"Kinds of heads that are tried at every place, of {', '.join(HEADS)}.")
    ] = ",".join(DEFAULT.kinds),
    places: Annotated[
        str, place_option(help="Modules, or numbers of residual blocks, after which exits are tried; default: all.")
    ] = "",
    most_places: Annotated[
        int, place_option(help="How many places are tried where none are named, spread evenly by cost.", min=1)
    ] = DEFAULT.most_places,
    weights: Annotated[
        Path | None, place_option(help="Weights of a backbone that is named: a file or folder, or as IMAGENET1K_V1.")
    ] = None,
    train_backbone: Annotated[
        bool, training_option("--train-backbone", help="Train the backbone too, not the heads only.")
    ] = False,
    epochs: Annotated[int, training_option(help="Passes over the training images.", min=1)] = DEFAULT.epochs,
    batch_size: Annotated[
        int, training_option("--batch-size", "-b", help="Images per step.", min=2)
    ] = DEFAULT.batch_size,
    learning_rate: Annotated[
        float, training_option("--learning-rate", "--lr", help="At the peak of the schedule.")
    ] = DEFAULT.learning_rate,
    loss: Annotated[str, training_option(help="As of `eefast train`.")] = DEFAULT.loss,
    dataset: Annotated[
        str | None,
        data_option(help="As of `eefast train`; by default that of the network's training.", show_default=False),
    ] = None,
    data_root: Annotated[
        Path, data_option("--data-root", "--data-dir", help="Folder with the data set's published files.")
    ] = Path(DEFAULT.data_root),
    image_size: Annotated[
        int | None, data_option(help="Height and width of images of imagenet and folder; default: 224.", min=1)
    ] = None,
    held_out: Annotated[
        int | None,
        data_option(
            help="Training images on which exits are chosen; by default those of the network's training.",
            min=1,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        data_option(help="Of heads, order and held-out images; by default that of training.", show_default=False),
    ] = None,
    test: Annotated[bool, data_option(help="Measure the test images once, at the end.")] = False,
    other_data: Annotated[
        bool,
        data_option("--other-data", help="Use the images, seed and held-out ones named, even if training used others."),
    ] = False,
    device: Annotated[str, run_option(help="auto, cpu, cuda.")] = DEFAULT.device,
    workers: Annotated[
        int, run_option("--workers", "-j", help="Processes that decode images.", min=0)
    ] = DEFAULT.workers,
    output: Annotated[Path, run_option(help="Folder for the network and search.json.")] = Path(DEFAULT.output),
    figure: Annotated[
        Path | None, run_option(help="File of a picture of the front of accuracy against cost; its ending is its type.")
    ] = None,
    resume: Annotated[
        bool, run_option("--resume", help="Go on after the last epoch in the folder; other limits need no training.")
    ] = False,
    json_path: Json = "",
) -> None:
    """Find the exits, their heads, rule and thresholds with the highest accuracy within a limit.

    Heads of several kinds are trained at every place of a frozen or trained network together; the subset of them that
    is best on held-out images is kept.
    """
    from .pictures import check_picture

    check_writable(json_path)
    if figure is not None:
        check_picture(figure)
    given = _given(network)
    record = given.record if given is not None else None
    dataset = dataset or (record.dataset if record is not None else DEFAULT.dataset)
    if given is not None and image_size is None and dataset in ("imagenet", "folder"):
        image_size = given.input_shape[1]
    if record is None and not other_data and Path(network).exists():
        note("it is not known which images the network was trained on; held-out ones may be among them")
    options = SearchOptions(
        network=network, max_cost=max_cost, max_time=max_time, max_parameters=max_parameters,
        criteria=tuple(CRITERIA) if criterion == "all" else _words(criterion), kinds=_words(kinds),
        exits=_words(places), most_places=most_places, weights=weights, freeze_backbone=not train_backbone,
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, loss=loss, image_size=image_size,
        dataset=dataset, data_root=data_root,
        other_data=other_data, test=test, device=device, workers=workers, output=output, resume=resume,
        **_split(None if other_data else record, held_out, seed),
    )  # fmt: skip
    from ..search.run import search
    from ..train.folder import LAST_FILE

    try:
        with bars() as progress:
            report = search(options, progress)
    except KeyboardInterrupt as stop:
        more = "--resume goes on from there" if (output / LAST_FILE).is_file() else "--resume starts it again"
        raise KeyboardInterrupt(str(stop) or more) from stop
    if figure is not None:
        _draw(report, figure, _unit(options))
    if json_path != "-":
        _show(report, options)
        echo(f"\nsaved: {output}" + (f"\nfigure: {figure}" if figure is not None else ""))
        same = f"--held-out {report.arguments['held_out']} --seed {report.arguments['seed']}"
        next_step(
            f"eefast bench {output} --own-thresholds, or train all of it: eefast train --weights {output} {same} …"
        )
    write_json(json_path, asdict(report))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _given(network: str) -> EarlyExitNet | None:
    """The network in a folder; None for a file or a name, which do not say what it was trained on."""
    from ..checkpoint.loading import load

    return load(network) if Path(network).expanduser().is_dir() else None


def _split(record: TrainingRecord | None, held_out: int | None, seed: int | None) -> dict[str, Any]:
    """Seed and number of the held-out images: those of the network's training, which it has not seen."""
    if record is None:
        return {"held_out": held_out, "seed": DEFAULT.seed if seed is None else seed}
    for option, given, trained in (("--held-out", held_out, record.held_out), ("--seed", seed, record.seed)):
        if given not in (None, trained):
            raise ValueError(
                f"{option} {given}: the network was trained with {trained}, so images that it was trained on would be "
                f"among the held-out ones; leave {option} out, or add --other-data to use them"
            )
    return {"held_out": record.held_out, "seed": record.seed}


def _unit(options: SearchOptions) -> str:
    return "mean cost" if options.max_time is None else "mean time"


def _show(report: SearchReport, options: SearchOptions) -> None:
    from ..zoo.placement import SCHEMES
    from . import render

    found, unit = report.found, _unit(options)
    echo(f"\n{len(report.candidates)} heads; final exit {report.final_accuracy:.2%} on held-out images\n")
    rows = [
        [str(place), kind, f"{threshold:.4g}", str(count)]
        for place, kind, threshold, count in zip(
            found.places, found.kinds, found.thresholds.thresholds, report.exits, strict=False
        )
    ]
    echo(render.table(["exit after", "head", "threshold", "images"], [*rows, ["final", "", "", str(report.exits[-1])]]))
    time = "" if report.mean_time is None else f", mean time {report.mean_time:.4f}"
    echo(
        f"\n{found.thresholds.criterion}: accuracy {found.thresholds.accuracy:.2%}, mean cost {report.mean_cost:.4f}"
        f"{time}, {report.parameters:,} parameters"
    )
    if report.test is not None:
        echo(
            f"test: accuracy {report.test['accuracy']:.2%}, final exit {report.test['final_accuracy']:.2%}, "
            f"mean cost {report.test['mean_cost']:.4f}"
        )
    echo(f"{_exactness(report)}\n")
    if report.schemes:
        tested = ["test accuracy", "test mean cost"] if report.schemes_test else []
        schemes = [_scheme(name, exits, report.schemes_test) for name, exits in report.schemes.items()]
        echo(render.table(["placement", unit, "accuracy", *tested, "exits after"], schemes))
        echo("the best number of exits of each scheme, within the same limit and by the same rule")
        absent = [name for name in SCHEMES if name not in report.schemes]
        echo(f"no exits of {', '.join(absent)} keep the limit\n" if absent else "")
    echo(render.table([unit, "accuracy", "rule", "exits"], map(_row, _thinned(report.front))))


def _exactness(report: SearchReport) -> str:
    compared = f"{report.subsets:,} subsets of exits compared under each rule"
    if report.all_thresholds:
        return f"{compared}: all, with all thresholds; none is better on these images"
    if report.all_subsets:
        return f"{compared}: all, at shared levels; then the thresholds of the best were searched exit by exit"
    return f"{compared}, by a local search; there may be a better one; fewer --kinds or --most-places allow to try all"


def _row(point: Exits) -> list[str]:
    same = len(set(point.kinds)) == 1  # then it is named once
    exits = " ".join(
        str(place) if same else f"{place}:{kind}" for place, kind in zip(point.places, point.kinds, strict=True)
    )
    exits += f" ({point.kinds[0]})" * same
    return [f"{point.thresholds.cost:.4f}", f"{point.thresholds.accuracy:.2%}", point.thresholds.criterion, exits]


def _scheme(name: str, exits: Exits, tested: dict[str, dict[str, float]]) -> list[str]:
    """A row of the table of schemes; tested: see `SearchReport.schemes_test`."""
    test = [f"{tested[name]['accuracy']:.2%}", f"{tested[name]['mean_cost']:.4f}"] if tested else []
    found = exits.thresholds
    return [name, f"{found.cost:.4f}", f"{found.accuracy:.2%}", *test, " ".join(map(str, exits.places))]


def _thinned(front: Sequence[Exits]) -> list[Exits]:
    if len(front) <= MOST_ROWS:
        return list(front)
    return [front[round(i * (len(front) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]


def _draw(report: SearchReport, path: Path, unit: str) -> None:
    from ..measure import figures
    from .pictures import canvas

    costs = [point.thresholds.cost for point in report.front]
    accuracies = [point.thresholds.accuracy for point in report.front]
    best = report.found.thresholds
    with canvas(path, 8, 5) as drawn:
        axes = drawn.subplots()
        figures.accuracy_against_cost(
            axes,
            {"best subset of exits": (costs, accuracies)},
            {"chosen": (best.cost, best.accuracy), "final exit": (1.0, report.final_accuracy)},
        )
        axes.set_xlabel(f"{unit} with heads (1 = network without exits)")
