"""Streams in every engine: order, buffers written to again, dropped streams, thresholds and dtypes that change."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import Tensor

import eefast
from eefast import ops, zoo
from eefast.engines import Batch, streaming
from eefast.engines.streaming import ALONE, PIECE, ordered, stream_on_cuda
from eefast.result import ExitResult

needs_cpp = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
SHAPE = (1, 6, 7)
NORMALIZATION = ([0.4], [0.3])
CUDA = torch.device("cuda")


def small(seed: int = 1) -> Any:
    net = lived_in(zoo.eenet("eenet8", 2, num_classes=3, input_shape=SHAPE, filters=2), seed)
    net.normalization = NORMALIZATION
    spread_thresholds(net, images(64, SHAPE), 0.4)
    return net


@pytest.fixture(scope="module")
def net() -> Any:
    return small()


@pytest.fixture(params=["reference", "compact", pytest.param("resident", marks=needs_cpp)])
def engine(request: Any) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def fast(net: Any, engine: str) -> Any:
    return eefast.accelerate(net, engine=engine)


def wait_for(condition: Callable[[], bool]) -> bool:
    """Threads end a moment after they were told to."""
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def stream_threads() -> int:
    return sum(thread.name.startswith("eefast-stream") for thread in threading.enumerate())


def no_threads_are_left() -> bool:
    return wait_for(lambda: stream_threads() == 0)


class TestOrder:
    def test_results_come_in_order_for_any_sizes(self, fast: Any, net: Any) -> None:
        x, sizes = images(120, SHAPE), [3, 0, 1, 31, PIECE, ALONE + 5]
        got = list(fast.stream(x.split(sizes)))
        assert [len(r.labels) for r in got] == sizes
        whole = fast(x)
        if fast.plan.engine == "resident":
            assert torch.equal(torch.cat([r.logits for r in got]), whole.logits)
        for r, wanted in zip(got, zip(*(part.split(sizes) for part in whole), strict=True), strict=True):
            assert_same_answers(r, ExitResult(*wanted), net)

    def test_memory_stays_bounded_on_an_endless_stream(self, fast: Any) -> None:
        x, read = images(5, SHAPE), []

        def endless() -> Iterator[Tensor]:
            while True:
                read.append(1)
                yield x

        results = fast.stream(endless())
        for i in range(50):
            assert len(next(results).labels) == 5
            assert len(read) <= i + 1 + 8 * torch.get_num_threads()

    def test_an_exception_comes_after_the_finished_results(self, fast: Any) -> None:
        def failing() -> Iterator[Tensor]:
            yield images(40, SHAPE)
            yield images(7, SHAPE)
            raise OSError("the camera is gone")

        results = fast.stream(failing())
        assert len(next(results).labels) == 40
        assert len(next(results).labels) == 7
        with pytest.raises(OSError, match="the camera is gone"):
            next(results)

    def test_a_bad_batch_is_refused_in_its_turn(self, fast: Any) -> None:
        x = images(9, SHAPE)
        results = fast.stream([x, x[:4].repeat(1, 2, 1, 1), x])
        assert len(next(results).labels) == 9
        with pytest.raises(ValueError, match=r"x has shape \(4, 2, 6, 7\)"):
            next(results)

    def test_it_plans_again_where_weights_change_on_the_way(self, engine: str) -> None:
        net, x = small(), images(20, SHAPE)
        fast = eefast.accelerate(net, engine=engine)

        def batches() -> Iterator[Tensor]:
            yield x
            net.load_state_dict(small(9).state_dict())
            yield x

        first, second = fast.stream(batches())
        assert not torch.equal(first.logits, second.logits)
        assert_same_answers(second, fast(x), net)
        assert engine != "resident" or torch.equal(second.logits, fast(x).logits)


def of_any_layout(buffer: Tensor) -> Callable[[list[Tensor]], Iterator[Tensor]]:
    def refilled(data: list[Tensor]) -> Iterator[Tensor]:
        for d in data:
            buffer.copy_(d)
            yield buffer
            buffer.fill_(7)

    return refilled


def other_tensors(data: list[Tensor]) -> Iterator[Tensor]:
    memory = torch.empty(20, *SHAPE)
    for i, d in enumerate(data):
        part = memory[i % 3 : i % 3 + len(d)]
        part.copy_(d)
        yield part


def ring(data: list[Tensor]) -> Iterator[Tensor]:
    memory = torch.empty(2, *data[0].shape)
    for i, d in enumerate(data):
        yield memory[i % 2].copy_(d)


def numpy_backed(data: list[Tensor]) -> Iterator[Tensor]:
    memory = data[0].numpy().copy()
    for d in data:
        memory[:] = d.numpy()
        yield torch.from_numpy(memory)


def by_a_list_of_one_tensor(data: list[Tensor]) -> Iterator[Tensor]:
    """Written to by its source, an iterator that is not a generator."""
    memory, left = torch.empty_like(data[0]), iter(data)

    def following() -> Tensor | None:
        d = next(left, None)
        return None if d is None else memory.copy_(d)

    return iter(following, None)


def wide(n: int) -> Tensor:
    return torch.empty(n, 1, 12, 20)[:, :, 3:9, 2:16:2]


KINDS: dict[str, Callable[[list[Tensor]], Iterator[Tensor]]] = {
    "the same tensor": of_any_layout(torch.empty(17, *SHAPE)),
    "channels-last": of_any_layout(torch.empty(17, *SHAPE).to(memory_format=torch.channels_last)),
    "every second pixel": of_any_layout(wide(17)),
    "other tensors in the same memory": other_tensors,
    "a ring": ring,
    "numpy": numpy_backed,
    "no generator": by_a_list_of_one_tensor,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(9)
def test_a_batch_is_what_it_was_when_it_was_handed_out(net: Any, fast: Any, kind: str) -> None:
    data = [images(17, SHAPE, seed) for seed in range(7)]
    expected = [one_by_one(net, d) for d in data]
    got = list(fast.stream(KINDS[kind](data)))
    assert len(got) == len(data)
    for result, wanted in zip(got, expected, strict=True):
        assert_same_answers(result, wanted, net)


def test_one_image_expanded_and_refilled(net: Any, fast: Any) -> None:
    one, data = torch.empty(1, *SHAPE), [images(1, SHAPE, seed) for seed in range(6)]
    got = list(fast.stream(one.copy_(d).expand(9, -1, -1, -1) for d in data))
    for result, d in zip(got, data, strict=True):
        assert_same_answers(result, one_by_one(net, d.expand(9, -1, -1, -1)), net)


@pytest.mark.parametrize("sizes", [(17,) * 6, (1,) * 40, (300, 2, 300)], ids=str)
def test_a_refilled_buffer_of_uint8_images(net: Any, fast: Any, sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    data = [torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=generator) for n in sizes]
    expected = [one_by_one(net, net.prepare(d)) for d in data]
    buffer = torch.empty(max(sizes), *SHAPE, dtype=torch.uint8)
    for result, wanted in zip(fast.stream(buffer[: len(d)].copy_(d) for d in data), expected, strict=True):
        assert_same_answers(result, wanted, net)


def test_a_refilled_buffer_in_half_precision(engine: str) -> None:
    if engine == "reference":
        pytest.skip("the reference engine runs in the network's dtype alone")
    net = small(3).to(torch.bfloat16)
    fast = eefast.accelerate(net, engine=engine, dtype=torch.float32)
    buffer, data = torch.empty(17, *SHAPE, dtype=torch.bfloat16), [images(17, SHAPE, s).bfloat16() for s in range(6)]
    expected = [fast(d) for d in data]
    for result, wanted in zip(fast.stream(buffer.copy_(d) for d in data), expected, strict=True):
        assert_same_answers(result, wanted, net)


def test_streams_under_autocast(net: Any, fast: Any) -> None:
    x = images(33, SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = fast(x), torch.cat([result.logits for result in fast.stream([x[:20], x[20:]])])
    torch.testing.assert_close(got, wanted.logits, rtol=2e-2, atol=2e-2 * float(wanted.logits.abs().max()))


@pytest.mark.parametrize("lazy", ["negative", "conjugate"])
def test_images_that_are_lazily_negated(net: Any, fast: Any, lazy: str) -> None:
    """The imaginary part of a conjugate, as of radio data."""
    z = torch.complex(images(9, SHAPE, 1), images(9, SHAPE, 2))
    x = z.conj().imag if lazy == "negative" else z.conj().real
    assert x.is_neg() == (lazy == "negative")
    assert_same_answers(next(iter(fast.stream([x]))), one_by_one(net, x.clone()), net)


def test_results_are_in_separate_memory(fast: Any) -> None:
    x = images(17, SHAPE)
    results = [fast(x), fast(x), *fast.stream([x] * 9), fast(x)]
    parts = [part for result in results for part in result]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == len(parts)


class Late:
    """A CUDA stream, or an event in it, at its slowest: work waits until its result is needed."""

    current: Any = None

    def __init__(self, *args: Any) -> None:
        self.work: list[Callable[[], None]] = []

    def wait_stream(self, other: Any) -> None:
        other.wait_event(other)

    def record_event(self) -> Any:
        return self

    def wait_event(self, event: Any) -> None:
        while event.work:
            event.work.pop(0)()


@pytest.mark.parametrize("at_once", [0.0, float("inf")], ids=["alone", "shared"])
def test_kernels_that_start_late_read_what_was_handed_out(
    net: Any, monkeypatch: pytest.MonkeyPatch, at_once: float
) -> None:
    """As on a GPU: a kernel may start only after the iterable has written to its buffer again on the current stream."""
    monkeypatch.setattr(streaming, "AT_ONCE", at_once)
    here = Late.current = Late()

    @contextmanager
    def on(side: Any) -> Iterator[None]:
        Late.current = side
        yield
        Late.current = here

    monkeypatch.setattr(torch.cuda, "Stream", Late)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Late.current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, side: None)
    fast = eefast.accelerate(net, engine="compact")

    def answer(given: Tensor, thresholds: Tensor, rule: Any) -> ExitResult:
        n = len(given)
        result = ExitResult(torch.empty(n, 3), torch.empty(n, dtype=torch.int64), torch.empty(n), torch.empty(n))
        assert Late.current is not here

        def work() -> None:
            for to, source in zip(result, fast.engine.run(given, thresholds), strict=True):
                to.copy_(source)

        Late.current.work.append(work)
        return result

    buffer, data = torch.empty(17, *SHAPE), [images(17, SHAPE, seed) for seed in range(8)]
    limits, changed = [net.thresholds.clone() * f for f in (1.0, 0.9)], itertools.cycle((1, 0))

    def refilled() -> Iterator[Tensor]:
        for d in data:
            yield buffer.copy_(d)
            net.thresholds.copy_(limits[next(changed)])

    expected = []
    for d, i in zip(data, itertools.cycle((0, 1)), strict=False):
        net.thresholds.copy_(limits[i])
        expected.append(one_by_one(net, d))
    net.thresholds.copy_(limits[0])
    monkeypatch.setattr(
        fast.engine, "stream", lambda batches: stream_on_cuda(batches, answer, torch.device("cuda")), raising=False
    )
    got = list(fast.stream(refilled()))
    net.thresholds.copy_(limits[0])
    for result, wanted in zip(got, expected, strict=True):
        assert_same_answers(result, wanted, net)


class TestThresholdsOnTheWay:
    @pytest.mark.parametrize("how", ["copy_", "a new tensor", "one by one", "through numpy"])
    @pytest.mark.sampled(5)
    def test_a_batch_is_answered_by_those_of_the_moment_it_was_handed_out(self, engine: str, how: str) -> None:
        net = small()
        fast, x = eefast.accelerate(net, engine=engine), images(40, SHAPE)
        settings = [net.thresholds.clone() * f for f in (1.0, 0.8, 1.2)]
        order = [0, 0, 1, 2, 2, 2, 0, 1]

        def change(i: int) -> None:
            if how == "copy_":
                net.thresholds.copy_(settings[i])
            elif how == "a new tensor":
                net.thresholds = settings[i].clone()
            elif how == "one by one":
                for k in range(net.num_exits):
                    net.thresholds[k] = settings[i][k]
            else:
                net.thresholds.numpy()[:] = settings[i].numpy()

        def batches() -> Iterator[Tensor]:
            for i in order:
                change(i)
                yield x

        expected = []
        for setting in settings:
            net.thresholds.copy_(setting)
            expected.append(one_by_one(net, x))
        assert len({tuple(e.exit_index.tolist()) for e in expected}) == 3
        for i, result in zip(order, fast.stream(batches()), strict=True):
            assert_same_answers(result, expected[i], net)

    def test_nan_is_refused_in_its_turn(self, engine: str) -> None:
        net = small()
        fast, x = eefast.accelerate(net, engine=engine), images(5, SHAPE)

        def batches() -> Iterator[Tensor]:
            yield x
            net.thresholds[0] = torch.nan
            yield x

        results = fast.stream(batches())
        assert len(next(results).labels) == 5
        with pytest.raises(ValueError, match="none of them NaN"):
            next(results)

    @pytest.mark.parametrize("how", ["copy_", "a new tensor"])
    def test_changed_by_another_thread(self, engine: str, how: str) -> None:
        """All exit at the first exit or all at the last; anything else shows that two settings were mixed."""
        net = small()
        fast, x, done = eefast.accelerate(net, engine=engine), images(37, SHAPE), threading.Event()
        first, last = torch.full((2,), -1.0), torch.full((2,), 2.0)
        seen: list[list[int]] = []

        def changing() -> None:
            for setting in itertools.cycle((first, last)):
                if how == "copy_":
                    net.thresholds.copy_(setting)
                else:
                    net.thresholds = setting.clone()
                if done.is_set():
                    break

        def calling() -> None:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                seen.extend(sorted(set(r.exit_index.tolist())) for r in [fast(x), net(x), *fast.stream([x] * 4)])
                if len(seen) > 120 and [0] in seen and [2] in seen:
                    break

        changer, callers = threading.Thread(target=changing), [threading.Thread(target=calling) for _ in range(2)]
        net.thresholds.copy_(first)
        for thread in (changer, *callers):
            thread.start()
        for thread in callers:
            thread.join()
        done.set()
        changer.join()
        assert {tuple(exits) for exits in seen} == {(0,), (2,)}


def test_thresholds_that_are_twice_half_of_a_change_are_read_again() -> None:
    """As another thread leaves them that changes them at every reading."""
    settings = [torch.tensor([-1.0, -1.0]), torch.tensor([2.0, 2.0])]

    class Changing(Tensor):
        readings = 0

        def tolist(self) -> Any:
            Changing.readings += 1
            if Changing.readings > 3:
                return super().tolist()
            self.copy_(settings[1])
            return [-1.0, 2.0]

    net = small()
    net.thresholds = settings[0].clone().as_subclass(Changing)
    assert net.limits()[0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("first", ["net", "compact", "reference"])
def test_a_criterion_and_its_thresholds_belong_together(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread changes both just when one of them has been read."""
    early, x = small(), images(33, SHAPE)
    fast = early if first == "net" else eefast.accelerate(early, engine=first)
    other = early.with_criterion("margin").eval()
    spread_thresholds(other, x, 0.5)
    limits = early.limits

    def late() -> Any:
        if early.criterion.name == "learned":
            early.criterion, early.thresholds = other.criterion, other.thresholds.clone()
        return limits()

    monkeypatch.setattr(early, "limits", late)
    assert_same_answers(fast(x), one_by_one(other, x), other)


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_another_engine_may_be_planned_on_the_way(first: torch.dtype) -> None:
    """The resident engine runs in float32, the compact one in any dtype."""
    net, x = small(), images(33, SHAPE)
    expected = one_by_one(net, x)
    fast = eefast.accelerate(net.to(first), engine="auto")
    then = torch.float64 if first == torch.float32 else torch.float32

    buffer: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for dtype in (first, first, then, then):
            net.to(dtype)
            buffer[:] = [x.to(dtype, copy=True)]
            yield buffer[0]

    results = list[ExitResult]()
    for result in fast.stream(batches()):
        buffer[0].fill_(7)  # what has been handed out may be written to, also while results come
        results.append(result)
    assert len(results) == 4
    for result in results:
        assert_same_answers(result, expected, net)


def test_many_streams_and_calls_leave_nothing() -> None:
    """The short form of `tests/helpers/soak.py`; there, three threads at a time, memory is what the long form shows."""
    soak = Path(__file__).parents[1] / "helpers" / "soak.py"
    asked = ("--streams", "30", "--calls", "100", "--plans", "0", "--growth", "40")
    done = subprocess.run([sys.executable, soak, *asked], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n")


class TestDroppedStreams:
    def test_the_garbage_collector_waits_for_no_stream(self, fast: Any, net: Any, engine: str) -> None:
        """In cycles, collected now and then, within the start and the end of other streams' threads."""
        x = images(40, SHAPE)
        expected = net(x)
        thresholds = gc.get_threshold()
        gc.set_threshold(20, 2, 2)
        try:
            for _ in range(60):
                results = fast.stream([x] * 4)
                assert torch.equal(next(results).exit_index, expected.exit_index)
                cycle: list[Any] = [results]
                cycle.append(cycle)
                del results, cycle
        finally:
            gc.set_threshold(*thresholds)
        gc.collect()
        assert no_threads_are_left()

    def test_closing_ends_what_has_not_begun(self, fast: Any) -> None:
        x, read = images(33, SHAPE), []
        results = fast.stream(read.append(1) or x for _ in itertools.count())
        next(results)
        results.close()
        before = len(read)
        with pytest.raises(StopIteration):
            next(results)
        assert no_threads_are_left()
        assert len(read) == before

    @needs_cpp
    def test_closing_early_waits_for_nothing_and_leaves_no_thread(self, net: Any) -> None:
        x = images(65, SHAPE)
        results = eefast.accelerate(net, engine="resident").stream(x for _ in range(1000))
        next(results)
        assert stream_threads() > 0
        results.close()
        assert no_threads_are_left()

    @needs_cpp
    def test_within_a_worker(self, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The garbage collector closes streams on another stream's thread, and on their own."""
        fast, x, collected = eefast.accelerate(net, engine="resident"), images(33, SHAPE), []
        run = fast.engine.run

        def collecting(*args: Any, **more: Any) -> ExitResult:
            collected.append(gc.collect())
            return run(*args, **more)  # type: ignore[no-any-return]

        monkeypatch.setattr(fast.engine, "run", collecting)
        gc.disable()
        try:
            for _ in range(5):
                results = fast.stream([x] * 9)
                next(results)
                cycle: list[Any] = [results]
                cycle.append(cycle)
                del results, cycle
            assert [len(r.labels) for r in fast.stream([x] * 3)] == [33] * 3
        finally:
            gc.enable()
        # Of two collections at a time the second one does nothing, so the last cycles may still be there.
        assert wait_for(lambda: collected.append(gc.collect()) or stream_threads() == 0)  # type: ignore[func-returns-value]
        assert sum(collected) > 0

    def test_a_failed_stream_keeps_nothing_alive(self, fast: Any) -> None:
        """Without the garbage collector: what was raised does not hold on to the frame that raised it."""
        alive: list[Any] = []

        def failing() -> Iterator[Tensor]:
            for _ in range(2):
                x = images(17, SHAPE)
                alive.append(weakref.ref(x))
                yield x
            raise OSError("the camera is gone")

        gc.collect()
        gc.disable()
        try:
            with pytest.raises(OSError, match="the camera is gone"):
                list(fast.stream(failing()))
            del failing
            assert wait_for(lambda: not any(r() is not None for r in alive))
        finally:
            gc.enable()


class TestSharedLaunches:
    """What `stream_on_cuda` launches, on streams that do nothing."""

    @pytest.fixture(autouse=True)
    def on_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[int] = []
        self.waited, self.work = 0, list[Any]()
        monkeypatch.setattr(torch.cuda, "Stream", Late)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
        monkeypatch.setattr(Tensor, "record_stream", lambda self, side: None)
        monkeypatch.setattr(streaming, "AT_ONCE", float("inf"))

    def wait_event(self, event: Any) -> None:
        self.waited += event is not self

    def answer(self, images: Tensor, thresholds: Tensor, rule: Any) -> ExitResult:
        """Of every image its first pixel and the first threshold."""
        self.launched.append(len(images))
        first = images[:, 0, 0, :1]
        return ExitResult(first, first[:, 0].long(), first[:, 0] + 1, thresholds[0].expand(len(images)).clone())

    def results(self, batches: Iterable[Batch]) -> list[ExitResult]:
        return list(stream_on_cuda(batches, self.answer, CUDA))

    @pytest.mark.parametrize(
        ("sizes", "launched"),
        [
            ([256] * 9, [2048, 256]),
            ([1] * 17, [8, 8, 1]),
            ([2000, 100, 3, 5000, 2, 0, 1], [2000, 103, 5000, 3]),
            ([2048] * 2, [2048] * 2),
            ([0], [0]),
            ([], []),
        ],
        ids=str,
    )
    def test_as_many_as_fit(self, sizes: list[int], launched: list[int]) -> None:
        x, limits, since = torch.arange(float(sum(sizes))).view(-1, 1, 1, 1), torch.ones(2), object()
        parts = x.split(sizes) if sizes else ()
        results = self.results(Batch(part, limits, since) for part in parts)
        assert self.launched == launched
        assert self.waited == len(launched)
        for result, part in zip(results, parts, strict=True):
            assert torch.equal(result.logits[:, 0], part.view(-1))
            assert torch.equal(result.confidence, part.view(-1) + 1)
            assert len(result.exit_index) == len(result.cost) == len(part)

    def test_others_start_a_launch(self) -> None:
        x, since = torch.zeros(3, 1, 2, 2), [object(), object()]
        of_each = Batch(x, torch.full((2, 3), 4.0), since[1])
        batches = [
            Batch(x, torch.full((2,), 1.0), since[0]),
            Batch(x, torch.full((2,), 2.0), since[1]),
            Batch(x.half(), torch.full((2,), 2.0), since[1]),
            Batch(x[:, :, :1].half(), torch.full((2,), 2.0), since[1]),
            *[of_each._replace(thresholds=torch.full((2,), 3.0), since=object()), of_each, of_each],
        ]
        results = self.results(batches)
        assert self.launched == [3] * 7
        assert [float(r.cost[0]) for r in results[:5]] == [1, 2, 2, 2, 3]

    def test_a_slow_source_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A batch that took long to read is launched before the next one is asked for."""
        x, limits, since, at = torch.zeros(3, 1, 1, 1), torch.ones(2), object(), list[int]()

        def slow() -> Iterator[Batch]:
            for _ in range(5):
                at.append(len(self.launched))
                clock[0] += 1.0
                yield Batch(x, limits, since)

        clock = [0.0]
        monkeypatch.setattr(streaming, "AT_ONCE", 0.5)
        monkeypatch.setattr(streaming.time, "perf_counter", lambda: clock[0])
        self.results(slow())
        assert at == [0, 1, 2, 3, 4]

    def test_a_batch_that_was_read_on_another_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The consumer goes on elsewhere while a batch that starts a launch waits for its turn."""
        x, waited = torch.zeros(3, 1, 1, 1), list[tuple[int, int]]()

        class Other(Late):
            def wait_stream(self, other: Any) -> None:
                waited.append((streams.index(self), streams.index(other)))

        streams = [Other(), Other()]
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[at])
        at = 0
        results = stream_on_cuda((Batch(x, torch.ones(2), object()) for _ in range(9)), self.answer, CUDA)
        for at in (0, 1, 1, 0):  # noqa: B007
            next(results)
        assert waited == [(1, 0), (0, 1)]

    def test_an_exception_comes_after_all_results_before(self) -> None:
        def failing() -> Iterator[Batch]:
            for _ in range(5):
                yield Batch(torch.zeros(3, 1, 1, 1), torch.ones(2), None)
            raise OSError("the camera is gone")

        results = stream_on_cuda(failing(), self.answer, CUDA)
        assert [len(next(results).cost) for _ in range(5)] == [3] * 5
        with pytest.raises(OSError, match="the camera is gone"):
            next(results)


@pytest.mark.parametrize("read", [0, 1, 2, 3])
def test_work_is_between_a_wait_and_a_record(read: int) -> None:
    """Also what ends it: the current CUDA stream may be another one after every result."""
    done: list[str] = []

    def work() -> Iterator[int]:
        try:
            for i in range(2):
                done.append("work")
                yield i
        finally:
            done.append("work")

    results = ordered(work(), lambda: done.append("wait"), lambda: done.append("record"))  # type: ignore[arg-type]
    for _ in range(read):
        next(results, None)
    results.close()  # type: ignore[attr-defined]
    assert done.count("work") == min(read + (0 < read < 3), 3)
    for before, now in itertools.pairwise(["record", *done]):
        assert now != "work" or before == "wait"
        assert before != "record" or now == "wait"
    assert done[-1:] == ["record"] * (read > 0)
