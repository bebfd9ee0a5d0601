"""Levels by the share of the queue: cheaper before it is full, back when it is nearly empty."""

import pytest

from eefast.serving.levels import Levels


@pytest.mark.parametrize(
    ("names", "shares", "expected"),
    [
        ("", [0.0, 1.0], [None, None]),
        ("a", [0.0, 0.6, 1.0], "aaa"),
        ("ab", [0.0, 0.49, 0.5, 0.3, 0.2, 0.19, 0.3, 0.5], "aabbbaab"),
        ("abc", [0.4, 0.5, 0.89, 0.9, 0.5, 0.21, 0.1, 0.5], "abbcccab"),
        ("abcd", [0.5, 0.7, 0.9, 1.0, 0.0, 0.71], "bcddac"),
    ],
)
def test_levels_follow_the_queue(names, shares, expected):
    levels = Levels(names)
    found = [levels.at(share) for share in shares]
    assert found == list(expected)
    assert levels.number == (names.index(found[-1]) if names else 0)
