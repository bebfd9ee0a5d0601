"""The compact engine's graphs: on a GPU as they are, on the CPU with a capture that keeps the work to run it again."""

from __future__ import annotations

import gc
import itertools
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import images, lived_in, one_by_one, spread_thresholds

import eefast
from eefast import zoo
from eefast.engines import Batch, CompactEngine, GraphEngine, graphs
from eefast.engines.host_reads import HostReadPolicy
from eefast.engines.stores import Stores
from eefast.planning import Options, build, capture, launch_costs
from eefast.planning.fusing import fuse_convolutions
from eefast.planning.indexed_stages import indexed_stage
from eefast.planning.launch_costs import LaunchCosts

SHAPE = (3, 16, 16)


class NoEvent:
    def record(self) -> None:
        pass

    wait = synchronize = record


@contextmanager
def nowhere(device: torch.device) -> Iterator[None]:
    yield None


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays do the work anew; sizes, queues, memory and everything of the host are as on a GPU."""

    def keep(work: Callable[[], None], fill: Callable[[], None], pool: Any) -> Callable[[], None]:
        work()
        fill()
        return work

    monkeypatch.setattr(graphs, "captured", keep)
    monkeypatch.setattr(graphs, "capturing", nowhere)
    monkeypatch.setattr(graphs, "event", NoEvent)
    monkeypatch.setattr(graphs, "on", lambda device: nullcontext())
    monkeypatch.setattr(graphs, "reserved", lambda device: 0)
    monkeypatch.setattr(capture, "forget", lambda: None)
    monkeypatch.setattr(capture, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(launch_costs, "load", lambda device: LaunchCosts(launch=5e-6, wait=15e-6))
    monkeypatch.setattr(launch_costs, "seconds", lambda work, device: (work(), 1e-4)[1])


@pytest.fixture(scope="module")
def net() -> Any:
    net = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 1)
    spread_thresholds(net, images(64, SHAPE), 0.4)
    return net


def planned(net: Any, capacity: int, example_inputs: torch.Tensor | None = None) -> Any:
    return build(net, Options("compact", None, example_inputs, capacity))


@torch.no_grad()
def run(engine: Any, net: Any, x: torch.Tensor) -> Any:
    """The engine by the thresholds of a network, which may be another one than its own."""
    return engine.run(x, net.thresholds)


def stream(engine: Any, net: Any, chunks: Iterable[torch.Tensor]) -> Any:
    return engine.stream(Batch(x, net.thresholds, net) for x in chunks)


def reading(engine: Any, reads: Callable[[int], bool], queues: int) -> None:
    """Where the host reads a count, though the planner might not choose so."""

    class Fixed(HostReadPolicy):
        def __call__(self, stage: int, most: int, expected: float) -> tuple[bool, float]:
            return reads(stage), expected * 0.6

        def seconds(self, rows: int) -> float:
            return 0.0 if self.queues == queues else 1.0

    engine.graphs.policies = [Fixed(p.times, p.queues) for p in engine.graphs.policies]


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.exit_index, expected.exit_index)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_cpu")
class TestOnTheCpu:
    @pytest.mark.parametrize("queues", [1, 2])
    @pytest.mark.parametrize("pattern", ["never", "always", "second"])
    def test_answers_of_the_one_by_one_loop(self, net: Any, pattern: str, queues: int) -> None:
        p = planned(net, 31)
        reads = {"never": lambda _: False, "always": lambda _: True, "second": lambda stage: stage == 1}[pattern]
        reading(p, reads, queues)
        for n in (0, 1, 2, 3, 31, 32, 100):
            x = images(n, SHAPE, seed=n)
            assert_same(run(p, net, x), one_by_one(net, x) if n else net(x))
        assert pattern != "never" or p.graphs.waits == 0

    def test_a_plan_that_nobody_holds_frees_its_memory_at_once(self, net: Any) -> None:
        p = planned(net, 8)
        run(p, net, images(5, SHAPE))
        held = weakref.ref(p.graphs)
        # Here the work itself is kept, which knows the graphs; a CUDA graph does not.
        p.graphs.replays.clear()
        gc.disable()
        try:
            del p
            assert held() is None
        finally:
            gc.enable()

    def test_code_around_it_compiles(self, net: Any) -> None:
        fast, x = eefast.accelerate(net, engine="compact", max_batch_size=8), images(5, SHAPE)

        @torch.compile(backend="eager")
        def around(batch: torch.Tensor) -> torch.Tensor:
            return fast(batch * 1.0).exit_index + 1

        assert torch.equal(around(x), net(x).exit_index + 1)

    def test_no_capture_in_the_hot_path_for_any_batch_size(self, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        p = planned(net, 9)
        monkeypatch.setattr(graphs, "captured", lambda *_: pytest.fail("captured again"))
        monkeypatch.setattr(p, "run_eagerly", lambda *_: pytest.fail("ran without graphs"))
        for n in range(30):
            run(p, net, images(n, SHAPE))

    def test_thresholds_may_change_at_any_time(self, net: Any) -> None:
        p, x = planned(net, 8), images(12, SHAPE)
        other = net.with_criterion("learned", [0.3, 0.5, 0.4])
        assert_same(run(p, net, x), net(x))
        assert_same(run(p, other, x), other(x))
        assert_same(run(p, net, x), net(x))

    def test_out_of_memory_leaves_fewer_sizes_then_smaller_batches(
        self, net: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keep, budget = graphs.captured, 0

        def short(*args: Any) -> Any:
            nonlocal budget
            budget -= 1
            if budget < 0:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return keep(*args)

        class Counted(graphs.Graphs):
            def __init__(self, *args: Any) -> None:
                nonlocal budget
                budget = allowed
                super().__init__(*args)

        monkeypatch.setattr(graphs, "captured", short)
        monkeypatch.setattr(capture, "Graphs", Counted)
        x = images(20, SHAPE)
        seen = []
        for allowed in (1000, 100, 60, 30, 20, 0):
            p = planned(net, 64)
            got = run(p, net, x)
            assert_same(got, net(x))
            g = getattr(p, "graphs", None)
            seen.append((g.capacity, g.queues, len(g.sizes)) if g else None)
            reason = p.plan.reason
            assert ("memory was full" in reason or "memory is full" in reason) == (allowed < 1000)
        full = len(graphs.sizes(64))
        assert seen == [(64, 2, full), (64, 2, 9), (64, 2, 7), (64, 1, 7), (16, 1, 5), None]

    def test_a_stage_that_cannot_be_captured(self, net: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
        def refused(*args: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(graphs, "captured", refused)
        p, x = planned(net, 8), images(5, SHAPE)
        assert "without CUDA graphs: RuntimeError: operation not permitted" in str(p.plan)
        assert_same(run(p, net, x), net(x))

    @pytest.mark.parametrize("part", ["logits", "confidence"])
    def test_answers_that_are_no_numbers_mean_no_graphs(
        self, net: Any, part: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        take = Stores.take

        def poisoned(self: Any, slot: int, size: int) -> Any:
            result = take(self, slot, size)
            getattr(result, part)[-1] = torch.nan
            return result

        monkeypatch.setattr(Stores, "take", poisoned)
        p, x = planned(net, 8), images(5, SHAPE)
        assert f"without CUDA graphs: RuntimeError: their answers differ by nan of the largest ({part})" in str(p.plan)
        assert not isinstance(p, GraphEngine)
        assert_same(run(p, net, x), net(x))

    def test_wrong_answers_mean_no_graphs(self, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        advance = Stores.advance

        def forgetful(self: Any, queue: int, stage: int, rows: int, counted: bool = False) -> None:
            advance(self, queue, stage, rows, counted)
            if stage == 1:
                # The survivors' maps lie in another order than their positions.
                waiting = self.before(queue, stage + 1)
                waiting.features.copy_(waiting.features.roll(1, 0))

        monkeypatch.setattr(Stores, "advance", forgetful)
        p, x = planned(net, 8), images(5, SHAPE)
        assert "without CUDA graphs: RuntimeError: their answers differ by" in str(p.plan)
        assert not isinstance(p, GraphEngine)
        assert_same(run(p, net, x), net(x))

    def test_other_sizes_and_calls_meanwhile_run_without_graphs(self, net: Any) -> None:
        p = planned(net, 8)
        large = images(5, (3, 24, 24))
        assert_same(run(p, net, large), net(large))
        x = images(12, SHAPE)
        for result, part in zip(stream(p, net, x.split(4)), x.split(4), strict=True):
            assert p.graphs.busy.locked()
            assert_same(result, net(part))
            assert_same(run(p, net, part), net(part))
        assert not p.graphs.busy.locked()

    def test_streams_of_other_thresholds_do_not_mix(self, net: Any) -> None:
        own = net.with_criterion("learned", net.thresholds.tolist()).eval()
        fast, x = eefast.accelerate(own, engine="compact", max_batch_size=16), images(8, SHAPE)
        settings = [net.thresholds.clone(), torch.tensor([0.3, 0.5, 0.4]), torch.tensor([0.9, 0.2, 0.1])]
        expected = []
        for setting in settings:
            own.thresholds.copy_(setting)
            expected.append(one_by_one(own, x))
        order = [0, 1, 1, 2, 0, 0, 2]

        def batches() -> Iterator[torch.Tensor]:
            for i in order:
                own.thresholds.copy_(settings[i])
                yield x

        for i, result in zip(order, fast.stream(batches()), strict=True):
            assert fast.engine.graphs.busy.locked()
            assert_same(result, expected[i])
        assert not fast.engine.graphs.busy.locked()

    def test_a_dropped_stream_lets_go_when_it_is_collected(self, net: Any) -> None:
        """Calls meanwhile run without graphs, and what waited in it is gone."""
        p, x = planned(net, 8), images(12, SHAPE)
        gc.disable()
        try:
            results = stream(p, net, x.split(4))
            next(results)
            cycle: list[Any] = [results]
            cycle.append(cycle)
            del results, cycle
            assert p.graphs.busy.locked()
            assert_same(run(p, net, x), one_by_one(net, x))
            collector = threading.Thread(target=gc.collect)
            collector.start()
            collector.join()
        finally:
            gc.enable()
        assert not p.graphs.busy.locked()
        assert not any(w.count.any() for queue in p.graphs._waiting for w in queue)
        assert_same(run(p, net, x), one_by_one(net, x))

    def test_whoever_goes_on_may_do_so_in_another_cuda_stream(self, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between two results, and before it is closed elsewhere, the work queued so far is what others wait for."""
        order: list[str] = []
        p, x = planned(net, 8), images(12, SHAPE)
        monkeypatch.setattr(p.graphs.finished, "record", lambda: order.append("record"), raising=False)
        monkeypatch.setattr(p.graphs.finished, "wait", lambda: order.append("wait"), raising=False)
        replays = {
            key: lambda replay=replay: (order.append("work"), replay()) for key, replay in p.graphs.replays.items()
        }
        monkeypatch.setattr(p.graphs, "replays", replays)
        clear = p.graphs.clear
        monkeypatch.setattr(p.graphs, "clear", lambda: (order.append("work"), clear()))
        results = stream(p, net, x.split(4))
        for _ in range(2):
            next(results)
            assert order[-1] == "record"
        results.close()
        for before, now in itertools.pairwise(order):
            # Work follows a wait or work; what follows a record waits.
            assert now != "work" or before != "record"
        assert order[-1] == "record"

    def test_threads(self, net: Any) -> None:
        p, batches = planned(net, 8), [images(n, SHAPE, seed=n) for n in (3, 8, 20, 1)]
        expected, failed = [net(x) for x in batches], []

        def work(i: int) -> None:
            for _ in range(5):
                try:
                    with torch.no_grad():
                        assert_same(run(p, net, batches[i]), expected[i])
                except AssertionError as error:
                    failed.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not failed

    def test_survivors_of_the_example_guide_the_plan(self, net: Any) -> None:
        x = images(40, SHAPE)
        taken = net(x).exit_index
        p = planned(net, 8, x)
        arriving = [int((taken >= i).sum()) for i in range(4)]
        expected = tuple(b / a for a, b in itertools.pairwise(arriving))
        assert p.graphs.policies[0].times.survivors == pytest.approx(expected)
        assert planned(net, 8).graphs.policies[0].times.survivors == (0.5,) * 3

    def test_the_plan_tells_sizes_queues_and_memory(self, net: Any) -> None:
        p = planned(net, 8)
        assert f"{2 * 4 * 7} CUDA graphs, 7 batch sizes up to 8, 2 under way at a time, 0 MB" in str(p.plan)
        assert len(re.findall(r"; (the host reads the count|carried along|the next stage counts)\n", str(p.plan))) == 3
        assert str(p.plan).endswith("; the end")

    def test_stages_that_count_their_rows_themselves(self, net: Any) -> None:
        p = planned(net, 8)
        counted = []
        for step in p.steps:
            fused, _, _ = fuse_convolutions(step.stage)
            form, why = indexed_stage(fused)
            counted.append(replace(step, counted=form))
        assert sum(s.counted is not None for s in counted) == 4, why
        with torch.no_grad():
            p = capture.with_graphs(CompactEngine(net, p.plan, counted), None, 8)
        assert (0, 1, None) in p.graphs.replays
        assert (0, 0, None) not in p.graphs.replays
        reading(p, lambda stage: False, 1)
        for policy in p.graphs.policies:
            policy.counted = lambda stage, most, expected: stage > 0
        for n in (1, 3, 8, 20):
            x = images(n, SHAPE, seed=n)
            assert_same(run(p, net, x), one_by_one(net, x))
        assert p.graphs.waits == 0


def test_switched_off(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "DEVICES", ("cpu",))
    monkeypatch.setenv("EEFAST_GRAPHS", "0")
    assert not isinstance(planned(net, 8), GraphEngine)


@pytest.mark.gpu
class TestOnTheGpu:
    @pytest.fixture(scope="class")
    def on_gpu(self) -> Any:
        net = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 1)
        spread_thresholds(net, images(64, SHAPE), 0.4)
        return net.cuda()

    @pytest.fixture(autouse=True)
    def exactly(self) -> Iterator[None]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield

    def answered(self, fast: Any, net: Any, x: torch.Tensor) -> None:
        got = fast(x.cuda())
        assert_same(type(got)(*(part.cpu() for part in got)), net(x))

    def test_answers_in_every_way(self, net: Any, on_gpu: Any) -> None:
        fast = eefast.accelerate(on_gpu, engine="compact", max_batch_size=64)
        assert "CUDA graphs" in str(fast.plan)
        for queues in (1, 2):
            for reads in (lambda stage: False, lambda stage: True, lambda stage: stage == 1):
                reading(fast.engine, reads, queues)
                for n in (0, 1, 3, 31, 64, 257):
                    self.answered(fast, net, images(n, SHAPE, seed=n))

    def test_no_host_read_where_no_count_is_waited_for(self, on_gpu: Any) -> None:
        fast, x = eefast.accelerate(on_gpu, engine="compact", frozen=True, max_batch_size=64), images(64, SHAPE).cuda()
        reading(fast.engine, lambda stage: False, 1)
        fast(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert fast.engine.graphs.waits == 0

    def test_in_half_precision(self, net: Any, on_gpu: Any) -> None:
        x = images(257, SHAPE)
        for dtype in (torch.float16, torch.bfloat16):
            fast = eefast.accelerate(on_gpu, engine="compact", dtype=dtype, max_batch_size=64)
            got, expected = fast(x.cuda().to(dtype)), net(x)
            same = got.exit_index.cpu() == expected.exit_index
            assert same.float().mean() > 0.9
            error = (got.logits.cpu() - expected.logits)[same].abs().max()
            assert error < (0.05 if dtype == torch.float16 else 0.4) * expected.logits.abs().max()

    def test_device_counted_stages(self, net: Any, on_gpu: Any) -> None:
        fast = eefast.accelerate(on_gpu, engine="compact", max_batch_size=64)
        assert (0, 1, None) in fast.engine.graphs.replays
        reading(fast.engine, lambda stage: False, 1)
        for policy in fast.engine.graphs.policies:
            policy.counted = lambda stage, most, expected: stage > 0
        for n in (1, 3, 31, 64, 257):
            self.answered(fast, net, images(n, SHAPE, seed=n))

    def test_streams_of_batches_and_of_cuda(self, net: Any, on_gpu: Any) -> None:
        fast = eefast.accelerate(on_gpu, engine="compact", max_batch_size=64)
        x = images(300, SHAPE)
        for result, part in zip(fast.stream(p.cuda() for p in x.split(30)), x.split(30), strict=True):
            assert_same(type(result)(*(p.cpu() for p in result)), net(part))
        for _ in range(4):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.answered(fast, net, x[:64])

    def test_a_buffer_that_is_written_to_again(self, net: Any, on_gpu: Any) -> None:
        fast = eefast.accelerate(on_gpu, engine="compact", max_batch_size=64)
        data, buffer = [images(30, SHAPE, seed=s) for s in range(9)], torch.empty(30, *SHAPE, device="cuda")
        for result, d in zip(fast.stream(buffer.copy_(d) for d in data), data, strict=True):
            assert_same(type(result)(*(p.cpu() for p in result)), net(d))

    def test_a_stream_goes_on_in_another_cuda_stream(self, net: Any, on_gpu: Any) -> None:
        fast, data = eefast.accelerate(on_gpu, engine="compact", max_batch_size=64), images(300, SHAPE).split(30)
        there = [d.cuda() for d in data]
        torch.cuda.synchronize()
        results = fast.stream(there)
        for d in data:
            with torch.cuda.stream(torch.cuda.Stream()):
                result = next(results)
                assert_same(type(result)(*(p.cpu() for p in result)), net(d))

    def test_changed_weights_renew_the_graphs(self, on_gpu: Any) -> None:
        own = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 3)
        spread_thresholds(own, images(64, SHAPE), 0.4)
        there = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 3).cuda()
        there.thresholds.copy_(own.thresholds)
        fast, x = eefast.accelerate(there, engine="compact", max_batch_size=32), images(40, SHAPE)
        self.answered(fast, own, x)
        with torch.no_grad():
            for n in (own, there):
                next(n.parameters()).mul_(0.5)
        self.answered(fast, own, x)

    def test_inside_of_compiled_code_autocast_and_inference_mode(self, net: Any, on_gpu: Any) -> None:
        fast, x = eefast.accelerate(on_gpu, engine="compact", max_batch_size=32), images(20, SHAPE)

        @torch.compile(backend="eager")
        def around(batch: torch.Tensor) -> torch.Tensor:
            return fast(batch * 1.0).exit_index + 0

        assert torch.equal(around(x.cuda()).cpu(), net(x).exit_index)
        with torch.inference_mode():
            self.answered(fast, net, x)
        with torch.autocast("cuda", torch.float16):
            self.answered(fast, net, x)
        self.answered(fast, net, x)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
    def test_on_the_second_device(self, net: Any) -> None:
        there = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 1).to("cuda:1")
        there.thresholds.copy_(net.thresholds)
        x, fast = images(40, SHAPE), eefast.accelerate(there, engine="compact", max_batch_size=32)
        got = fast(x.to("cuda:1"))
        assert_same(type(got)(*(part.cpu() for part in got)), net(x))

    def test_the_table_of_the_device_is_kept(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        device = torch.device("cuda")
        table = launch_costs.load(device)
        assert 0 < table.launch < 1e-3
        assert 0 <= table.wait < 1e-3
        monkeypatch.setattr(launch_costs, "measure", lambda device: pytest.fail("measured again"))
        assert launch_costs.load(device) == table
