"""Figures: every mark is where its figures say, every image beside its exit."""

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

from eefast.measure import figures  # noqa: E402


@pytest.fixture
def axes():
    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


def test_every_curve_and_point_is_drawn(axes):
    curves = {"learned": ([0.1, 0.4], [0.90, 0.98]), "margin": ([0.2], [0.97])}
    points = {f"twin {i}": (0.1 * i, 0.9 + 0.01 * i) for i in range(9)} | {"low": (1.0, 0.6), "high": (1.0, 0.995)}
    assert figures.accuracy_against_cost(axes, curves, points) is axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["learned"] == [[0.1, 90.0], [0.4, 98.0]]
    assert set(drawn) == {*curves, *points}
    low, high = axes.get_ylim()
    for name, (cost, accuracy) in points.items():
        assert drawn[name] == [[cost, pytest.approx(100 * accuracy)]]
        assert low < 100 * accuracy < high


def test_histogram_stacks_wrong_on_right(axes):
    assert figures.exit_histogram(axes, (5, 0, 31), (1, 0, 3), (0.1, 0.3, 1.0)) is axes
    right, wrong = axes.containers
    assert [bar.get_height() for bar in right] == [5, 0, 31]
    assert [(bar.get_y(), bar.get_height()) for bar in wrong] == [(5, 1), (0, 0), (31, 3)]
    assert [text.get_text() for text in axes.texts] == ["6\n(1 wrong)", "0\n(0 wrong)", "34\n(3 wrong)"]
    assert axes.get_xticklabels()[1].get_text() == "exit 1\ncost 0.30"


def test_speeds_are_plotted_over_batch_sizes(axes):
    speedups = {"plain": {16: 1.0, 1: 0.5}, "loop": {1: 0.1, 16: 3.0}, "resident": {16: 20.0, 1: 4.0}}
    assert figures.speedup_over_batch_size(axes, speedups, ["plain"]) is axes
    lines = {line.get_label(): line for line in axes.lines}
    for name, by_size in speedups.items():
        assert lines[name].get_xydata().tolist() == [[1, by_size[1]], [16, by_size[16]]]
        assert lines[name].get_linestyle() == ("--" if name == "plain" else "-")
    low, high = axes.get_ylim()
    assert 0 < low < 0.1
    assert high > 20
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "16"]


def test_accuracies_are_plotted_over_speeds(axes):
    points = {"plain": (100.0, 0.99), "resident": (2000.0, 0.985)}
    assert figures.accuracy_against_speed(axes, points, ["plain"], [(900.0, 0.989), (2500.0, 0.97)], "others") is axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["others"].get_xydata().tolist() == [[900, pytest.approx(98.9)], [2500, 97]]
    for name, (speed, accuracy) in points.items():
        assert lines[name].get_xydata().tolist() == [[speed, pytest.approx(100 * accuracy)]]
        assert (lines[name].get_markerfacecolor() == "none") == (name == "plain")
    low, high = axes.get_ylim()
    assert low < 97 < 99 < high
    figure, alone = pyplot.subplots()
    assert len(figures.accuracy_against_speed(alone, points, ["plain"], [], "").lines) == 2
    pyplot.close(figure)


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_are_in_the_row_of_their_exit(channels):
    n, each = 31, 3
    # Every image carries its number.
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, channels, 5, 4)
    random = torch.Generator().manual_seed(0)
    labels, exits = torch.randint(4, (n,), generator=random), torch.arange(n) % 2
    answers = torch.where(torch.rand(n, generator=random) < 0.6, labels, (labels + 1) % 4)
    answers[exits == 0] = labels[exits == 0]
    figure = pyplot.figure()
    # Exit 0 has no wrong answer, exit 2 no images at all.
    names = ["sandal", "shirt", "a class of a very long name", "bag"] if channels == 3 else None
    assert figures.examples(figure, pixels, labels, answers, exits, (0.1, 0.3, 1.0), each, names) is figure
    # No row for exit 2.
    assert len(figure.axes) == 2 * (2 * each + 1)
    rows = [figure.axes[i * (2 * each + 1) :][: 2 * each + 1] for i in range(2)]
    for i, row in enumerate(rows):
        assert row[0].get_ylabel().startswith(f"exit {i}\n")
        for column, axes in enumerate(row):
            shown = [int(image.get_array().flat[0]) for image in axes.get_images()]
            if column == each or (i == 0 and column > each):
                assert shown == []
                continue
            (number,) = shown
            assert exits[number] == i
            assert (answers[number] == labels[number]) == (column < each)
            both = [str(int(label)) for label in (answers[number], labels[number])]
            if names:
                both = [("sandal", "shirt", "a class of a", "bag")[int(label)] for label in both]
            text = "" if column < each else " ≠ ".join(both)
            assert axes.get_xlabel() == text
            shape = axes.get_images()[0].get_array().shape
            assert shape == ((5, 4) if channels == 1 else (5, 4, 3))
    # Different classes before a second image of one.
    right = [int(labels[int(a.get_images()[0].get_array().flat[0])]) for a in rows[0][:each]]
    assert len(set(right)) == each
    pyplot.close(figure)
