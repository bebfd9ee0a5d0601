"""Results as lines and tables."""

import re
from io import StringIO

import pytest
from rich.console import Console

from eefast.cli import render
from eefast.thresholds.calibration import Calibration
from eefast.thresholds.comparing import Comparison
from eefast.thresholds.evaluation import Evaluation, Flips


def printed(parts) -> list[str]:
    """Their lines, each with single spaces."""
    console = Console(file=StringIO(), width=200)
    for part in parts:
        console.print(part)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def evaluation(accuracies) -> Evaluation:
    return Evaluation(
        images=7,
        accuracy=0.5,
        mean_cost=0.25,
        mean_path_cost=0.3,
        right=(1, 2),
        wrong=(3, 1),
        class_accuracy=tuple(accuracies),
        class_exits=tuple((i, 1) for i in range(len(accuracies))),
    )


def test_classes_without_images_have_no_row():
    lines = printed(render.class_parts(evaluation([0.5, None, 1.0]), ["a", "b", "c\n"]))
    assert lines == ["class images accuracy images per exit", "a 1 50.00% 0 1", r"c\n 3 100.00% 2 1"]


@pytest.mark.parametrize("classes", [20, 21])
def test_of_many_classes_the_least_accurate_have_a_row(classes):
    accuracies = [(classes - i) / classes for i in range(classes)]
    _, *lines = printed(render.class_parts(evaluation(accuracies), range(classes)))
    numbers = [int(line.split()[0]) for line in lines[:20]]
    assert numbers == (list(range(20)) if classes == 20 else list(range(20, 0, -1)))
    assert lines[20:] == ([] if classes == 20 else ["the 20 least accurate of 21 classes; --json has all"])


def test_criteria_without_thresholds_have_a_line():
    chosen = {"margin": Calibration("margin", (0.5,), 0.75, 0.125)}
    lines = printed(render.calibration_parts(chosen, {"margin": [3, 4]}, {"entropy": "max_cost=0.1 cannot be kept"}))
    assert lines[1:] == ["margin 75.00% 0.1250 3 4", "entropy: max_cost=0.1 cannot be kept"]


@pytest.mark.parametrize(
    ("flips", "text"), [(Flips(0, 0.0), "0 images"), (Flips(2, 1e-6), "2 images, at most 1e-06 from a threshold")]
)
def test_flips_are_given_with_their_distance(flips, text):
    lines = printed(render.evaluation_parts(evaluation([0.5]), flips))
    assert lines[:3] == ["accuracy 50.00%", "mean cost 0.2500", "including heads passed 0.3000"]
    assert lines[3] == f"other exit than net.eval() {text}"


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        (
            {"max_probability": (0, 0), "carried": (0.004, 0.001)},
            "carried is the most accurate at mean cost 0.2500, over",
        ),
        ({"carried": (0.004, 0.001)}, r"\+0.40 ± 0.10 points above max_probability$"),
        ({"margin": (0.001, 0.002)}, r"\+0.10 ± 0.20 points above max_probability; less than the spread"),
        (
            {"max_probability": (0, 0), "margin": (-0.001, 0.002), "entropy": (-0.01, 0.0)},
            "^max_probability is the most",
        ),
        (
            {"max_probability": (0, 0), "margin": (-0.001, 0.002), "entropy": (-0.01, 0.0)},
            "; margin: -0.10 ± 0.20 points$",
        ),
    ],
)
def test_the_winner_is_named_with_its_points(gains, expected):
    compared = {name: Comparison(0.9, *pair) for name, pair in gains.items()}
    assert re.search(expected, render.winner(compared, 0.25))
