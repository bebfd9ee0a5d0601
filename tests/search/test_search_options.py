"""Options of a search: what is refused, and what may differ in a run that is resumed."""

import pytest

from eefast.search.options import SearchOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no limit is given; give max_cost, max_time or max_parameters"),
        ({"max_cost": 0.1, "max_time": 0.1}, "max_cost=0.1, max_time=0.1: give one of them"),
        ({"max_cost": 0.0}, "max_cost=0.0 must be above 0"),
        ({"max_time": float("nan")}, "max_time=nan must be above 0"),
        ({"max_cost": 0.1, "kinds": ()}, r"kinds=\[\]: give different kinds of heads, of pool"),
        ({"max_cost": 0.1, "kinds": ("pool", "pool")}, "give different kinds"),
        ({"max_cost": 0.1, "kinds": ("pool", "softmax")}, "give different kinds"),
        ({"max_cost": 0.1, "criteria": ()}, r"criteria=\[\]: give at least one of learned"),
        ({"max_cost": 0.1, "criteria": ("sure",)}, "criterion='sure' is unknown"),
        (
            {"max_cost": 0.1, "criteria": ("margin", "patience")},
            r"'patience' reads earlier exits, .* search by",
        ),
        ({"max_cost": 0.1, "criteria": ("carried",)}, "then eefast calibrate --criterion carried"),
        ({"max_cost": 0.1, "loss": "v4"}, "loss='v4': a search trains heads by labels and by the final exit"),
        ({"max_cost": 0.1, "loss": "v0+taught"}, "loss='v0.taught': a search trains heads by labels"),
        ({"max_cost": 0.1, "loss": "final_supervision"}, "take terms such as deep_supervision, correctness"),
        ({"max_cost": 0.1, "teacher": "runs/a"}, "teacher='runs/a': the final exit teaches here"),
        ({"max_cost": 0.1, "most_places": 0}, "most_places=0 must be above 0"),
        ({"max_cost": 0.1, "epochs": 0}, "epochs=0 must be at least 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


def test_other_limits_and_rules_are_the_same_run():
    before = SearchOptions(network="runs/a", max_cost=0.1).record()
    SearchOptions(network="elsewhere/a", max_time=0.2, max_parameters=10**6, criteria=("margin",)).check_same_run(
        before
    )
    for changed in ({"kinds": ("pool",)}, {"network": "runs/b"}, {"epochs": 5}, {"freeze_backbone": False}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))}=.*, but the run to resume has"):
            SearchOptions(**{"network": "runs/a", "max_cost": 0.1, **changed}).check_same_run(before)
