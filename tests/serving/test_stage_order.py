"""The order of stages: turns of arrivals and later stages, on numbers alone."""

import pytest

from eefast.serving.stage_order import next_stage


@pytest.mark.parametrize(
    ("arrivals", "since", "first_ran_last", "expected"),
    [
        (0, [None, None, None], False, None),
        (3, [None, None, None], True, 0),
        (1, [None, 5, None], False, 0),
        (1, [None, 5, None], True, 1),
        (0, [None, 5, 4], False, 2),
        (0, [None, 4, 4], False, 1),
    ],
)
def test_next_stage(arrivals, since, first_ran_last, expected):
    assert next_stage(arrivals, since, first_ran_last) == expected


@pytest.mark.parametrize("stages", [2, 5, 10])
def test_with_arrivals_at_every_launch_all_rows_are_answered_soon_and_meet(stages):
    """No row exits early, which is the most work; every launch takes all rows before its stage."""
    waiting, since = [[] for _ in range(stages)], [None] * stages
    waits, sizes, first = [], [], False
    for launch in range(1000):
        waiting[0].append(launch)
        stage = next_stage(len(waiting[0]), since, first)
        assert stage == 0 or first  # no arrival waits for two later stages
        rows, waiting[stage], since[stage], first = waiting[stage], [], None, stage == 0
        if stage == stages - 1:
            waits += [launch - begun for begun in rows]
            sizes.append(len(rows))
        else:
            waiting[stage + 1] += rows
            if stage + 1 and since[stage + 1] is None:
                since[stage + 1] = launch
    assert len(waits) > 1000 - 2 * stages * (stages + 1)
    assert max(waits) <= 2 * stages * stages
    assert sum(sizes) / len(sizes) > stages / 2
