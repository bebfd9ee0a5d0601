"""Batches in chunks: every image gets its own answer, stages see the chunks that were asked for, memory is kept."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import nn

import eefast
from eefast import zoo
from eefast.engines import CompactEngine

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def net() -> Any:
    net = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 1)
    spread_thresholds(net, images(64, SHAPE), 0.4)
    return net


class Seen(nn.Module):
    """A stage that notes the number of rows of every call."""

    def __init__(self, stage: nn.Module, layout: torch.memory_format) -> None:
        super().__init__()
        self.stage, self.layout, self.sizes = stage, layout, list[int]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous(memory_format=self.layout)
        self.sizes.append(len(x))
        return self.stage(x).contiguous(memory_format=self.layout)


def in_chunks(net: Any, chunks: tuple[int | None, ...], layouts: tuple[torch.memory_format, ...]) -> CompactEngine:
    planned = eefast.accelerate(net, engine="compact", stages="pytorch").engine
    assert isinstance(planned, CompactEngine)
    steps = [
        replace(step, stage=Seen(step.stage, layout), chunk=chunk)
        for step, chunk, layout in zip(planned.steps, chunks, layouts, strict=True)
    ]
    return CompactEngine(net, planned.plan, steps)


NCHW, NHWC = torch.contiguous_format, torch.channels_last

CHUNKS: list[tuple[int | None, ...]] = [
    (None, None, None, None), (1, 1, 1, 1), (4, 4, 4, 4), (2, 8, 3, 32), (8, 3, None, 5), (5, None, 2, 7),
]  # fmt: skip


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("layouts", [(NHWC,) * 4, (NCHW, NHWC, NCHW, NCHW)], ids=["channels-last", "mixed"])
@torch.no_grad()
@pytest.mark.sampled(6)
def test_answers_and_exits_are_those_of_single_images(
    net: Any, chunks: tuple[int | None, ...], layouts: tuple[torch.memory_format, ...]
) -> None:
    engine = in_chunks(net, chunks, layouts)
    for n in (31, 3, 0, 1, 33):
        x = images(n, SHAPE)
        expected = one_by_one(net, x) if n else None
        for limits in (net.thresholds, torch.full((3,), 2.0), torch.tensor([2.0, -1.0, 2.0])):
            got = engine.run(x, limits)
            assert got.logits.shape == (n, net.num_classes)
            if limits is net.thresholds and expected is not None:
                assert_same_answers(got, expected, net)
            elif limits is not net.thresholds:
                taken = 1 if -1.0 in limits else 3
                assert got.exit_index.tolist() == [taken] * n
    for step, chunk in zip(engine.steps, chunks, strict=True):
        assert max(step.stage.sizes) <= (chunk or 33)  # type: ignore[union-attr, operator]


@torch.no_grad()
def test_survivors_fill_the_chunks_of_deep_stages(net: Any) -> None:
    engine = in_chunks(net, (2, 4, 4, 4), (NHWC,) * 4)
    x = images(61, SHAPE)
    taken = engine.run(x, net.thresholds).exit_index
    for i, step in enumerate(engine.steps):
        arrived, chunk = int((taken >= i).sum()), engine.steps[i].chunk
        full, rest = divmod(arrived, chunk)  # type: ignore[arg-type]
        assert sorted(step.stage.sizes) == sorted([chunk] * full + [rest] * bool(rest))  # type: ignore[union-attr]


@torch.no_grad()
def test_memory_of_earlier_batches_is_used_again(net: Any) -> None:
    engine = in_chunks(net, (2, 8, 8, 8), (NHWC,) * 4)
    x = images(31, SHAPE)
    engine.run(x, net.thresholds)
    (kept,) = engine.kept
    before = {i: waiting.features.data_ptr() for i, waiting in kept.waiting.items()}
    assert set(before) == {1, 2, 3}
    for n in (31, 7, 30):
        assert_same_answers(engine.run(x[:n], net.thresholds), one_by_one(net, x[:n]), net)
    (again,) = engine.kept
    assert {i: waiting.features.data_ptr() for i, waiting in again.waiting.items()} == before


@torch.no_grad()
def test_images_of_another_size_and_calls_in_inference_mode_in_between(net: Any) -> None:
    engine = in_chunks(net, (2, 8, 8, 8), (NHWC,) * 4)
    for size in ((16, 16), (20, 12), (16, 16)):
        x = images(13, (3, *size))
        with torch.inference_mode():
            assert_same_answers(engine.run(x, net.thresholds), one_by_one(net, x), net)
        assert_same_answers(engine.run(x, net.thresholds), one_by_one(net, x), net)


@torch.no_grad()
def test_survivors_of_a_batch_that_failed_are_in_no_other_one(net: Any) -> None:
    engine = in_chunks(net, (2, 8, 8, 8), (NHWC,) * 4)
    x = images(31, SHAPE)

    def fails(module: nn.Module, inputs: Any) -> None:
        raise OSError("out of cheese")

    hook = engine.steps[2].stage.register_forward_pre_hook(fails)
    with pytest.raises(OSError, match="out of cheese"):
        engine.run(x, net.thresholds)
    hook.remove()
    assert_same_answers(engine.run(x, net.thresholds), one_by_one(net, x), net)


def test_four_threads_at_once(net: Any) -> None:
    engine = in_chunks(net, (2, 8, 3, 8), (NHWC, NCHW, NHWC, NCHW))
    parts = images(4 * 13, SHAPE).split(13)
    expected = [one_by_one(net, x) for x in parts]
    failed: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    assert_same_answers(engine.run(parts[i], net.thresholds), expected[i], net)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert 1 <= len(engine.kept) <= 4


@torch.no_grad()
def test_a_stream_takes_chunks_too(net: Any) -> None:
    from eefast.engines import Batch

    engine = in_chunks(net, (2, 4, 3, 8), (NHWC, NCHW, NHWC, NCHW))
    parts = images(40, SHAPE).split(9)
    results = list(engine.stream(Batch(x, net.thresholds, net) for x in parts))
    for x, result in zip(parts, results, strict=True):
        assert_same_answers(result, one_by_one(net, x), net)
    for step in engine.steps:
        assert max(step.stage.sizes) <= step.chunk  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_copies_plan_their_stages_again(net: Any, again: Any) -> None:
    fast = eefast.accelerate(net, engine="compact", stages="pytorch")
    x = images(13, SHAPE)
    fast(x)
    made = again(fast)
    assert_same_answers(made(x), one_by_one(net, x), net)
    assert made.engine is not fast.engine
    assert made.plan == fast.plan


@pytest.mark.parametrize("n", [129, 257])
@torch.no_grad()
def test_large_batches_of_small_images_go_in_chunks_of_64(net: Any, n: int) -> None:
    fast = eefast.accelerate(net, engine="compact", stages="pytorch")
    sizes: list[int] = []
    first = fast.engine.steps[0].stage  # type: ignore[attr-defined]
    handle = first.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    x = images(n, SHAPE)
    assert_same_answers(fast(x), net(x), net)
    handle.remove()
    assert sizes == [64] * (n // 64) + [1]
