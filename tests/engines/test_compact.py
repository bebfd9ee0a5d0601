"""The compact engine's stream: survivors of several batches merge, answers are those of single batches."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import images, lived_in, spread_thresholds
from runtime_stages import in_a_library
from torch import Tensor, nn

import eefast
from eefast import ops, zoo
from eefast.engines import CompactEngine, compact
from eefast.engines.engine import Batch
from eefast.result import ExitResult


@pytest.fixture(scope="module")
def net() -> Any:
    net = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=(3, 16, 16)), 1)
    spread_thresholds(net, images(64, (3, 16, 16)), 0.4)
    return net


@pytest.fixture
def fast(net: Any) -> Any:
    return eefast.accelerate(net, engine="compact", stages="pytorch")


def assert_same(got: ExitResult, expected: ExitResult) -> None:
    assert torch.equal(got.exit_index, expected.exit_index)
    assert torch.equal(got.cost, expected.cost)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", [["depthwise", "conv1", "depthwise"], ["strided3", "strided2", "strided1"]])
def test_heads_that_resize_maps_and_heads_of_several_kinds(kinds: list[str]) -> None:
    shape = (3, 13, 15)
    net: Any = lived_in(zoo.eenet("eenet20", 3, (0, 3, 5), kinds, input_shape=shape), 1)
    x = images(67, shape)
    spread_thresholds(net, x, 0.4)
    expected = net(x)
    assert len(expected.exit_index.unique()) == 4
    assert_same(eefast.accelerate(net, engine="compact")(x), expected)
    if not ops.CPP_MISSING:
        assert_same(eefast.accelerate(net, engine="resident")(x), expected)


@pytest.mark.parametrize("sizes", [[9] * 12, [1] * 9, [31, 0, 5, 64, 1], [0], [], [257, 2], [2, 257]], ids=str)
def test_answers_are_those_of_single_batches(net: Any, fast: Any, sizes: list[int]) -> None:
    x = images(sum(sizes) + 1, (3, 16, 16))[: sum(sizes)]
    batches = x.split(sizes) if sizes else []
    got = list(fast.stream(batches))
    assert [len(r.logits) for r in got] == sizes
    for result, batch in zip(got, batches, strict=True):
        assert_same(result, net(batch))


def test_deep_stages_run_on_survivors_of_several_batches(net: Any, fast: Any) -> None:
    seen: list[int] = []
    last = fast.engine.steps[-1].stage
    handle = last.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    x = images(128, (3, 16, 16))
    alone = int((net(x).exit_index == 3).sum())
    results = list(fast.stream(x.split(8)))
    handle.remove()
    assert sum(seen) == alone
    assert len(seen) < sum(bool((r.exit_index == 3).any()) for r in results)


def test_an_error_comes_after_the_results_before_it(net: Any, fast: Any) -> None:
    x = images(9, (3, 16, 16))
    results = fast.stream([x, x[:4, :2], x])
    assert_same(next(results), net(x))
    with pytest.raises(ValueError, match=r"x has shape \(4, 2, 16, 16\)"):
        next(results)

    def failing() -> Any:
        yield x
        raise OSError("the disk is gone")

    results = fast.stream(failing())
    assert_same(next(results), net(x))
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_closing_early(fast: Any) -> None:
    x = images(9, (3, 16, 16))
    results = fast.stream(x for _ in itertools.count())
    next(results)
    results.close()
    with pytest.raises(StopIteration):
        next(results)


def test_memory_stays_bounded_on_an_endless_stream(fast: Any) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def endless() -> Any:
        while True:
            batch = images(4, (3, 16, 16))
            alive.append(weakref.ref(batch))
            yield batch

    results = fast.stream(endless())
    for _ in range(60):
        next(results)
    gc.collect()
    assert sum(r() is not None for r in alive) < 20


def test_changed_weights_and_image_sizes_between_batches(net: Any) -> None:
    small = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=(3, 16, 16)), 5)
    spread_thresholds(small, images(64, (3, 16, 16)), 0.4)
    fast = eefast.accelerate(small, engine="compact")
    x, large = images(9, (3, 16, 16)), images(5, (3, 24, 24))
    before, other = small(x), small(large)
    results = fast.stream(batches_changing(small, x, large))
    for expected in (before, other, before):
        assert_same(next(results), expected)
    assert_same(next(results), small(x))


def batches_changing(net: Any, x: Tensor, large: Tensor) -> Any:
    yield x
    yield large
    yield x
    with torch.no_grad():
        first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
        first.weight.mul_(0.5)
    yield x


def test_grad_mode_of_the_consumer_is_left_alone(fast: Any) -> None:
    x = images(3, (3, 16, 16))
    for result in fast.stream([x, x]):
        assert torch.is_grad_enabled()
        assert not result.logits.requires_grad
    with torch.inference_mode():
        first = next(iter(fast.stream([x])))
    assert torch.equal(first.exit_index, next(iter(fast.stream([x]))).exit_index)


def test_calls_and_other_streams_in_between(net: Any, fast: Any) -> None:
    parts = images(24, (3, 16, 16)).split(8)
    for (one, two), batch in zip(zip(fast.stream(parts), fast.stream(parts), strict=True), parts, strict=True):
        for result in (one, two, fast(batch)):
            assert_same(result, net(batch))


def test_a_capture_is_refused_before_work_starts(net: Any, fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "capturing", lambda device: True)
    x = images(3, (3, 16, 16))
    for call in (lambda: fast(x), lambda: next(fast.stream([x]))):
        with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*engine='resident'"):
            call()


@pytest.mark.gpu
def test_a_capture_by_the_user(net: Any) -> None:
    fast, x = eefast.accelerate(copy.deepcopy(net).cuda(), engine="compact"), images(3, (3, 16, 16)).cuda()
    expected = fast(x)
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fast(x)
    assert torch.equal(fast(x).exit_index, expected.exit_index)


class Noting(nn.Module):
    """A module that notes how many threads PyTorch uses when it runs."""

    def __init__(self, module: nn.Module, seen: set[int]) -> None:
        super().__init__()
        self.module, self.seen = module, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.get_num_threads())
        return self.module(x)


@pytest.mark.parametrize("in_one_thread", [False, True])
@pytest.mark.parametrize("entry", ["run", "stream", "part"])
@torch.no_grad()
def test_beside_other_libraries_only_pytorchs_stages_use_its_threads(
    net: Any, fast: Any, entry: str, in_one_thread: bool
) -> None:
    x, planned = images(31, (3, 16, 16)), fast.engine
    before = torch.get_num_threads()
    in_pytorch, in_library, in_exits, in_gathers = (set[int]() for _ in range(4))
    steps, features = [], x
    for i, step in enumerate(planned.steps):
        stage, example = Noting(step.stage, in_pytorch), features[:2]
        features = step.stage(features)
        if i % 2:
            stage = in_a_library(step.stage, example, lambda: in_library.add(torch.get_num_threads()))  # type: ignore
        steps.append(replace(step, stage=stage, head_convs=Noting(step.head_convs, in_exits), chunk=None))
    engine = CompactEngine(net, planned.plan, steps, in_one_thread)
    gather = ops.gather_survivors.run

    def noted(*args: Any) -> None:
        in_gathers.add(torch.get_num_threads())
        gather(*args)

    torch.set_num_threads(3)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops.gather_survivors, "run", noted)
            if entry == "part":
                got = engine.part(x, net.thresholds, 0, net.num_exits).result
            elif entry == "stream":
                (got,) = engine.stream([Batch(x, net.thresholds, None)])
            else:
                got = engine.run(x, net.thresholds)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert_same(got, fast(x))
    assert in_pytorch == {3}
    assert in_library == in_exits == in_gathers == ({1} if in_one_thread else {3})


class Returning(nn.Module):
    """A convolution, of whose maps a view goes on."""

    def __init__(self, view: Any) -> None:
        super().__init__()
        self.conv, self.view = nn.Conv2d(3, 8, 3, padding=1), view

    def forward(self, x: Tensor) -> Tensor:
        return self.view(torch.relu(self.conv(x)))


VIEWS = {
    "cropped": lambda x: x[:, :, 1:-1, 1:-1],
    "some channels": lambda x: x[:, :4],
    "transposed": lambda x: x.transpose(2, 3),
    "every second": lambda x: x[:, :, ::2, ::2],
    "one pixel": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
}


@pytest.mark.parametrize("engine", ["compact", "auto"])
@pytest.mark.parametrize("view", VIEWS)
@torch.no_grad()
def test_stages_that_return_views(view: str, engine: str) -> None:
    shape, x = (3, 10, 12), images(33, (3, 10, 12))
    stage = Returning(VIEWS[view]).eval()
    maps = tuple(stage(x[:1]).shape[1:])
    second = nn.Conv2d(maps[0], 8, 3, padding=1)
    heads = [eefast.heads.ExitHead("pool", s, 5, shape) for s in (maps, (8, *maps[1:]))]
    net: Any = eefast.EarlyExitNet([stage, second], heads, input_shape=shape, criterion="max_probability").eval()
    spread_thresholds(net, x, 0.5)
    expected = net(x)
    assert len(expected.exit_index.unique()) == 2
    fast = eefast.accelerate(net, engine=engine)
    assert_same(fast(x), expected)
    (streamed,) = fast.stream([x])
    assert_same(streamed, expected)
