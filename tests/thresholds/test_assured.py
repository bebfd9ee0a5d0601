"""Bounds that hold on new data: how often they break over draws of a population whose drops and costs are known."""

import math
import re

import pytest
import torch
from made_outputs import looped, make_outputs

from eefast import ExitOutput, criteria
from eefast.thresholds import assured, calibration
from eefast.thresholds.betting import keeps
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.cuts import Cuts
from eefast.thresholds.path import accurate_to_cheap

COST = torch.tensor([0.2, 1.0])
FINAL = 0.9
BROKEN, FIXED = 0.5, 0.1


def drawn(count: int, random: torch.Generator) -> tuple[list[ExitOutput], torch.Tensor]:
    """One early exit with confidence u, uniform in 0 … 1, and a final exit that is right about nine of ten.

    With probability (1 - u)² · BROKEN the early exit is wrong where the final one is right, with (1 - u)² · FIXED right
    where that is wrong, if it is.
    """
    u, other, final = (torch.rand(count, generator=random) for _ in range(3))
    right = final < FINAL
    changed = other < (1 - u) ** 2 * torch.where(right, BROKEN / FINAL, FIXED / (1 - FINAL)).clamp(max=1)
    logits = torch.nn.functional.one_hot(torch.stack([right ^ changed, right]).long(), 2).float()
    z = torch.logit(u.double()).float()
    return [ExitOutput(part, torch.sigmoid(z), z) for part in logits], torch.ones(count, dtype=torch.int64)


def drop_and_cost(threshold: float) -> tuple[float, float, float]:
    """Of the whole population: the drop of accuracy below the final exit's, the mean cost, the other answers."""
    rest = (1 - min(max(threshold, 0), 1)) ** 3 / 3
    return (BROKEN - FIXED) * rest, 1 - 0.8 * (1 - min(max(threshold, 0), 1)), (BROKEN + FIXED) * rest


def is_broken(bounds: dict[str, float], threshold: float, labelled: bool) -> bool:
    drop, cost, others = drop_and_cost(threshold)
    drop = drop if labelled else others
    return (
        drop > bounds.get("max_accuracy_drop", 1)
        or cost > bounds.get("max_cost", 1)
        or FINAL - drop < bounds.get("min_accuracy", 0)
    )


def shares(count: int, draws: int, labelled: bool = True, **arguments) -> tuple[float, float]:
    """Of `draws` calibrations: the share whose thresholds break a bound, and the share that finds thresholds."""
    random = torch.Generator().manual_seed(0)
    bounds = {name: value for name, value in arguments.items() if name != "assurance"}
    broken = found = 0
    for _ in range(draws):
        outputs, labels = drawn(count, random)
        try:
            (threshold,) = calibrate(outputs, labels if labelled else None, COST, **arguments).thresholds
        except ValueError as error:
            if "samples do not show" not in str(error):
                raise
            continue
        found += 1
        broken += is_broken(bounds, threshold, labelled)
    return broken / draws, found / draws


@pytest.mark.parametrize("draws", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("bounds", "labelled", "assurance"),
    [
        ({"max_accuracy_drop": 0.04}, True, 0.8),
        ({"max_accuracy_drop": 0.04}, False, 0.8),
        ({"min_accuracy": 0.8}, True, 0.6),
        ({"max_cost": 0.6}, True, 0.6),
        ({"max_accuracy_drop": 0.06, "max_cost": 0.75}, True, 0.5),
    ],
    ids=["drop", "agreement", "accuracy", "cost", "both"],
)
def test_bounds_hold_in_as_many_draws_as_assured(bounds, labelled, assurance, draws) -> None:
    broken, found = shares(150, draws, labelled, assurance=assurance, **bounds)
    level = 1 - assurance
    assert broken <= level + 3 * math.sqrt(level * assurance / draws)
    assert found > 0.5


def test_without_an_assurance_every_second_draw_breaks_its_bound() -> None:
    broken, found = shares(150, 200, max_accuracy_drop=0.04)
    assert found == 1
    assert broken > 0.35


def test_more_samples_come_closer_to_the_bound() -> None:
    """The lowest cost within the bound is known: that of (1 - t)³ = 3 · drop / (BROKEN - FIXED)."""
    random, costs = torch.Generator().manual_seed(1), []
    for count in (200, 3000, 30000):
        found = calibrate(*drawn(count, random), COST, max_accuracy_drop=0.04, assurance=0.9)
        assert (found.assurance, found.judged_by) == (0.9, round(0.7 * count))
        costs.append(drop_and_cost(found.thresholds[0])[1])
    least = 1 - 0.8 * 0.3 ** (1 / 3)
    assert least < costs[-1] < least + 0.03
    assert costs[-1] < costs[1] < costs[0] + 0.03


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("bounds", [{"max_accuracy_drop": 0.1}, {"max_cost": 0.5}], ids=["drop", "cost"])
def test_accuracy_and_cost_are_those_of_all_samples(criterion: str, bounds: dict[str, float]) -> None:
    outputs, labels = make_outputs(501, 4, 0)
    cost = torch.tensor([0.1, 0.3, 0.6, 1.0])
    outputs[1].logits[3], outputs[1].confidence_logit[3] = math.nan, math.nan
    found = calibrate(outputs, labels, cost, criterion, assurance=0.9, **bounds)
    assert (found.accuracy, found.cost) == pytest.approx(looped(outputs, labels, cost, criterion, found.thresholds))
    assert found == calibrate(outputs, labels, cost, criterion, assurance=0.9, **bounds)
    assert found.cost < 1


def test_judges_lay_no_path(monkeypatch) -> None:
    """No threshold is one that a judging sample alone would give."""
    outputs, labels = make_outputs(501, 3, 0)
    seen = []
    made = assured.Cuts

    def watched(outputs, labels, *rest):
        seen.append(outputs[0].confidence_logit)
        return made(outputs, labels, *rest)

    monkeypatch.setattr(assured, "Cuts", watched)
    kept = []

    def keeps(loss, bound, level, highest, before, least_spread, count):
        kept.append((loss.shape[1], before.shape[1], count))
        return torch.full((len(loss),), loss.shape[1] == count)

    monkeypatch.setattr(assured.betting, "keeps", keeps)
    calibrate(outputs, labels, torch.tensor([0.2, 0.5, 1.0]), max_accuracy_drop=0.1, assurance=0.9)
    assert [len(z) for z in seen] == [150]
    assert set(kept) == {(100, 150, 351), (351, 150, 351)}


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_accuracy_drop": 0.03},
        {"min_accuracy": 0.6},
        {"max_cost": 0.5},
        {"max_accuracy_drop": 0.1, "max_cost": 0.9},
    ],
    ids=["drop", "accuracy", "cost", "both"],
)
@pytest.mark.parametrize("count", [301, 603])
@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.sampled(4)
def test_thresholds_are_those_of_a_walk_one_step_after_the_other(bounds, count: int, exits: int) -> None:
    """Every step judged alone, on all samples that judge, from losses that are looked up sample by sample."""
    outputs, labels = make_outputs(count, exits + 1, 1)
    cost = torch.linspace(0.2, 1, exits + 1).double()
    lay, judge = assured.divided(count)
    parts = [ExitOutput(*(part[lay] for part in out)) for out in outputs]
    points = accurate_to_cheap(Cuts(parts, labels[lay], cost, "margin"), criteria.get("margin"))
    values = [criteria.margin(out.logits, out.confidence_logit).tolist() for out in outputs[:-1]]
    right = [(out.logits.argmax(dim=1) == labels).tolist() for out in outputs]

    def losses(step: list[float], name: str, samples: torch.Tensor) -> torch.Tensor:
        found = []
        for k in samples.tolist():
            taken = next((i for i, t in enumerate(step) if values[i][k] > t), exits)
            loss = {"max_cost": float(cost[taken]), "min_accuracy": 1 - right[taken][k]}
            found.append(loss.get(name, right[-1][k] - right[taken][k]))
        return torch.tensor([found], dtype=torch.float64)

    kept = []
    for name, value in bounds.items():
        steps = list(enumerate(points.tolist()))
        limit, passed = 1 - value if name == "min_accuracy" else value, []
        for at, step in reversed(steps) if name == "max_cost" else steps:
            spread = 0.0 if name == "max_cost" else limit * (1 - limit)
            before, loss = losses(step, name, lay), losses(step, name, judge)
            certain = name == "max_accuracy_drop" and at == 0
            if not certain and not keeps(loss, limit, 0.1 / len(bounds), 1.0, before, spread):
                break
            passed.append(at)
        kept.append(passed)
    both = set.intersection(*map(set, kept))
    expected = points[min(both) if list(bounds) == ["max_cost"] else max(both)]
    assert 0 < len(both) < len(points)
    found = calibrate(outputs, labels, cost, "margin", assurance=0.9, **bounds)
    assert found.thresholds == tuple(expected.tolist())


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (31, {"max_accuracy_drop": 0.005}, r"31 samples are too few for assurance=0\.9; give at least 730"),
        (99, {"max_cost": 0.5}, r"99 samples are too few for assurance=0\.9; give at least 100"),
        (31, {"max_accuracy_drop": 0.0}, "give at least 100"),
        (200, {"max_accuracy_drop": 0.005}, r"max_accuracy_drop=0\.005: 140 of the 200 samples do not show with as.*"),
        (200, {"min_accuracy": 0.99}, "the nearest have accuracy .* outside it however many samples judge"),
        (200, {"max_cost": 0.1}, r"max_cost=0\.1: .* at mean cost 0\.2000, outside it however many"),
        (200, {"max_accuracy_drop": 0.02, "max_cost": 0.3}, "max_accuracy_drop=0.02, max_cost=0.3: 140 of the 200"),
        (200, {"max_cost": 0.5, "assurance": 1.0}, r"assurance=1\.0 must be above 0 and below 1"),
        (200, {"max_cost": 0.5, "assurance": 0.0}, r"assurance=0\.0 must be above 0 and below 1"),
        (200, {"max_cost": 0.5, "assurance": math.nan}, "assurance=nan must be above 0 and below 1"),
        (200, {"max_accuracy_drop": 1.5}, r"max_accuracy_drop=1\.5 must be in 0 … 1"),
        (200, {"max_accuracy_drop": 0.1, "min_accuracy": 0.5}, "both bound the accuracy; give one of them"),
        (200, {}, "no bound is given"),
    ],
)
def test_what_cannot_be_assured_is_refused(count: int, arguments: dict[str, float], message: str) -> None:
    outputs, labels = drawn(count, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        calibrate(outputs, labels, COST, **{"assurance": 0.9, **arguments})


def test_the_number_in_the_refusal_is_about_enough() -> None:
    random = torch.Generator().manual_seed(2)
    bound = {"max_accuracy_drop": 0.01, "assurance": 0.9}
    with pytest.raises(ValueError, match=r"about .* samples would have been enough") as refused:
        calibrate(*drawn(200, random), COST, **bound)
    enough = int(re.search(r"about ([\d,]+) samples", str(refused.value))[1].replace(",", ""))
    assert 300 < enough < 3000
    found = [calibrate(*drawn(2 * enough, random), COST, **bound) for _ in range(10)]
    assert all(f.cost < 1 for f in found)


@pytest.mark.parametrize(("drop", "assurance", "images"), [(0.005, 0.9, 730), (0.05, 0.9, 100), (0.001, 0.5, 1100)])
def test_how_many_images_an_assurance_needs(drop: float, assurance: float, images: int) -> None:
    assert calibration.least_images(drop, assurance) == images
