"""The compact engine's graphs: on a GPU as they are, on the CPU with a capture that keeps the work to run it again."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from exit_chains import spread
from graphs_on_cpu import SHAPE, assert_same, capture_on_cpu, network, planned, reading, run
from networks import images, lived_in, one_by_one, spread_thresholds

import eefast
from eefast import rules, zoo
from eefast.engines import Batch, CompactEngine, graphs
from eefast.planning import capture, launch_costs
from eefast.planning.fusing import fuse_convolutions
from eefast.planning.indexed_stages import indexed_stage
from eefast.profiles import OF_EACH
from eefast.result import concatenated


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)


@pytest.fixture(scope="module")
def net() -> Any:
    return network()


SIZES = (0, 1, 2, 3, 31, 32, 100)


@pytest.fixture(scope="module")
def expected(net: Any) -> dict[int, Any]:
    """What the one-by-one loop answers, by the number of images."""
    return {n: one_by_one(net, images(n, SHAPE, seed=n)) if n else net(images(0, SHAPE)) for n in SIZES}


@pytest.fixture(scope="module")
def with_graphs(net: Any) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        capture_on_cpu(patched)
        return planned(net, 31)


def stream(engine: Any, net: Any, chunks: Iterable[torch.Tensor]) -> Any:
    return engine.stream(Batch(x, net.thresholds, net) for x in chunks)


@pytest.mark.usefixtures("on_cpu")
class TestOnTheCpu:
    @pytest.mark.parametrize("n", SIZES)
    @pytest.mark.parametrize("queues", [1, 2])
    @pytest.mark.parametrize("pattern", ["never", "always", "second"])
    def test_answers_of_the_one_by_one_loop(
        self, net: Any, with_graphs: Any, expected: dict[int, Any], pattern: str, queues: int, n: int
    ) -> None:
        p, p.graphs.waits = with_graphs, 0
        reads = {"never": lambda _: False, "always": lambda _: True, "second": lambda stage: stage == 1}[pattern]
        reading(p, reads, queues)
        assert_same(run(p, net, images(n, SHAPE, seed=n)), expected[n])
        assert pattern != "never" or p.graphs.waits == 0

    def test_an_unreferenced_plan_frees_its_memory_at_once(self, net: Any) -> None:
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

    @pytest.mark.parametrize("n", SIZES)
    @pytest.mark.sampled(2)
    def test_thresholds_of_each_image(self, net: Any, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        """In graphs of their own, which are captured once; batches of both kinds take turns."""
        p, x = planned(net, 8), images(n, SHAPE)
        of_each = torch.stack([net.thresholds, torch.full_like(net.thresholds, torch.nan), net.thresholds + 0.1], dim=1)
        limits = of_each[:, torch.arange(n) % 3]
        expected = net.first_exits(x, limits, net.criterion)
        assert_same(p.run(x, limits), expected)
        monkeypatch.setattr(graphs, "captured", lambda *_: pytest.fail("captured again"))
        assert_same(p.run(x, limits), expected)
        assert_same(run(p, net, x), net(x))
        batches = [Batch(x, limits, OF_EACH), Batch(x, net.thresholds, net), *[Batch(x, limits, OF_EACH)] * 20]
        for i, got in enumerate(p.stream(batches)):
            assert_same(got, net(x) if i == 1 else expected)

    @pytest.mark.parametrize("of_each", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_rules_that_carry(self, net: Any, of_each: bool) -> None:
        """Streams of more batches than there are slots, whose survivors merge; other tables in the same graphs."""
        first, x = rules.fitted([[0.3, 1.0, 0.0, 0.0, 0.2]] * 4, [0.0] * 4, keep=0.5, logits=0.7), images(39, SHAPE)
        with torch.no_grad():
            said = torch.stack([torch.cat([a.logits, a.confidence_logit[:, None]], 1) for a in net.all_exits(x)], 1)
        carrying = net.with_criterion(first, spread(said, first)).eval()
        p, limits = planned(carrying, 8), carrying.thresholds
        if of_each:
            limits = limits[:, None].repeat(1, 39)
            limits[1, ::7] = torch.nan
        for rule in (first, rules.survival(3)):
            with torch.no_grad():
                expected = carrying.first_exits(x, limits, carrying.criterion, rule.table())
            batches = zip(x.split(3), limits.split(3, 1) if of_each else [limits] * 13, strict=True)
            since = OF_EACH if of_each else limits
            made = [Batch(part, limit, since, rule.table()) for part, limit in batches]
            assert_same(p.run(x, limits, rule.table()), expected)
            assert_same(concatenated(list(p.stream(made))), expected)
            assert len(expected.exit_index.unique()) > 1
            assert not p.graphs.busy.locked()

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

    def test_calls_without_graphs_are_logged_once(self, net: Any, caplog: pytest.LogCaptureFixture) -> None:
        p, x = planned(net, 8), images(12, SHAPE)
        left = stream(p, net, x.split(4))
        next(left)
        for _ in range(2):
            run(p, net, x)
        assert caplog.text.count("the CUDA graphs of the compact engine are in use") == 1
        left.close()
        run(p, net, x)
        assert caplog.text.count("in use") == 1

    def test_streams_of_other_thresholds_do_not_mix(self, net: Any) -> None:
        early = net.with_criterion("learned", net.thresholds.tolist()).eval()
        fast, x = eefast.accelerate(early, engine="compact", max_batch_size=16), images(8, SHAPE)
        settings = [net.thresholds.clone(), torch.tensor([0.3, 0.5, 0.4]), torch.tensor([0.9, 0.2, 0.1])]
        expected = []
        for setting in settings:
            early.thresholds.copy_(setting)
            expected.append(one_by_one(early, x))
        order = [0, 1, 1, 2, 0, 0, 2]

        def batches() -> Iterator[torch.Tensor]:
            for i in order:
                early.thresholds.copy_(settings[i])
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

    def test_a_stream_may_go_on_in_another_cuda_stream(self, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_during_captures(monkeypatch: pytest.MonkeyPatch, collects: bool) -> None:
    """What is freed then could call CUDA."""
    for name in ("synchronize", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    if not collects:
        gc.disable()
    try:
        with graphs.capturing(torch.device("cuda")):
            assert not gc.isenabled()
        assert gc.isenabled() == collects
    finally:
        gc.enable()


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

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_in_half_precision(self, net: Any, on_gpu: Any, dtype: torch.dtype) -> None:
        x = images(257, SHAPE)
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
        on_host = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 3)
        spread_thresholds(on_host, images(64, SHAPE), 0.4)
        there = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 3).cuda()
        there.thresholds.copy_(on_host.thresholds)
        fast, x = eefast.accelerate(there, engine="compact", max_batch_size=32), images(40, SHAPE)
        self.answered(fast, on_host, x)
        with torch.no_grad():
            for n in (on_host, there):
                next(n.parameters()).mul_(0.5)
        self.answered(fast, on_host, x)

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
