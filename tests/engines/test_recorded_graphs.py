"""The compact engine's graphs as recorded operations on the same memory, and faults that the recording must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs_on_cpu import SHAPE, assert_same, capture_on_cpu, network, planned, reading, run
from networks import images, one_by_one
from recorded_graphs import CaptureError, recorded

from eefast.engines import Batch, CompactEngine
from eefast.planning import capture
from eefast.planning.fusing import fuse_convolutions
from eefast.planning.indexed_stages import reading_through_rows

CAPACITY = 5


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch, recorded)


@pytest.fixture(scope="module")
def net() -> Any:
    return network()


@pytest.fixture(scope="module")
def engine(net: Any) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        capture_on_cpu(patched, recorded)
        return planned(net, CAPACITY)


@pytest.mark.parametrize("n", [0, 1, 3, CAPACITY, 13])
def test_answers_of_the_one_by_one_loop(net: Any, engine: Any, n: int) -> None:
    x = images(n, SHAPE, seed=n)
    assert engine.plan.engine == "compact"
    assert_same(run(engine, net, x), one_by_one(net, x) if n else net(x))


def test_other_thresholds_reach_the_graphs(net: Any, engine: Any) -> None:
    x, other = images(9, SHAPE), net.with_criterion("learned", [0.3, 0.5, 0.4])
    for answering in (net, other, net):
        assert_same(run(engine, answering, x), one_by_one(answering, x))


def planted(work: Callable[[torch.Tensor, torch.Tensor], Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Memory from before, [3] and [3], and a graph of `work` on it."""
    source, target = torch.arange(3.0), torch.zeros(3)
    return source, target, recorded(lambda: work(source, target), lambda: None, None)


def test_a_replay_reads_what_is_there_then() -> None:
    source, target, replay = planted(lambda source, target: target.copy_((source * 2).relu_()[1:].sum()))
    source.fill_(5)
    replay()
    assert target.tolist() == [20] * 3


def test_a_capture_changes_no_memory() -> None:
    _, target, replay = planted(lambda source, target: target.add_(source))
    assert target.tolist() == [0, 1, 2]  # of the run before the capture
    replay()
    assert target.tolist() == [0, 2, 4]


def test_a_number_that_python_took_is_that_of_the_capture() -> None:
    number = [1.0]
    _, target, replay = planted(lambda source, target: target.fill_(number[0]))
    number[0] = 2.0
    replay()
    assert target.tolist() == [1] * 3


@pytest.mark.parametrize(
    "reads", [lambda x, _: int(x[1]), lambda x, _: x[x > 1], lambda x, _: bool(x[0] == 0)], ids=["int", "mask", "bool"]
)
def test_reading_the_device_is_refused(reads: Any) -> None:
    with pytest.raises(CaptureError, match="waits for the device"):
        planted(reads)


def test_memory_that_was_freed_after_the_capture() -> None:
    held, target = [torch.ones(3)], torch.zeros(3)
    replay = recorded(lambda: target.add_(held[0]), lambda: None, None)
    replay()
    held.clear()
    with pytest.raises(CaptureError, match="freed after the capture"):
        replay()


def test_what_a_graph_returned_is_renewed_where_it_is_held() -> None:
    """Before a replay it holds nothing of use; another graph may read it at its address."""
    kept: list[torch.Tensor] = []
    source, target, replay = planted(lambda source, target: kept.append((source + 1)[1:]))
    read = recorded(lambda: target[1:].copy_(kept[1]), lambda: None, None)
    source.fill_(7)
    replay()
    assert kept[-1].tolist() == [8, 8]
    read()
    assert target.tolist() == [0, 8, 8]


@pytest.fixture(scope="module")
def in_place(net: Any) -> Any:
    """An engine whose survivors stay in place on the paths of 12 images, in one queue and in two."""
    with pytest.MonkeyPatch.context() as patched:
        capture_on_cpu(patched, recorded)
        patched.setenv("EEFAST_GRAPHS", "0")
        bare = planned(net, 12)
        patched.delenv("EEFAST_GRAPHS")
        patched.setattr(capture, "faster_in_place", lambda made, survivors: range(len(made.paths)))
        forms = [reading_through_rows(fuse_convolutions(step.stage)[0]) for step in bare.steps]
        assert all(form is not None for form in forms)
        steps = [replace(step, through=form) for step, form in zip(bare.steps, forms, strict=True)]
        with torch.no_grad():
            return capture.with_graphs(CompactEngine(net, bare.plan, steps), images(64, SHAPE), 12)


def counted(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is replayed from here on: "through", "settles" or "replays"."""
    seen: list[str] = []
    for kind in ("through", "settles", "replays"):
        all_of_it = getattr(engine.graphs, kind)
        told = {key: lambda run=run, kind=kind: (seen.append(kind), run()) for key, run in all_of_it.items()}
        monkeypatch.setattr(engine.graphs, kind, told)
    return seen


@pytest.mark.parametrize("n", [0, 1, 5, 11, 12, 31])
@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.sampled(6)
def test_survivors_that_stay_in_place(net: Any, in_place: Any, queues: int, n: int) -> None:
    assert "survivors read in place" in in_place.plan.reason
    for reads in (lambda stage: True, lambda stage: False, lambda stage: stage == 1):
        reading(in_place, reads, queues)
        for seed in (n, n + 1):
            x = images(n, SHAPE, seed=seed)
            assert_same(run(in_place, net, x), one_by_one(net, x) if n else net(x))


def test_on_the_expected_path_nothing_is_copied(net: Any, in_place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x, limits = in_place.graphs.paths[0], images(12, SHAPE, seed=3), list[float]()
    assert path[0] == 12 > path[3]
    alive = torch.arange(12)
    with torch.no_grad():
        said = net.all_exits(x)
    for stage, wanted in enumerate(path[1:]):  # as many survive as are expected
        confidence, order = said[stage].confidence[alive].sort()
        limits.append(float(confidence[wanted - 1 : wanted + 1].mean()) if wanted < len(alive) else 2.0)
        alive = alive[order[:wanted]]
    seen = counted(in_place, monkeypatch)
    reading(in_place, lambda stage: True, 1)
    other = net.with_criterion("learned", limits)
    assert_same(run(in_place, other, x), one_by_one(other, x))
    assert seen == ["through"] * 4


def test_survivors_of_several_batches_are_copied_where_they_meet(
    net: Any, in_place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counted(in_place, monkeypatch)
    reading(in_place, lambda stage: True, 2)
    batches = [images(6, SHAPE, seed=seed) for seed in range(9)]
    found = list(in_place.stream(Batch(x, net.thresholds, net) for x in batches))
    for got, x in zip(found, batches, strict=True):
        assert_same(got, one_by_one(net, x))
    assert {"through", "settles", "replays"} == set(seen)


def test_a_stream_that_is_closed_leaves_nothing_in_place(net: Any, in_place: Any) -> None:
    results = in_place.stream(Batch(images(6, SHAPE, seed=s), net.thresholds, net) for s in range(99))
    next(results)
    results.close()
    assert not any(in_place.graphs._places)
    x = images(12, SHAPE, seed=1)
    assert_same(run(in_place, net, x), one_by_one(net, x))


def test_without_the_copy_where_batches_meet_answers_are_wrong(
    net: Any, in_place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: what waits in place is forgotten when others come."""
    monkeypatch.setattr(in_place.graphs, "settles", dict.fromkeys(in_place.graphs.settles, lambda: None))
    reading(in_place, lambda stage: True, 2)
    batches = [images(6, SHAPE, seed=seed) for seed in range(9)]
    found = list(in_place.stream(Batch(x, net.thresholds, net) for x in batches))
    same = [torch.equal(got.exit_index, net(x).exit_index) for got, x in zip(found, batches, strict=True)]
    assert not all(same)
