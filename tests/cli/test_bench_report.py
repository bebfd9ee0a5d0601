"""The text and figure of `eefast bench`: what was chosen, what was measured, what was left out and why."""

from contextlib import contextmanager
from io import StringIO

import pytest
from networks import lived_in
from rich.console import Console

from eefast import zoo
from eefast.cli import bench_report
from eefast.cli.choices import Choice
from eefast.measure import figures
from eefast.measure.assessment import Assessment, CurvePoint
from eefast.measure.comparison import Row
from eefast.measure.time_costs import TimeCosts
from eefast.measure.verdicts import Verdict
from eefast.thresholds.calibration import Calibration
from eefast.thresholds.evaluation import Evaluation


def a_row(name, batch_size, images_per_s, criterion=None):
    return Row(
        name=name, criterion=criterion, images_per_s=images_per_s, images_per_s_quantiles=(1000, 3000.4),
        mean_cost=0.25, accuracy=0.5, realised_ratio=0.625, images=1234, batch_size=batch_size, exits=(3, 4), flips=0,
        flip_margin=1e-4, speedup=images_per_s / 1000, speedup_quantiles=(1, 2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def choice():
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 1).with_criterion("margin", [0.25, 0.5])
    chosen = {"margin": Calibration("margin", (0.25, 0.5), 0.9375, 0.375)}
    return Choice(net, chosen, {"entropy": "max_cost=0.4 cannot be kept"})


@pytest.fixture
def found():
    """Two batch sizes; in the rows of the larger one everything is faster."""
    rows = [
        row
        for size, speed in ((1, 1000), (16, 2000))
        for row in (a_row("plain, PyTorch", size, speed), a_row("compact", size, 2 * speed, "margin"))
    ]
    early = Evaluation(7000, 0.75, 0.5, 0.6, (10, 20, 30), (1, 2, 3), (), ())
    verdicts = tuple(Verdict(n, True, "plain, PyTorch", "compact", (1.5, 2, 2.5), 3.0, 0.625) for n in (1, 16))
    return Assessment(
        plain_accuracy=0.8, early=early, criteria={"learned": (0.7, 0.6), "margin": (0.75, 0.5)}, rows=tuple(rows),
        verdicts=verdicts, curve=(CurvePoint((0.1, 0.2), 0.7, 0.4, 5000.0),), auto="compact", reason="",
        left_out={"ONNX Runtime": "is not installed"}, time_costs=(TimeCosts("PyTorch", 16, (0.25, 0.5, 1.0)),),
    )  # fmt: skip


def printed(parts):
    console = Console(file=StringIO(), width=200)
    for part in parts:
        console.print(part, markup=False)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines() if line.strip()]


def lines_of(found, choice, budget=("max_cost", 0.5), code="fast = 1"):
    return printed(bench_report.parts(found, choice, "mnist", "float32", budget, code))


def test_what_was_measured_is_said_first(found, choice):
    first = lines_of(found, choice)[0]
    assert first == "eenet8 with 2 early exits, float32, 7,000 test images of mnist, 1,234 of them timed"


def test_held_out_figures_are_beside_those_of_the_test_images(found, choice):
    """A criterion without thresholds has none, and its reason below the table."""
    lines = lines_of(found, choice)
    assert lines[1:6] == [
        "criterion held-out mean cost test mean cost",
        "final exit 80.00% 1.0000",
        "learned 70.00% 0.6000",
        "margin 93.75% 0.3750 75.00% 0.5000",
        "entropy: max_cost=0.4 cannot be kept",
    ]


def test_figures_in_another_arithmetic_are_told_apart(found, choice):
    lines = printed(bench_report.parts(found, choice, "mnist", "bfloat16", None, ""))
    assert lines[1] == "criterion held-out, float32 mean cost test, bfloat16 mean cost"


@pytest.mark.parametrize(
    ("budget", "origin"), [(("max_cost", 0.5), "the best for max_cost 0.5"), (None, "the network's own")]
)
def test_the_origin_of_the_thresholds_is_said(found, choice, budget, origin):
    lines = lines_of(found, choice, budget)
    assert f"{origin}: margin, thresholds 0.2500, 0.5000" in lines
    assert "images per exit: 11 22 33" in lines


@pytest.mark.parametrize("budget", [("max_cost", 0.4), ("max_cost", 0.5), None])
def test_only_a_budget_that_is_exceeded_is_mentioned(found, choice, budget):
    said = [line for line in lines_of(found, choice, budget) if "the budget is not kept" in line]
    expected = ["the budget is not kept on the test images: max_cost 0.5000 instead of 0.4"]
    assert said == (expected if budget == ("max_cost", 0.4) else [])


@pytest.mark.parametrize(("size", "speed"), [(1, 1000), (16, 2000)])
def test_a_table_and_a_verdict_for_each_batch_size(found, choice, size, speed):
    lines = lines_of(found, choice)
    at = lines.index(f"batch {size} images/s 20 % … 80 % × static realised ratio")
    assert lines[at + 1 : at + 3] == [
        # What has no early exits realises no ratio.
        f"plain, PyTorch {speed:,} 1,000 … 3,000 {speed / 1000:.2f}",
        f"compact {2 * speed:,} 1,000 … 3,000 {speed / 500:.2f} 0.62",
    ]
    verdict = f"batch {size}: worth it: compact is 2.00 × as fast as plain, PyTorch, accuracy -5.00 points"
    assert any(line.startswith(verdict) for line in lines)


def test_costs_are_told_in_time_too(found, choice):
    mean = (11 * 0.25 + 22 * 0.5 + 33) / 66
    said = f"batch 16: mean cost 0.500 in MACs, {mean:.3f} in time; time to each exit ÷ the plain network's, PyTorch: "
    assert said + "0.250, 0.500, 1.000" in lines_of(found, choice)


@pytest.mark.parametrize(("code", "last"), [("fast = 1", "fast = 1"), ("", "keep the network without early exits")])
def test_the_end_says_what_to_run(found, choice, code, last):
    lines = lines_of(found, choice, code=code)
    assert lines[-3:] == ['engine="auto" takes compact', "not compared: ONNX Runtime, is not installed", last]


def test_the_figure_shows_all_batch_sizes_and_the_largest(found, monkeypatch, tmp_path):
    drawn = {}

    @contextmanager
    def canvas(path, width, height):
        yield Figure()

    class Figure:
        def subplots(self, rows, columns):
            return self, self

        def suptitle(self, text, **_):
            drawn["heading"] = text

        def set_title(self, text, **_):
            drawn["title"] = text

    monkeypatch.setattr(bench_report, "canvas", canvas)
    monkeypatch.setattr(figures, "speedup_over_batch_size", lambda axes, *a: drawn.update(speedups=a))
    monkeypatch.setattr(figures, "accuracy_against_speed", lambda axes, *a: drawn.update(accuracies=a))
    bench_report.draw(found, tmp_path / "x.png", "eenet8 on mnist")
    assert drawn["heading"] == "eenet8 on mnist"
    static = ["plain, PyTorch"] * 2
    assert drawn["speedups"] == ({"plain, PyTorch": {1: 1.0, 16: 2.0}, "compact": {1: 2.0, 16: 4.0}}, static)
    points = {"plain, PyTorch": (2000, 0.8), "compact": (4000, 0.75)}
    assert drawn["accuracies"] == (points, static, [(5000.0, 0.7)], "compact, other thresholds")
    assert drawn["title"] == "batch 16"
