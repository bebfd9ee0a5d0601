"""`eefast calibrate`: a network and held-out training images → thresholds under a budget, criteria compared."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from typer import Option

from . import render
from .budget import (
    choose_thresholds,
    criterion_names,
    fit_candidates,
    fitting_part,
    least_images,
    read_bounds,
    read_profiles,
)
from .held_out import HeldOutImages
from .inputs import check_saving, open_network
from .options import (
    ASSURANCE,
    AnyCriterionName,
    Assurance,
    BatchSize,
    Cache,
    DataRoot,
    Dataset,
    Device,
    Download,
    FewImages,
    HeldOut,
    Json,
    MaxAccuracyDrop,
    MaxCost,
    MinAccuracy,
    Network,
    NoAssurance,
    OtherData,
    ProfileTexts,
    Seed,
    Workers,
)
from .output import bars, check_writable, echo, next_step, note, write_json


def command(
    network: Network,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    download: Download = False,
    min_accuracy: MinAccuracy = None,
    max_accuracy_drop: MaxAccuracyDrop = None,
    max_cost: MaxCost = None,
    assurance: Assurance = None,
    no_assurance: NoAssurance = False,
    agreement: Annotated[
        bool, Option("--agreement", help="For accuracy take the share of images answered as by the final exit.")
    ] = False,
    profile: ProfileTexts = None,
    drop_exits: Annotated[
        bool,
        Option("--drop-exits", help="Count heads in the cost, and leave out early exits that do not pay for theirs."),
    ] = False,
    cost: Annotated[
        str, Option(help="What an exit costs: macs, or time, measured here in batches of --batch-size.")
    ] = "macs",
    criterion: AnyCriterionName = "",
    scale: Annotated[
        bool, Option(help="First fit temperatures, and the confidence row, per exit; --save saves them too.")
    ] = False,
    save: Annotated[bool, Option(help="Write criterion and thresholds into the network's folder.")] = False,
    held_out: HeldOut = None,
    seed: Seed = None,
    other_data: OtherData = False,
    few_images: FewImages = False,
    cache: Cache = None,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    json_path: Json = "",
) -> None:
    """Choose thresholds under a budget on held-out training images, and compare criteria on the same network.

    With --max-cost beside a budget of accuracy the thresholds keep both. "carried" and "fitted" are fitted first, and
    "vote" gets its weights; with an assurance on the images that do not judge.
    """
    from .. import criteria
    from ..measure import environment, time_costs
    from ..thresholds import calibration, comparing, dropping, evaluation, scaling
    from ..thresholds.candidates import candidate_of
    from ..thresholds.outputs import exits_taken

    bounds = read_bounds(min_accuracy=min_accuracy, max_accuracy_drop=max_accuracy_drop, max_cost=max_cost)
    if no_assurance and assurance is not None:
        raise ValueError(f"--assurance {assurance:g} and --no-assurance exclude each other; leave one of them out")
    wanted = None if no_assurance else ASSURANCE if assurance is None else assurance
    calibration.check_bounds(bounds, wanted)
    rows = read_profiles(profile or ())
    if cost not in ("macs", "time"):
        raise ValueError(f"cost={cost!r} is unknown; choose macs or time")
    if cost == "time" and drop_exits:
        raise ValueError("--drop-exits counts MACs; leave out --cost time, and run calibrate again with it")
    check_saving(network, save)
    check_writable(json_path, cache)
    net, source = open_network(network, dataset, data_root, download, workers, device, other_data)
    names = criterion_names(criterion, net, fitting=True)
    if drop_exits and criteria.get(names[0]).carries:
        raise ValueError(
            f"--drop-exits: criterion={names[0]!r} reads the exits before; leave exits out by another criterion, then "
            "run calibrate again for this one"
        )
    if drop_exits and (scale or len(names) > 1 or profile):
        raise ValueError("--drop-exits takes one criterion, no --scale and no --profile; run calibrate again for these")
    if drop_exits and names[0] != net.criterion.name:
        net = net.with_criterion(names[0])  # a rule that reads the exits before could not lose any
    if save:
        net.check_saving()
        if drop_exits and net.num_exits > 1:
            net.without_exits([0]).check_saving()
    if scale or (save and criterion and "carried" in (names if len(names) == 1 else [net.criterion.name])):
        scaling.scalable_layers(net)
    kept = HeldOutImages(source, held_out, seed, None if few_images else least_images(bounds, wanted))
    in_time = None
    if cost == "time":
        # What the images show makes no difference to the time.
        in_time = time_costs.measured(net, net.cost.new_zeros(batch_size, *net.input_shape).normal_())
        net.cost.copy_(net.cost.new_tensor(in_time.cost))  # of this run; no network is saved with it
    with bars() as progress:
        outputs, labels = kept.outputs(net, cache, batch_size, progress)
        raw = evaluation.exit_quality(outputs, labels)
        fitted = scaling.fit_scaling(*fitting_part(outputs, labels, wanted)) if scale else None
        if fitted is not None:
            outputs = scaling.scaled(outputs, fitted)
        answers = None if agreement else labels
        left_out: tuple[int, ...] = ()
        targets = outputs[-1].logits.argmax(dim=1) if agreement else labels
        candidates, impossible = fit_candidates(net, outputs, targets, names, fit=bool(criterion), assurance=wanted)
        chosen: dict[str, calibration.Calibration] = {}
        if drop_exits:
            left_out, chosen[names[0]] = dropping.find_thresholds_and_exits(
                outputs, answers, net.stage_costs, names[0], **bounds, assurance=wanted
            )
            net = net.without_exits(left_out)
            outputs = [out for i, out in enumerate(outputs) if i not in left_out]
            candidates = {names[0]: candidate_of(net, names[0])}
            raw = evaluation.exit_quality(outputs, labels)
        else:
            chosen, more = choose_thresholds(net, outputs, answers, candidates, bounds, progress, wanted)
            impossible |= more
        saved = calibration.saved_criterion(net, chosen)
        kept_by, profiles = {saved: candidates[saved]}, {}
        for name, (within, assured) in rows.items():
            try:
                found, _ = choose_thresholds(net, outputs, answers, kept_by, within, progress, assured)
            except ValueError as error:
                raise ValueError(f"profile {name}: {error}") from error
            profiles[name] = found[saved]
        compared: dict[str, comparing.Comparison] = {}
        at = chosen[comparing.BASE if comparing.BASE in chosen else saved].cost
        if len(names) > 1 or (criterion and criteria.get(names[0]).carries):
            known = [name for name in names if name in candidates]
            compared = comparing.compare(outputs, targets, net.cost, known, at, progress=progress)
    exits = {}
    for name, c in chosen.items():
        taken = exits_taken(candidates[name].outputs(outputs), criteria.get(name), c.thresholds)
        exits[name] = taken.bincount(minlength=net.num_exits + 1).tolist()
    quality = evaluation.exit_quality(outputs, labels)
    if save:
        before = list(net.profiles)
        if fitted is not None:
            scaling.fold_scaling(net, fitted)
            net.profiles = None  # of other confidences
        written = calibration.save_thresholds(net, network, chosen, profiles, candidates)
        if gone := [name for name in before if name not in written.profiles]:
            note(f"profiles of other confidences are left out: {', '.join(gone)}; make them again by --profile")
    if json_path != "-":
        budget = ", ".join(f"{name} {value:g}" for name, value in bounds.items())
        echo(f"\n{render.describe(net)}, {len(labels):,} held-out images of {source.dataset}, {budget}\n")
        for part in render.calibration_parts(chosen, exits, impossible):
            echo(part)
        echo(f"\n{render.assurance(chosen)}\n")
        if compared:
            echo(render.comparison_table(compared))
            echo(f"\n{render.winner(compared, at)}\n")
        if in_time is not None:
            costs = ", ".join(f"{c:.3f}" for c in in_time.cost)
            of = f"÷ the plain network's, {in_time.way}, batch {in_time.batch_size}"
            echo(f"costs are times to the exits {of}: {costs}\n")
        if drop_exits:
            echo(f"costs with heads; exits left out: {', '.join(map(str, left_out)) or 'none'}\n")
        if profiles:
            echo(render.profile_table(profiles))
            echo()
        echo(render.quality_table(net, quality, before=raw if scale else None, scaling=fitted))
        echo(f"\n{render.ECE_LEGEND}")
        if save:
            echo(f"\nsaved: {network}")
            next_step(f"eefast evaluate {network}")
        else:
            next_step("nothing was saved; --save writes these thresholds into the network's folder")
    figures = {
        "network": str(network),
        "dataset": source.dataset,
        "held_out": len(labels),
        "seed": kept.seed,
        "bound": bounds,
        "assurance": wanted,
        "agreement": agreement,
        "chosen": {name: {**asdict(c), "exits": exits[name]} for name, c in chosen.items()},
        "impossible": impossible,
        "left_out": left_out,
        "compared": {name: asdict(c) for name, c in compared.items()},
        "compared_at": at,
        "time_costs": asdict(in_time) if in_time is not None else None,
        "profiles": {name: asdict(c) for name, c in profiles.items()},
        "exits": [asdict(q) for q in quality],
        "exits_before_scaling": [asdict(q) for q in raw] if scale else None,
        "scaling": asdict(fitted) if fitted is not None else None,
        "environment": environment.inspect_environment(),
    }
    write_json(json_path, figures)
