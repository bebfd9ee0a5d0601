"""Progress of work over items."""

from eefast.system.progress import counted, reported


def test_every_item_is_one_step():
    steps = []
    assert list(reported("abc", "work", lambda *step: steps.append(step))) == ["a", "b", "c"]
    assert steps == [("work", 0, 3), ("work", 1, 3), ("work", 2, 3), ("work", 3, 3)]


def test_no_items_are_no_steps():
    steps = []
    assert list(reported([], "work", lambda *step: steps.append(step))) == []
    assert steps == [("work", 0, 0)]


def test_steps_are_reported_after_the_work_on_their_item():
    log = []
    for item in counted([2, 5], "work", lambda what, done, total: log.append((done, total)), 7, lambda item: item):
        log.append(item)
    assert log == [(0, 7), 2, (2, 7), 5, (7, 7)]
