"""Ranges of a number of images."""

from eefast.scoring.chunks import cut


def test_ranges_cover_everything_once() -> None:
    assert list(cut(0, 3)) == []
    assert list(cut(7, 3)) == [(0, 3), (3, 3), (6, 1)]
    assert list(cut(6, 6)) == [(0, 6)]
