"""What is told of a run: rates without earlier runs, mean costs without images that failed, seconds left."""

import pytest

from eefast.scoring import tally
from eefast.scoring.chunks import Shard
from eefast.scoring.part_files import Totals
from eefast.scoring.pipeline import Answered
from eefast.scoring.tally import Scored, Standing, Tally

SHARDS = [Shard(0, 10, ()), Shard(1, 10, ()), Shard(2, 5, ())]


def at(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally.time, "monotonic", lambda: seconds)


def test_a_run_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Standing]()
    run = Tally(SHARDS, {0: Totals(10, 1, 4.5, (6, 3))}, seen.append)
    at(100, monkeypatch)
    run.tick([])
    run.ready()
    at(102, monkeypatch)
    run.tick([Answered(3, 1, 1.0), Answered(1, 0, 0.5)])
    run.done(SHARDS[1], Totals(10, 0, 5.0, (10, 0)))
    at(110, monkeypatch)
    run.ready()  # another worker
    run.tick([])
    assert seen == [
        Standing(10, 25, 1, 0.0, 0.5, None),
        Standing(15, 25, 2, 2.5, 6 / 13, 4.0),
        Standing(20, 25, 1, 1.0, 0.5, 5.0),
    ]
    assert run.result(90) == Scored(20, 1, 10, 0.5, (16, 3), 3, 1, 20, 10)


def test_nothing_is_known_before_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Standing]()
    run = Tally(SHARDS, {}, seen.append)
    at(7, monkeypatch)
    run.tick([])
    assert seen == [Standing(0, 25, 0, 0.0, None, None)]
    assert run.result(5) == Scored(0, 0, 0, None, (), 3, 0, 2, 2)
