"""Rows of several images: who runs with whom, who is answered when, who is dropped."""

import pytest
import torch

from eefast.serving import rows


def values(seen):
    return [(stage, sorted(found)) for stage, found in seen]


def test_an_easy_image_waits_for_one_stage_of_a_hard_one_at_most(gated, serve):
    server = serve(gated.fast)
    gated.shut(1)
    hard = server.submit(gated.image(-2.0))
    assert gated.entered[1].wait(20)
    easy = server.submit_all([gated.image(1.0), gated.image(2.0)])
    gated.shut(2)
    gated.gates[1].set()
    assert [future.result(20).exit for future in easy] == [0, 0]
    assert not hard.done()
    gated.open()
    assert hard.result(20).exit == 2
    assert values(gated.seen)[-2:] == [(0, [1.0, 2.0]), (2, [-2.0])]


def test_arrivals_and_later_stages_take_turns(gated, serve):
    server = serve(gated.fast)
    gated.shut(1)
    futures = [server.submit(gated.image(-2.0))]
    assert gated.entered[1].wait(20)
    futures += server.submit_all([gated.image(v) for v in (-3.0, -0.5, 1.0)])
    gated.open()
    assert [future.result(20).exit for future in futures] == [2, 2, 1, 0]
    first, *others = values(gated.seen)
    assert first == (0, [-2.0])
    assert others == [(1, [-2.0]), (0, [-3.0, -0.5, 1.0]), (2, [-2.0]), (1, [-3.0, -0.5]), (2, [-3.0])]


def test_cancelled_rows_are_dropped_at_the_next_stage(gated, serve):
    server = serve(gated.fast)
    gated.shut(0)
    futures = server.submit_all([gated.image(v) for v in (-2.0, -3.0)])
    assert gated.entered[0].wait(20)
    assert futures[0].cancel()
    gated.open()
    assert futures[1].result(20).exit == 2
    assert values(gated.seen)[-2:] == [(1, [-3.0]), (2, [-3.0])]
    assert server.running() == {"1": 0, "2": 0}


def test_images_of_several_sizes_do_not_meet(gated, serve):
    server = serve(gated.fast)
    gated.shut(0)
    first = server.submit(gated.image(1.0))
    assert gated.entered[0].wait(20)
    futures = server.submit_all([gated.image(-2.0), torch.full((1, 3, 5), -3.0), gated.image(2.0)])
    gated.open()
    assert [future.result(20).exit for future in (first, *futures)] == [0, 2, 2, 0]
    assert all(len(set(found)) == len(found) for _, found in gated.seen)


def test_a_stage_that_fails_on_one_image_answers_the_others(gated, serve):
    server = serve(gated.fast)
    run = gated.net.stages[1].run

    def fails(layers, x):
        if (x == -2.0).any():
            raise ArithmeticError("of this image")
        return run(layers, x)

    gated.net.stages[1].run = fails
    futures = server.submit_all([gated.image(v) for v in (-3.0, -2.0, -0.5, 1.0)])
    assert [futures[i].result(20).exit for i in (0, 2, 3)] == [2, 1, 0]
    with pytest.raises(ArithmeticError, match="of this image"):
        futures[1].result(20)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("deadline", "exit_index", "late"),
    [(None, 2, False), (3.5, 2, False), (2.5, 1, False), (1.5, 0, False), (0.5, 0, True)],
)
def test_an_image_exits_at_the_last_exit_before_its_deadline(gated, serve, deadline, exit_index, late):
    """Each stage takes a second."""
    clock = Clock()
    for stage in gated.net.stages:

        def run(layers, x, run=stage.run):
            clock.now += 1.0
            return run(layers, x)

        stage.run = run
    server = serve(gated.fast, clock=clock)
    answer = server.submit(gated.image(-5.0), deadline=deadline).result(20)
    assert (answer.exit, answer.late, answer.computed) == (exit_index, late, exit_index + 1.0)


def test_a_deadline_does_not_change_others(gated, serve):
    server = serve(gated.fast)
    gated.shut(0)
    first = server.submit(gated.image(1.0))
    assert gated.entered[0].wait(20)
    hurried, free = server.submit(gated.image(-2.0), deadline=1e-9), server.submit(gated.image(-2.0))
    gated.open()
    assert [future.result(20).exit for future in (first, hurried, free)] == [0, 0, 2]
    assert hurried.result().late


def test_no_more_rows_begin_than_may_be_under_way(gated, serve, monkeypatch):
    monkeypatch.setattr(rows, "MOST", 2)
    server = serve(gated.fast)
    gated.shut(0)
    futures = server.submit_all([gated.image(-2.0 - i) for i in range(31)])
    gated.open()
    assert [future.result(20).exit for future in futures] == [2] * 31
    under_way = 0
    for stage, found in gated.seen:
        assert len(found) <= 2
        under_way += len(found) if stage == 0 else -len(found) if stage == 2 else 0
        assert under_way <= rows.LAUNCHES_UNDER_WAY * 2 + 1
