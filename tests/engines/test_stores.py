"""Rows that wait before stages and the answers of exits, with stages that do nothing and exits that read the rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eefast.engines.program import CompactStep, Plan
from eefast.engines.stores import EagerStores, Results, Stores, exit_at

CAPACITY = 6
NET: Any = SimpleNamespace(cost=torch.tensor([0.25, 0.5, 1.0]), num_classes=2)
PLAN = Plan("compact", torch.device("cpu"), torch.float32, "learned", (), ())


def step(channel: int, **more: Any) -> CompactStep:
    """Samples exit where this channel is positive; their logits are the channel 0 and 7."""
    weight = torch.zeros(3, 4)
    weight[0, 0], weight[2, channel] = 1, 1
    return CompactStep(nn.Identity(), nn.Identity(), None, weight, torch.tensor([0.0, 7.0, 0.0]), False, **more)


def rows(*exits: int, first: int = 1) -> Tensor:
    """[N, 4, 1, 1] images for two early exits: `first` and the numbers after it, and the exit that each is to take."""
    made = torch.full((len(exits), 4, 1, 1), -1.0)
    made[:, 0, 0, 0] = torch.arange(first, first + len(exits))
    for row, leaving in zip(made, exits, strict=True):
        row[1 + leaving] = 1
    return made


def stores(queues: int = 1, kind: type[Stores] = Stores, steps: Any = None) -> Any:
    steps = steps or [step(1), step(2), step(3)]
    return kind(NET, PLAN, steps, queues, CAPACITY, torch.tensor([0.5, 0.5]))


def waiting(made: Stores, stage: int, queue: int = 0) -> list[tuple[int, int]]:
    """(number of the image, position) of what waits before a stage."""
    there = made.before(queue, stage)
    n = int(there.count)
    return list(zip(there.features[:n, 0, 0, 0].int().tolist(), there.positions[:n].flatten().tolist(), strict=True))


def answers(made: Stores, slot: int, size: int) -> list[tuple[int, int, float]]:
    """(number of the image, exit, cost) of each answer in a slot."""
    found = made.take(slot, size)
    assert found.logits[:, 1].tolist() == [7.0] * size
    return list(zip(found.logits[:, 0].int().tolist(), found.exit_index.tolist(), found.cost.tolist(), strict=True))


def test_images_wait_before_the_first_stage_with_the_positions_of_their_slot() -> None:
    made = stores()
    made.put(0, rows(0, 1, 2), 2)
    assert waiting(made, 0) == [(1, 2 * CAPACITY), (2, 2 * CAPACITY + 1), (3, 2 * CAPACITY + 2)]


def test_survivors_are_appended_to_those_before_the_next_stage() -> None:
    made = stores()
    made.put(0, rows(2, 0, 1), 0)
    made.advance(0, 0, 3)
    assert waiting(made, 0) == []
    assert waiting(made, 1) == [(1, 0), (3, 2)]
    made.put(0, rows(0, 2, first=4), 1)
    made.advance(0, 0, 2)
    assert waiting(made, 1) == [(1, 0), (3, 2), (5, CAPACITY + 1)]
    made.advance(0, 1, 3)
    made.advance(0, 2, 2)
    assert answers(made, 0, 3) == [(1, 2, 1.0), (2, 0, 0.25), (3, 1, 0.5)]
    assert answers(made, 1, 2) == [(4, 0, 0.25), (5, 2, 1.0)]


def test_at_the_final_exit_all_are_answered() -> None:
    made = stores(steps=[step(1)])
    made.put(0, rows(1, 1), 0)
    made.advance(0, 0, 2)
    assert [exit_index for _, exit_index, _ in answers(made, 0, 2)] == [0, 0]
    assert waiting(made, 0) == []


def test_rows_beyond_the_count_are_dead() -> None:
    """A graph runs on more rows than there are."""
    made = stores()
    made.put(0, rows(1, 1, 1), 0)
    made.put(0, rows(2, 2), 0)
    made.advance(0, 0, CAPACITY)
    assert waiting(made, 1) == [(1, 0), (2, 1)]


def test_queues_are_kept_apart() -> None:
    made = stores(2)
    made.put(0, rows(1), 0)
    made.put(1, rows(2, first=5), 1)
    made.advance(1, 0, 1)
    assert waiting(made, 0) == [(1, 0)]
    assert waiting(made, 1, 1) == [(5, CAPACITY)]


def test_a_count_of_the_device_goes_to_the_form_that_takes_it() -> None:
    seen = []

    def counted(features: Tensor, rows: None, live: Tensor) -> Tensor:
        seen.append((len(features), rows, int(live)))
        return features

    made = stores(steps=[step(1, counted=counted), step(2), step(3)])
    made.put(0, rows(1, 0), 0)
    made.advance(0, 0, CAPACITY, True)
    assert seen == [(CAPACITY, None, 2)]
    assert waiting(made, 1) == [(1, 0)]
    made.advance(0, 1, 1, True)  # this stage has none
    assert len(seen) == 1


def test_answers_are_copies() -> None:
    made = stores()
    made.put(0, rows(0), 0)
    made.advance(0, 0, 1)
    taken = made.take(0, 1)
    made.put(0, rows(0, first=9), 0)
    made.advance(0, 0, 1)
    assert taken.logits[0, 0] == 1


def test_clear_forgets_what_waits_anywhere() -> None:
    made = stores(2)
    made.put(0, rows(1, 2), 0)
    made.put(1, rows(1), 1)
    made.advance(0, 0, 2)
    made.clear()
    assert [waiting(made, 0), waiting(made, 1), waiting(made, 0, 1)] == [[], [], []]


def test_memory_made_in_inference_mode_can_be_written_to_outside_of_it() -> None:
    made = stores()
    with torch.inference_mode():
        made.put(0, rows(1), 0)
    assert not made.before(0, 0).features.is_inference()
    made.put(0, rows(2, first=3), 0)
    assert waiting(made, 0) == [(3, 0)]


def test_thresholds_are_those_of_the_beginning() -> None:
    thresholds = torch.tensor([0.5, 0.5])
    made = Stores(NET, PLAN, [step(1), step(2), step(3)], 1, CAPACITY, thresholds)
    thresholds.fill_(2.0)
    made.put(0, rows(0), 0)
    made.advance(0, 0, 1)
    assert answers(made, 0, 1) == [(1, 0, 0.25)]


def test_on_the_cpu_what_is_queued_runs_at_once() -> None:
    made = stores(kind=EagerStores)
    made.put(0, rows(2, 0, 1), 0)
    made.launch(0, 0, 3, 1.5)
    assert (made.count(0, 0), made.count(0, 1)) == (0, 2)


@pytest.mark.parametrize("head", ["mean", "flattened", "with conv", "with two convs"])
def test_exits_compute_what_their_head_does(head: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 2, 4, generator=generator)
    width = 24 if head == "flattened" else 3
    weight, bias = torch.randn(3, width, generator=generator), torch.randn(3, generator=generator)
    conv = torch.randn(3, 3, 3, 3, generator=generator), torch.randn(3, generator=generator)
    convs = nn.ReLU() if head == "with two convs" else nn.Identity()
    made = CompactStep(nn.Identity(), convs, conv if "conv" in head else None, weight, bias, head == "flattened")
    results, order = Results.empty(5, NET), torch.arange(5, dtype=torch.int32)
    entries = order, order.flip(0), torch.tensor([5], dtype=torch.int32)
    exit_at(made, 2, "learned", None, x, entries, results)
    seen = F.conv2d(convs(x), *conv, padding=1).relu() if "conv" in head else x
    pooled = seen.permute(0, 2, 3, 1).flatten(1) if head == "flattened" else seen.mean((2, 3))
    wanted = F.linear(pooled, weight, bias).flip(0)
    found = results.of(NET)
    torch.testing.assert_close(found.logits, wanted[:, :2])
    torch.testing.assert_close(found.confidence, wanted[:, 2].sigmoid())
    assert found.exit_index.tolist() == [2] * 5
    assert found.cost.tolist() == [1.0] * 5
    assert [len(part) for part in results.of(NET, slice(1, 3))] == [2] * 4
