"""What bench/score.py makes of its measurements: medians of ratios, bounds of both kinds, tables."""

from dataclasses import replace

import score

ROW = {
    "score": "stream", "model": "eenet32", "input": ".npy", "images": 7, "unit": "images/s", "base_name": "fast.stream",
    "bound": 0.85, "at_most": False, "checked": True,
}  # fmt: skip


def test_ratios_are_of_the_same_round() -> None:
    ours, base, other = iter([10.0, 40.0, 30.0]), iter([20.0, 50.0, 20.0]), iter([5.0, 100.0, 90.0])
    compared = score.Compared(3, lambda: next(ours), lambda: next(base), lambda: next(other))
    row = compared.row(score.first, **ROW)
    assert (row.ours, row.base, row.ratio, row.rounds) == (30.0, 20.0, 0.8, 3)
    assert compared.row(min, **ROW).ratio == 1.5


def test_what_is_missed_is_marked() -> None:
    row = score.Compared(1, lambda: 9.0, lambda: 10.0).row(score.first, **ROW)
    assert score.reached(row)
    assert not score.reached(replace(row, bound=0.91))
    assert score.reached(replace(row, at_most=True, bound=1.2))
    assert not score.reached(replace(row, at_most=True))
    lines = score.show([row, replace(row, at_most=True)]).splitlines()
    assert ["MISSED" in line for line in lines] == [False, False, False, True]
    assert "≥ 0.85" in lines[2]
    assert "≤ 0.85" in lines[3]
