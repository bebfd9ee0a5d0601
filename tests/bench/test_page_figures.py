"""The figures of docs/benchmarks.md: every mark is where its row says, losses look like losses."""

from __future__ import annotations

from typing import Any

import pytest

Figure = pytest.importorskip("matplotlib.figure").Figure
import page_figures as figures  # noqa: E402


@pytest.fixture
def axes() -> Any:
    return Figure().subplots()


def marks(axes: Any) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def way(provider: str, speed: float, ratio: float, cost: float = 0.25, dtype: str = "float32") -> dict[str, Any]:
    return {
        **{"provider": provider, "images_per_s": [0, speed, 0], "realised_ratio": ratio},
        **{"mean_cost": cost, "dtype": dtype},
    }


def test_realised_ratios_are_of_the_fastest_and_in_the_same_dtype(axes: Any) -> None:
    static = way("plain, eager", 100, 1.0, 1.0)
    ours = [way("eefast compact", 80, 0.2), way("eefast resident", 800, 2.0)]
    ours.append(way("eefast resident, bfloat16", 9999, 9.0, dtype="bfloat16"))
    key = ("net", 31, "cost 0.25")
    cases = {("net", 31, "no exits"): {"plain, eager": static}, key: {row["provider"]: row for row in ours}}
    assert figures.realised_ratios(axes, cases, [key]) is axes
    # A way without exits has cost 1.
    assert [bar.get_width() for container in axes.containers for bar in container] == [2.0, 0.25]
    assert [text.get_text() for text in axes.texts] == ["2.00  eefast resident", "0.25  plain, eager"]


def test_cells_show_wins_blue_losses_red_and_nothing_where_nothing_was_measured(axes: Any) -> None:
    cells = {(1, "cost 0.25"): 0.25, (31, "cost 0.25"): 16.0, (31, "no exits"): 1.0}
    assert figures.speed_ups(axes, cells, [1, 31], 16.0) is axes
    (image,) = axes.images
    shown = image.cmap(image.norm(image.get_array()))
    (loss, missing), (win, even) = shown
    assert loss[0] > 2 * loss[2]
    assert win[2] > 2 * win[0]
    assert min(even[:3]) > 0.9
    assert missing[3] == 0
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "0.25×", (0, 1): "16.0×", (1, 1): "1.00×"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cost\n0.25", "no\nexits"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "31"]


def test_latencies_are_plotted_over_what_arrives(axes: Any) -> None:
    rows = [
        {"provider": provider, "offered": offered, "load": offered / 200, "milliseconds": [p50, p50 * 2, p50 * 3]}
        for provider, offered, p50 in (("plain, eager", 180, 9), ("plain, eager", 60, 2), ("eefast call", 800, 1))
    ]
    assert figures.latencies(axes, rows) is axes
    found = marks(axes)
    assert found["plain, eager, p50"] == [[60, 2], [180, 9]]
    assert found["plain, eager, p99"] == [[60, 6], [180, 27]]
    assert found["eefast call, p99"] == [[800, 3]]
    assert [x for x, _ in found["all that the plain network can do"]] == [200, 200]


def test_ways_without_exits_are_marked_otherwise(axes: Any) -> None:
    points = [figures.Mark("plain", True, 0.99, 100, 1.0), figures.Mark("eefast", False, 0.98, 900, 0.2)]
    points.append(figures.Mark("masked", False, 0.98, 300, 0.2))
    assert figures.accuracy_of_ways(axes, points) is axes
    found = [(line.get_label(), line.get_color(), *line.get_xydata()[0]) for line in axes.lines]
    assert found == [
        ("plain: 100", figures.GRAY, 100, pytest.approx(99)),
        ("masked: 300", figures.ORANGE, 300, pytest.approx(98)),
        ("eefast: 900", figures.BLUE, 900, pytest.approx(98)),
    ]


def test_marks_are_under_the_roof_of_their_run(axes: Any) -> None:
    ceilings = [
        {"ceiling": "copy", "dtype": "uint8", "value": 20.0},
        {"ceiling": "matmul", "dtype": "float32", "value": 0.2},
    ]
    ops = [{"op": "exit_head", "bytes": 1000, "flops": 500, "typical": 2.0}]
    assert figures.roofline(axes, ops, ceilings) is axes
    found = marks(axes)
    # 500 flops in 2 µs are 0.25 GFLOP/s, at half a flop per byte.
    assert found["exit_head"] == [[0.5, 0.25]]
    (roof,) = (line for name, line in found.items() if name.startswith("copy 20 GB/s, matrix product 200 GFLOP/s"))
    # 20 GB/s give 5 GFLOP/s at a quarter flop per byte, and 200 from 10 flops per byte on.
    assert roof == [[0.25, 5.0], [10.0, 200.0], [40.0, 200.0]]
