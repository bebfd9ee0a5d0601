"""`eefast evaluate`: a network and test images → accuracy, cost and exits, per class, compared with the reference."""

from __future__ import annotations

from dataclasses import asdict

from . import render
from .inputs import load_images, open_network
from .options import (
    BatchSize,
    DataRoot,
    Dataset,
    Device,
    Download,
    Engine,
    Images,
    Json,
    Network,
    OtherData,
    Split,
    Stages,
    Workers,
)
from .output import bars, check_writable, echo, next_step, write_json


def command(
    network: Network,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    download: Download = False,
    split: Split = "test",
    other_data: OtherData = False,
    images: Images = None,
    engine: Engine = "auto",
    stages: Stages = "auto",
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    json_path: Json = "",
) -> None:
    """Measure accuracy, cost and exits, over all images, per class and per exit, and compare with the reference."""
    from ..api import accelerate
    from ..data.loaders import batches
    from ..measure import environment
    from ..thresholds import evaluation
    from ..thresholds.outputs import collect, collect_answers

    check_writable(json_path)
    net, source = open_network(network, dataset, data_root, download, workers, device, other_data)
    fast = accelerate(net, engine=engine, stages=stages)
    loader = batches(load_images(net, source, split, images), batch_size, workers)
    where = net.thresholds.device
    with bars() as progress:
        result, labels = collect_answers(fast, loader.reported(fast.plan.engine, progress), where)
        found = evaluation.evaluate(result, labels, net)
        reference, _ = collect_answers(net, loader.reported("reference", progress), where)
        outputs, _ = collect(net, loader.reported("running every exit", progress))
    quality = evaluation.exit_quality(outputs, labels)
    flips = evaluation.count_flips(result, reference, outputs, net)
    if json_path != "-":
        echo(f"\n{render.describe(net)}, {found.images:,} images of {source.dataset} ({split})")
        echo(f"criterion {net.criterion.name}, engine {fast.plan.engine}\n")
        for line in render.evaluation_parts(found, flips):
            echo(line)
        echo()
        echo(render.quality_table(net, quality, right=found.right, wrong=found.wrong))
        echo(f"\n{render.ECE_LEGEND}\n")
        classes = source.record.classes if source.record is not None else None
        for part in render.class_parts(found, classes or range(net.num_classes)):
            echo(part)
        next_step(f"eefast plot {network}, eefast bench {network}")
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
        "environment": environment.inspect_environment(),
    }
    write_json(json_path, figures)
