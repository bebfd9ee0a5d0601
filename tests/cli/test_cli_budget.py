"""Budgets: one bound or the default, the best thresholds of each criterion within it, a reason for each without any."""

import math
from types import SimpleNamespace

import pytest
import torch
from made_outputs import make_outputs

from eefast import criteria
from eefast.cli import budget
from eefast.thresholds import assured
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.candidates import Candidate, make_candidate
from eefast.thresholds.outputs import some

COST = torch.tensor([0.2, 0.5, 1.0])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"min_accuracy": None, "max_cost": None}, ("max_accuracy_drop", 0.005)),
        ({"min_accuracy": None, "max_cost": 0.7}, ("max_cost", 0.7)),
        ({"min_accuracy": 0.0}, ("min_accuracy", 0.0)),
        ({"max_accuracy_drop": 1.0}, ("max_accuracy_drop", 1.0)),
    ],
)
def test_one_bound_or_the_default_is_the_budget(given, expected):
    assert budget.read_budget(**given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_accuracy": 0.5, "max_cost": 0.0}, r"min_accuracy=0.5, max_cost=0.0: give one of them"),
        ({"max_cost": 1.5}, r"max_cost=1.5 must be in 0 … 1"),
        ({"min_accuracy": -0.1}, r"min_accuracy=-0.1 must be in 0 … 1"),
        ({"max_accuracy_drop": math.nan}, r"max_accuracy_drop=nan must be in 0 … 1"),
    ],
)
def test_other_budgets_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        budget.read_budget(**given)


def test_a_bound_on_accuracy_and_one_on_cost_go_together():
    both = {"max_accuracy_drop": 0.1, "max_cost": 0.5}
    assert budget.read_bounds(min_accuracy=None, **both) == both
    assert budget.read_bounds(max_cost=None) == {"max_accuracy_drop": 0.005}
    with pytest.raises(ValueError, match=r"min_accuracy=0.5, max_accuracy_drop=0.1: give one of them for the accuracy"):
        budget.read_bounds(min_accuracy=0.5, max_accuracy_drop=0.1)


def test_profiles_have_bounds_and_maybe_an_assurance():
    found = budget.read_profiles(["normal:drop=0.005,cost=0.3@0.9", "eco:cost=0.1", "sure:accuracy=0.5@.5"])
    assert found == {
        "normal": ({"max_accuracy_drop": 0.005, "max_cost": 0.3}, 0.9),
        "eco": ({"max_cost": 0.1}, None),
        "sure": ({"min_accuracy": 0.5}, 0.5),
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["eco"], "--profile eco: give NAME:BOUND=VALUE"),
        (["eco:speed=1"], "--profile eco:speed=1: give NAME:BOUND=VALUE"),
        (["eco:cost=0.1@"], "--profile eco:cost=0.1@: give NAME:BOUND=VALUE"),
        (["eco:cost=0.1@1"], "the assurance must be above 0 and below 1"),
        ([":cost=0.1"], "give each profile a name of its own"),
        (["eco:cost=0.1", "eco:cost=0.2"], "give each profile a name of its own"),
        (["eco:cost=1.5"], r"max_cost=1\.5 must be in 0 … 1"),
        (["eco:drop=0.1,accuracy=0.5"], "give one of them for the accuracy"),
    ],
)
def test_other_profiles_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        budget.read_profiles(texts)


@pytest.mark.parametrize(
    ("name", "expected"), [("all", list(criteria.CRITERIA)), ("margin", ["margin"]), ("", ["entropy"])]
)
def test_criteria_are_all_the_named_one_or_that_of_the_network(name, expected):
    net = SimpleNamespace(criterion=criteria.get("entropy"), exit_rule="entropy")
    assert budget.criterion_names(name, net) == expected


def test_all_that_can_be_fitted_and_no_numbers_that_a_network_lacks():
    net = SimpleNamespace(criterion=criteria.get("entropy"), exit_rule="entropy")
    assert budget.criterion_names("all", net, fitting=True) == [*criteria.CRITERIA, *criteria.CARRYING]
    assert budget.criterion_names("vote", net, fitting=True) == ["vote"]
    with pytest.raises(ValueError, match="criterion='vote': this network has no numbers for it"):
        budget.criterion_names("vote", net)


@pytest.mark.parametrize("assurance", [None, 0.9])
def test_images_that_judge_do_not_fit(assurance):
    outputs, labels = make_outputs(130, 3, 0)
    net = SimpleNamespace(criterion=criteria.get("entropy"), exit_rule="entropy")
    names = ["margin", "carried", "fitted", "vote"]
    found, impossible = budget.fit_candidates(net, outputs, labels, names, True, assurance)
    fitting = torch.arange(130) if assurance is None else assured.divided(130)[0]
    expected = {name: make_candidate(name, some(outputs, fitting), labels[fitting]) for name in names}
    assert (found, impossible) == (expected, {})


def test_what_cannot_be_fitted_has_a_reason():
    outputs, labels = make_outputs(31, 3, 0)
    net = SimpleNamespace(criterion=criteria.get("entropy"), exit_rule="entropy")
    arguments = net, outputs, torch.zeros_like(labels)
    found, impossible = budget.fit_candidates(*arguments, ["margin", "carried"], True, None)
    assert list(found) == ["margin"]
    assert "31 samples of 1 classes" in impossible["carried"]
    with pytest.raises(ValueError, match=r"^carried: .* 31 samples of 1 classes"):
        budget.fit_candidates(*arguments, ["carried"], True, None)
    with pytest.raises(ValueError, match=r"^carried: .*this network has no numbers"):
        budget.fit_candidates(*arguments, ["carried"], False, None)


def test_an_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match="criterion='best' is unknown"):
        budget.criterion_names("best", SimpleNamespace(criterion=criteria.get("entropy"), exit_rule="entropy"))


@pytest.mark.parametrize(
    ("bounds", "assurance", "images"),
    [
        ({}, None, 100), ({"max_accuracy_drop": 0.005}, None, 200), ({"max_cost": 0.005}, None, 100),
        ({"max_accuracy_drop": 0.005, "max_cost": 0.5}, 0.9, 730), ({"max_cost": 0.005}, 0.9, 100),
    ],
)  # fmt: skip
def test_only_a_drop_of_accuracy_needs_more_images(bounds, assurance, images):
    assert budget.least_images(bounds, assurance) == images


@pytest.mark.parametrize(("kind", "value"), [("max_cost", 0.4), ("min_accuracy", 0.8), ("max_accuracy_drop", 0.1)])
def test_each_criterion_gets_its_best_thresholds(kind, value):
    outputs, labels = make_outputs(67, 3, 0)
    steps = []
    chosen, impossible = budget.choose_thresholds(
        SimpleNamespace(cost=COST),
        outputs,
        labels,
        {name: Candidate(name) for name in ("margin", "learned")},
        {kind: value},
        lambda *step: steps.append(step),
    )
    assert chosen == {name: calibrate(outputs, labels, COST, name, **{kind: value}) for name in ("margin", "learned")}
    assert impossible == {}
    assert steps == [("choosing thresholds", done, 2) for done in range(3)]


def test_a_criterion_without_thresholds_has_a_reason():
    outputs, labels = make_outputs(31, 3, 0)
    outputs[0].confidence_logit[:] = math.nan
    arguments = SimpleNamespace(cost=COST), outputs, labels
    chosen, impossible = budget.choose_thresholds(
        *arguments, {name: Candidate(name) for name in ("learned", "margin")}, {"max_cost": 0.4}, lambda *step: None
    )
    assert list(chosen) == ["margin"]
    assert list(impossible) == ["learned"]
    assert "no confidence that is a number" in impossible["learned"]
    candidates = {name: Candidate(name) for name in ("margin", "learned")}
    with pytest.raises(ValueError, match=r"^margin: max_cost=0\.1 cannot be kept; .*; learned: .* no confidence"):
        budget.choose_thresholds(*arguments, candidates, {"max_cost": 0.1}, lambda *step: None)
