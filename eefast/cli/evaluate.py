"""`eefast evaluate`: a network and test images → accuracy, cost and exits, per class, beside the reference."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from typer import Option

from . import inputs
from .options import BatchSize, DataRoot, Dataset, Device, Download, Images, Json, Network, OtherData, Split, Workers
from .output import ECE_WORDS, bars, counts, quality_table, say, table, words, write_json


def evaluate(
    network: Network,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    download: Download = False,
    split: Split = "test",
    other_data: OtherData = False,
    images: Images = None,
    engine: Annotated[str, Option(help="auto, resident, compact, reference.")] = "auto",
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    json_path: Json = "",
) -> None:
    """Measure accuracy, cost and exits, of the whole and of every class and exit, and compare with the reference."""
    from ..api import accelerate
    from ..data.image_files import shown
    from ..data.loading import batches
    from ..measure import environment
    from ..thresholds import evaluation
    from ..thresholds.outputs import collect, collect_answers

    inputs.check_folders(json_path)
    net, source = inputs.opened(network, dataset, data_root, download, workers, device, other_data)
    fast = accelerate(net, engine=engine)
    loader = batches(inputs.images(net, source, split, images), batch_size, workers)
    where = net.thresholds.device
    with bars() as progress:
        result, labels = collect_answers(fast, loader.reported(fast.plan.engine, progress), where)
        found = evaluation.evaluate(result, labels, net)
        reference, _ = collect_answers(net, loader.reported("reference", progress), where)
        outputs, _ = collect(net, loader.reported("asking every exit", progress))
    quality = evaluation.exit_quality(outputs, labels)
    flips = evaluation.count_flips(result, reference, outputs, net)
    if json_path != "-":
        say(f"\n{words(net)}, {found.images:,} images of {source.dataset} ({split})")
        say(f"criterion {net.criterion.name}, engine {fast.plan.engine}\n")
        furthest = f", at most {flips.distance:.1g} from a threshold" if flips.count else ""
        for what, figure in (
            ("accuracy", f"{found.accuracy:.2%}"),
            ("mean cost", f"{found.mean_cost:.4f}"),
            ("with every head on the way", f"{found.mean_path_cost:.4f}"),
            ("other exit than net.eval()", f"{flips.count:,} images{furthest}"),
        ):
            say(f"{what:28}{figure}")
        say()
        say(quality_table(net, quality, right=found.right, wrong=found.wrong))
        say(f"\n{ECE_WORDS}\n")
        known = [k for k, a in enumerate(found.class_accuracy) if a is not None]
        listed = known if len(known) <= 20 else sorted(known, key=lambda k: found.class_accuracy[k] or 0.0)[:20]
        names = (source.record.classes if source.record is not None else None) or range(net.num_classes)
        rows = [
            [
                shown(names[k]),
                f"{sum(found.class_exits[k]):,}",
                f"{found.class_accuracy[k]:.2%}",
                counts(found.class_exits[k]),
            ]
            for k in listed
        ]
        say(table(["class", "images", "accuracy", "images per exit"], rows))
        if len(listed) < len(known):
            say(f"the 20 least accurate of {len(known)} classes; --json has all")
    figures = {
        "network": str(network),
        "dataset": source.dataset,
        "split": split,
        "engine": fast.plan.engine,
        "criterion": net.criterion.name,
        "thresholds": net.thresholds.tolist(),
        "evaluation": asdict(found),
        "exits": [asdict(q) for q in quality],
        "flips": asdict(flips),
        "environment": environment.environment(),
    }
    write_json(json_path, figures)
