"""Goals and smaller plain networks: accuracy at a cost by hand, verdicts, leads between points."""

from __future__ import annotations

from typing import Any

import pytest
import training_goals

CURVE = ((0.80, 0.15), (0.88, 0.31), (0.91, 0.44), (0.93, 0.80))
AROUND = {"device": "some CPU", "date": "2026-01-01"}


def row_of(**changed: Any) -> dict[str, Any]:
    row = {
        "training": "CIFAR-10 (JPEG copy)", "model": "eenet32", "criterion": "margin", "curve": CURVE,
        "twin_accuracy": 0.9349, "macs": 100, "environment": AROUND, "options": {"seed": 1},
    }  # fmt: skip
    return {**row, **changed}


def plain(name: str, macs: int, accuracy: float, **changed: Any) -> dict[str, Any]:
    row = {"plain": name, "trained_on": "CIFAR-10 (JPEG copy)", "macs": macs, "accuracy": accuracy, "options": {}}
    return {**row, "environment": AROUND, **changed}


@pytest.mark.parametrize(
    ("cost", "expected"), [(0.1, None), (0.15, 0.80), (0.3, 0.80), (0.31, 0.88), (0.45, 0.91), (1.0, 0.93)]
)
def test_accuracy_within_a_cost(cost: float, expected: float | None) -> None:
    assert training_goals.accuracy_at(CURVE, cost) == expected


@pytest.mark.parametrize(("twin", "verdict"), [(0.915, "reached"), (0.9151, "**not reached**")])
def test_a_goal_is_reached_up_to_what_may_be_lost(twin: float, verdict: str) -> None:
    lines = training_goals.goal_table([row_of(twin_accuracy=twin)])
    assert lines[2] == (
        f"| eenet32 on CIFAR-10 (JPEG copy) | margin | {100 * (twin - 0.91):.2f} | – | ≤ 0.5 at ≤ 0.45 | {verdict} |"
    )
    assert lines[3].endswith("| **not reached** |")


def test_no_thresholds_within_the_cost_is_not_reached() -> None:
    lines = training_goals.goal_table([row_of(training="mnist", curve=((0.99, 0.2),))])
    assert lines[2:] == ["| eenet32 on mnist | margin | – | – | ≤ 0.2 at ≤ 0.12 | **not reached** |"]
    assert training_goals.goal_table([row_of(training="svhn")]) == []


@pytest.mark.parametrize(("cost", "verdict"), [(0.299, "reached"), (0.301, "**not reached**")])
def test_thresholds_that_were_chosen_for_a_goal_are_judged(cost: float, verdict: str) -> None:
    point = {"accuracy": 0.92, "cost": cost}
    row = row_of(at_goals=[[0.30, point]], allowed_cost=0.45, at_cost={"accuracy": 0.93, "cost": 0.44})
    assert training_goals.goal_table([row])[2:] == [
        "| eenet32 on CIFAR-10 (JPEG copy) | margin | 0.49 | 0.440 | ≤ 0.5 at ≤ 0.45 | reached |",
        f"| eenet32 on CIFAR-10 (JPEG copy) | margin | 1.49 | {cost:.3f} | ≤ 1.5 at ≤ 0.30 | {verdict} |",
    ]


def test_plain_networks_are_the_newest_of_the_same_device_and_data() -> None:
    rows = [
        plain("resnet20", 59, 0.5),
        plain("resnet20", 59, 0.9),
        plain("resnet8", 18, 0.8),
        plain("resnet14", 38, 0.1, trained_on="mnist"),
        plain("resnet14", 38, 0.1, environment={"device": "another", "date": "2026-01-01"}),
        row_of(),
    ]
    found = training_goals.plain_points(rows, row_of())
    assert found == {"resnet8": (0.18, 0.8), "resnet20": (0.59, 0.9)}
    assert list(found) == ["resnet8", "resnet20"], "the cheapest first"
    older = {name: value for name, value in row_of().items() if name != "macs"}
    assert training_goals.plain_points(rows, older) == {}


def test_plain_networks_of_the_same_seed_where_there_are_some() -> None:
    rows = [plain("resnet8", 18, 0.8), plain("resnet8", 18, 0.7, options={"seed": 2}), plain("resnet14", 38, 0.9)]
    by_seed = {seed: training_goals.plain_points(rows, row_of(options={"seed": seed})) for seed in (1, 2, 3)}
    assert by_seed[1] == {"resnet8": (0.18, 0.8), "resnet14": (0.38, 0.9)}
    assert by_seed[2] == {"resnet8": (0.18, 0.7)}
    assert by_seed[3].keys() == by_seed[1].keys()


def test_smallest_lead_between_two_plain_networks() -> None:
    # At cost 0.31 the line from (0.2, 0.82) to (0.42, 0.9) is at 0.86, at cost 0.44 the next one at 0.902.
    points = [(0.2, 0.82), (0.42, 0.90), (0.52, 0.91), (1.0, 0.99)]
    lead, cost = training_goals.advantage(CURVE, points)
    assert (lead, cost) == (pytest.approx(0.91 - 0.902), 0.44)
    assert training_goals.advantage(CURVE, points[:1]) is None
    taught = [(0.42, 0.80), *points[1:]]
    assert training_goals.advantage(CURVE, [points[0], *taught]) == (lead, cost), "of two at a cost the better one"
    assert training_goals.advantage(((0.5, 0.7),), [(0.6, 0.8), (1.0, 0.9)]) is None, "costs above 0.6 do not count"


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.80, ": above them everywhere"), (0.95, ": **not above** them")])
def test_page_compares_at_the_cost_of_the_plain_network(accuracy: float, verdict: str) -> None:
    lines = training_goals.plain_table(row_of(), {"resnet14": (0.385, accuracy)})
    assert lines[2] == f"| resnet14 | 0.385 | {100 * accuracy:.2f} | 88.00 | {100 * (0.88 - accuracy):+.2f} |"
    assert verdict in lines[4]
    assert training_goals.plain_table(row_of(), {}) == []
