"""The resident engine by `accelerate`: what it plans and why, what it refuses, streams of batches."""

import copy
import threading
import time

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import nn

import eefast
from eefast import ops, zoo
from eefast.engines.streaming import PIECE
from eefast.planning import planner, probe, tuning

pytestmark = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")


@pytest.fixture(scope="module")
def net():
    made = lived_in(zoo.eenet("eenet20", 3, "linear", "conv1", input_shape=(3, 16, 16)), 1)
    spread_thresholds(made, images(65, (3, 16, 16)), 0.4)
    return made


@pytest.fixture(scope="module")
def x():
    return images(65, (3, 16, 16))


@pytest.fixture
def fresh(monkeypatch):
    """Nothing was measured before."""
    monkeypatch.setattr(tuning, "choices", {})
    monkeypatch.setattr(planner, "speeds", {})


def test_auto_takes_the_faster_engine_and_says_why(net, x, fresh):
    found = eefast.accelerate(net).plan
    (speeds,) = planner.speeds.values()
    assert found.engine == ("resident" if speeds[0] <= speeds[1] else "compact")
    other = {"resident": "compact", "compact": "resident"}[found.engine]
    assert f"as fast as {other} (16 images to the final exit: " in str(found)


def test_sections_take_the_fastest_algorithm_and_the_plan_shows_it(net, x, fresh, monkeypatch):
    # F(2×2) wins at the first size, F(4×4) in groups at the second, direct convolution at the last.
    best = [(2, 1), (4, 4), (0, 1)]
    run = tuning.run

    def timed(net, program, images, limits, seconds=None):
        if seconds is not None:
            mine = zip(program.algorithms, program.groups.tolist(), strict=True)
            seconds += torch.tensor([1.0 if a == b else 2.0 for a, b in zip(mine, best, strict=True)])
        return run(net, program, images, limits, seconds if seconds is None else seconds.clone())

    monkeypatch.setattr(tuning, "run", timed)
    fast = eefast.accelerate(net, engine="resident")
    assert (fast.engine.program.algorithms, fast.engine.program.group_sizes) == ((2, 4, 0), (1, 4, 1))
    text = str(fast.plan)
    assert "16×16 F(2×2), 8×8 F(4×4) by 4" in text
    assert "4×4 direct" in text
    assert "Winograd's logits differ from direct convolution's by" in text
    assert_same_answers(fast(x), one_by_one(net, x), net)


def test_winograd_that_errs_too_much_gives_way_to_direct_convolution(net, x, fresh, monkeypatch):
    monkeypatch.setattr(tuning, "fastest", lambda *args: ((4, 4, 4), (1, 1, 1)))
    fast = eefast.accelerate(net, engine="resident")
    assert fast.engine.program.algorithms == (4, 4, 4)
    error = float(str(fast.plan).split("differ from direct convolution's by ")[1].split()[0])
    assert 1e-8 < error < tuning.WINOGRAD_BOUND
    monkeypatch.setattr(tuning, "WINOGRAD_BOUND", error / 1.5)
    some = eefast.accelerate(net, engine="resident").engine.program.algorithms
    assert some != (4, 4, 4)
    monkeypatch.setattr(tuning, "WINOGRAD_BOUND", 0.0)
    assert eefast.accelerate(net, engine="resident").engine.program.algorithms == (0, 0, 0)


def test_direct_convolution_can_be_forced(net, x, fresh, monkeypatch):
    monkeypatch.setenv("EEFAST_CONV", "direct")
    fast = eefast.accelerate(net, engine="resident")
    assert not any(fast.engine.program.algorithms)
    assert "F(" not in str(fast.plan)
    assert_same_answers(fast(x), one_by_one(net, x), net)
    monkeypatch.setenv("EEFAST_CONV", "fft")
    with pytest.raises(ValueError, match="EEFAST_CONV='fft' is unknown; set it to direct"):
        eefast.accelerate(net, engine="resident")


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1, groups=4)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net: net.double(), "computes in float32 or bfloat16, not in torch.float64"),
        (lambda net: net.stages[1].append(Grouped()), r"stage 1 has Conv2d\(32, 32.*groups=4"),
        (lambda net: net.stages[1].append(nn.GELU()), "stage 1 has GELU.*no step for"),
    ],
)
def test_what_it_cannot_run_is_refused_by_name_and_auto_runs_compact(net, x, change, reason):
    net = copy.deepcopy(net)
    change(net)
    with pytest.raises(ValueError, match=f"engine='resident' cannot run: .*{reason}.*use engine='compact' or 'auto'"):
        eefast.accelerate(net, engine="resident")
    fast = eefast.accelerate(net)
    assert fast.plan.engine == "compact"
    assert "the resident engine cannot run: " in str(fast.plan)
    given = x.to(next(net.parameters()).dtype)
    assert_same_answers(fast(given), one_by_one(net, given), net)


def test_a_frozen_network_is_not_looked_at_again(net, x):
    net = copy.deepcopy(net)
    fast = eefast.accelerate(net, engine="resident", frozen=True)
    before = fast(x)
    for p in net.parameters():
        p.data.mul_(0.5)
    net.load_state_dict(lived_in(copy.deepcopy(net), 9).state_dict() | {"thresholds": net.thresholds})
    assert torch.equal(fast(x).logits, before.logits)
    net.thresholds.fill_(2.0)
    assert fast(x).exit_index.tolist() == [3] * len(x)


def test_examples_are_what_is_measured_on(net, x, monkeypatch):
    seen = []
    tuned = tuning.tuned

    def recorded(net, lowered, bfloat16, images):
        seen.append(images)
        return tuned(net, lowered, bfloat16, images)

    monkeypatch.setattr(tuning, "tuned", recorded)
    eefast.accelerate(net, engine="resident", example_inputs=x[:3])
    assert torch.equal(seen[0], x[torch.arange(probe.IMAGES) % 3])
    with pytest.raises(ValueError, match=r"x has shape \(3, 16\)"):
        eefast.accelerate(net, engine="resident", example_inputs=x[0, :, :, 0])


@pytest.mark.skipif(ops.CPP_MISSING or ops.instruction_set() != "avx512_bf16", reason="needs AVX512-BF16")
def test_bfloat16_flips_only_near_thresholds(net, x):
    fast, expected = eefast.accelerate(net, engine="resident", dtype=torch.bfloat16), one_by_one(net, x)
    assert not any(fast.engine.program.algorithms)
    got = fast(x)
    flips = int((got.exit_index != expected.exit_index).sum())
    assert flips <= len(x) // 10
    same = got.exit_index == expected.exit_index
    assert float((got.confidence - expected.confidence)[same].abs().max()) < 0.05


class Answered(nn.Module):
    """What a program answers, as a module that can be exported."""

    def __init__(self, engine, thresholds):
        super().__init__()
        program = engine.program
        for name in ("steps", "maps", "groups", "weights", "packed"):
            self.register_buffer(name, getattr(program, name))
        self.register_buffer("thresholds", thresholds.clone())
        self.rest = engine.plan.criterion, engine.net.num_classes, program.bfloat16

    def forward(self, x):
        tables = self.steps, self.maps, self.groups, self.weights, self.packed
        return torch.ops.eefast.resident_forward(x, *tables, self.thresholds, *self.rest)


def test_exported_with_a_dynamic_batch_it_answers_any_size(net, x):
    module, batch = (
        Answered(eefast.accelerate(net, engine="resident").engine, net.thresholds),
        torch.export.Dim("batch"),
    )
    exported = torch.export.export(module, (x[:5],), dynamic_shapes={"x": {0: batch}}).module()
    for n in (1, 5, 31, 65):
        for got, wanted in zip(exported(x[:n]), module(x[:n]), strict=True):
            assert len(got) == n
            assert torch.equal(got, wanted)


class TestStream:
    @pytest.fixture(params=["compact", "resident"])
    def fast(self, net, request):
        return eefast.accelerate(net, engine=request.param)

    def test_results_come_in_order_for_any_sizes(self, fast, net, x):
        sizes = [3, 0, 1, 31, PIECE, 14]
        got = list(fast.stream(x.split(sizes)))
        assert [len(r.labels) for r in got] == sizes
        whole = fast(x)
        if fast.plan.engine == "resident":
            assert torch.equal(torch.cat([r.logits for r in got]), whole.logits)
        for r, wanted in zip(got, zip(*(part.split(sizes) for part in whole), strict=True), strict=True):
            assert_same_answers(r, eefast.ExitResult(*wanted), net)

    def test_memory_stays_bounded_on_an_endless_stream(self, fast, x):
        read = []

        def endless():
            while True:
                read.append(1)
                yield x[:5]

        results = fast.stream(endless())
        for i in range(50):
            assert len(next(results).labels) == 5
            assert len(read) <= i + 1 + 8 * torch.get_num_threads()

    def test_an_exception_comes_after_the_finished_results(self, fast, x):
        def failing():
            yield x[:40]
            yield x[:7]
            raise OSError("the camera is gone")

        results = fast.stream(failing())
        assert len(next(results).labels) == 40
        assert len(next(results).labels) == 7
        with pytest.raises(OSError, match="the camera is gone"):
            next(results)

    def test_a_bad_batch_is_refused_in_its_turn(self, fast, x):
        results = fast.stream([x[:9], x[:4, :2], x[:9]])
        assert len(next(results).labels) == 9
        with pytest.raises(ValueError, match=r"x has shape \(4, 2, 16, 16\)"):
            next(results)

    def test_closing_early_waits_for_nothing_and_leaves_no_thread(self, net, x):
        fast = eefast.accelerate(net, engine="resident")
        results = fast.stream(x for _ in range(1000))
        next(results)
        assert any(t.name.startswith("eefast-stream") for t in threading.enumerate())
        begin = time.perf_counter()
        results.close()
        while any(t.name.startswith("eefast-stream") for t in threading.enumerate()):
            assert time.perf_counter() - begin < 30
            time.sleep(0.01)

    def test_it_plans_again_where_weights_change_on_the_way(self, net, x):
        net = copy.deepcopy(net)
        fast = eefast.accelerate(net, engine="resident")

        def batches():
            yield x[:20]
            net.load_state_dict(lived_in(copy.deepcopy(net), 9).state_dict())
            yield x[:20]

        first, second = fast.stream(batches())
        assert not torch.equal(first.logits, second.logits)
        assert torch.equal(second.logits, fast(x[:20]).logits)
