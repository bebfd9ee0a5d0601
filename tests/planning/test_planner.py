"""Which engine the planner chooses and why: mostly with engines that only say their name, and times that are given."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import images
from odd_networks import SHAPE as ODD_SHAPE
from odd_networks import conv, network
from torch import nn

import eefast
from eefast import ops, zoo
from eefast.engines import Plan
from eefast.heads import ExitHead
from eefast.planning import Options, build, planner, probe
from eefast.planning.errors import SlowerError, UnsupportedError
from eefast.runtimes import RUNTIMES
from eefast.serving.stages import stage_calls

SHAPE = (1, 6, 7)


class FakeEngine:
    def __init__(self, plan: Plan, net: Any) -> None:
        self.plan, self.net, self.runs = plan, net, 0

    def run(self, images: torch.Tensor, thresholds: torch.Tensor) -> None:
        self.runs += 1
        self.asked = images, thresholds


class Builders:
    """Build engines that only have a plan, or raise; count what was built.

    seconds: of the resident and of the compact engine, plain: of the network without exits, as if measured.
    megabytes: of the network's weights.
    """

    def __init__(self) -> None:
        self.built: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.seconds, self.measured, self.megabytes, self.geometry = (1.0, 2.0), 0, 1.0, "a geometry"
        self.plain, self.no_kernels = 4.0, ""

    def make(self, name: str, subject: Any, *notes: str) -> FakeEngine:
        self.built.append(name)
        if name in self.errors:
            raise self.errors[name]
        return FakeEngine(subject.plan(name, [], *notes), subject.net)

    def lowered(self, subject: Any) -> Any:
        if "lowered" in self.errors:
            raise self.errors["lowered"]
        return SimpleNamespace(nbytes=1e6 * self.megabytes, geometry=self.geometry)

    def turns(self, runs: Any, rounds: int = 7) -> list[list[float]]:
        for run in runs:
            run()
        self.measured += 1
        return [[seconds] for seconds in (*self.seconds[: len(runs) - 1], self.plain)]


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> Builders:
    made = Builders()
    monkeypatch.setattr(planner, "build_resident", lambda subject, _: made.make("resident", subject, "a note"))
    monkeypatch.setattr(planner, "build_compact", lambda subject: made.make("compact", subject, "graphs", "memory"))
    monkeypatch.setattr(planner, "lowered", made.lowered)
    monkeypatch.setattr(planner, "compact_obstacle", lambda net, device: made.no_kernels)
    monkeypatch.setattr(probe, "turns", made.turns)
    monkeypatch.setattr(probe, "turns_on_cpu", made.turns)
    monkeypatch.setattr(planner, "speeds", {})
    monkeypatch.setattr(planner, "hopeless", {})
    planner.log_once.cache_clear()
    return made


@pytest.fixture(scope="module")
def net() -> Any:
    return zoo.eenet("eenet8", 2, num_classes=3, input_shape=SHAPE, filters=2).eval()


def plan(net: Any, engine: str = "auto", **more: Any) -> Plan:
    return build(net, Options(engine, **more)).plan


@pytest.mark.parametrize("engine", ["compact", "resident"])
def test_an_engine_asked_for_by_name_is_the_only_one_built(net: Any, builders: Builders, engine: str) -> None:
    found = plan(net, engine)
    assert (found.engine, builders.built, builders.measured) == (engine, [engine], 0)
    assert found.reasons[0] == "asked for by name"
    assert len(found.reasons) > 1


def test_the_reference_engine_builds_no_other(net: Any, builders: Builders) -> None:
    found = plan(net, "reference")
    assert (found.engine, found.reasons, builders.built) == ("reference", ("asked for by name",), [])
    assert [row.kernel for row in found.stages] == ["PyTorch"] * 3
    with pytest.raises(ValueError, match=r"dtype=torch\.float16: the reference engine runs in"):
        plan(net, "reference", dtype=torch.float16)


def test_unknown_names_are_refused(net: Any, builders: Builders) -> None:
    with pytest.raises(ValueError, match="engine='warp' is unknown; choose one of auto, reference, compact, resident"):
        plan(net, "warp")


@pytest.mark.parametrize(
    ("seconds", "engine", "reason"),
    [
        (
            (1.0, 2.0),
            "resident",
            "2.0× as fast as compact, {} (16 images to the final exit, medians: 1000.0 ms, 2000.0, 4000.0)",
        ),
        (
            (3.0, 1.0),
            "compact",
            "3.0× as fast as resident, {} (16 images to the final exit, medians: 1000.0 ms, 3000.0, 4000.0)",
        ),
        (
            (1.0, 1.0),
            "resident",
            "1.0× as fast as compact, {} (16 images to the final exit, medians: 1000.0 ms, 1000.0, 4000.0)",
        ),
    ],
)
def test_auto_takes_the_faster_and_logs_nothing(
    net: Any, builders: Builders, seconds: Any, engine: str, reason: str, caplog: Any
) -> None:
    builders.seconds = seconds
    with caplog.at_level(logging.WARNING, "eefast"):
        found = plan(net)
    assert not caplog.records
    assert found.engine == engine
    reason = reason.format("4.0× as fast as PyTorch without exits")
    assert found.reasons == (reason, *{"resident": ["a note"], "compact": ["graphs", "memory"]}[engine])
    assert f"{engine} engine, cpu, float32: {'; '.join(found.reasons)}" in str(found)


def test_both_are_measured_on_images_that_go_to_the_final_exit(net: Any, builders: Builders) -> None:
    examples = torch.rand(3, *SHAPE)
    engine: Any = build(net, Options(example_inputs=examples))
    images, thresholds = engine.asked
    assert torch.equal(images, examples[torch.arange(8) % 3].repeat(2, 1, 1, 1))
    assert thresholds.tolist() == [net.criterion.never] * 2


@pytest.mark.parametrize(("seconds", "rebuilt"), [((1.0, 2.0), ["resident"]), ((2.0, 1.0), ["resident", "compact"])])
def test_a_geometry_is_measured_once(net: Any, builders: Builders, seconds: Any, rebuilt: list[str]) -> None:
    builders.seconds = seconds
    first = plan(net)
    builders.built.clear()
    assert plan(net) == first
    assert (builders.measured, builders.built) == (1, rebuilt)
    builders.geometry = "another geometry"
    plan(net)
    assert builders.measured == 2


def test_a_geometry_is_measured_again_with_stages_in_other_libraries(
    net: Any, builders: Builders, monkeypatch: pytest.MonkeyPatch
) -> None:
    builders.seconds = 1.0, 2.0
    assert plan(net, stages="pytorch").engine == "resident"
    builders.seconds = 2.0, 1.0
    assert plan(net).engine == "compact"
    assert plan(net, stages="pytorch").engine == "resident"
    monkeypatch.setattr(RUNTIMES["onnxruntime"], "missing", lambda: "another answer")
    plan(net)
    assert builders.measured == 3


@pytest.mark.parametrize("large", [False, True])
def test_a_compact_engine_of_a_large_network_knows_what_it_has_to_beat(
    net: Any, builders: Builders, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "is_large", lambda net: large)
    rivals, make = [], builders.make
    monkeypatch.setattr(
        planner, "build_compact", lambda subject: (rivals.append(subject.rival), make("compact", subject))[1]
    )
    monkeypatch.setattr(probe, "turns_on_cpu", lambda runs: [[1.0], [2.0]])
    monkeypatch.setattr(probe, "seconds_on_cpu", lambda runs, rounds: [4.0, 8.0, 12.0])
    assert plan(net).engine == "resident"
    assert rivals == [(1.0, 2.0, 3.0) if large else ()]


def test_a_compact_engine_that_is_slower_before_it_is_whole_is_built_once(net: Any, builders: Builders) -> None:
    builders.errors["compact"] = SlowerError("the stages up to exit 1 take 1.3× as long (13.0 ms per image, 10.0)")
    first = plan(net)
    assert (first.engine, builders.measured) == ("resident", 0)
    assert first.reasons[0] == (
        "faster than the compact engine, of which the stages up to exit 1 take 1.3× as long (13.0 ms per image, 10.0)"
    )
    builders.built.clear()
    assert plan(net) == first
    assert builders.built == ["resident"]


def test_threads_and_dtypes_are_measured_apart(net: Any, builders: Builders, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(net)
    plan(net, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    plan(net)
    assert builders.measured == 3


BESIDE_PLAIN = "4.0× as fast as PyTorch without exits (16 images to the final exit, medians: 1000.0 ms, 4000.0)"


def test_without_the_resident_engine_auto_runs_compact(net: Any, builders: Builders) -> None:
    builders.errors["lowered"] = UnsupportedError("stage 1 has GELU")
    found = plan(net)
    assert (found.engine, builders.measured) == ("compact", 1)
    assert found.reasons == ("the resident engine cannot run: stage 1 has GELU", BESIDE_PLAIN, "graphs", "memory")
    with pytest.raises(ValueError, match=r"engine='resident' cannot run: stage 1 has GELU; use engine='compact' or"):
        plan(net, "resident")


def test_without_the_compact_engine_auto_runs_resident(net: Any, builders: Builders) -> None:
    builders.errors["compact"] = UnsupportedError("stage 0: answers differ")
    found = plan(net)
    assert (found.engine, builders.measured) == ("resident", 1)
    assert found.reasons == ("the compact engine cannot run: stage 0: answers differ", BESIDE_PLAIN, "a note")
    with pytest.raises(ValueError, match="engine='compact' cannot run: stage 0: answers differ; use engine='ref"):
        plan(net, "compact")


def test_without_both_auto_runs_the_reference_engine_and_logs_once(net: Any, builders: Builders, caplog: Any) -> None:
    builders.errors = {"lowered": UnsupportedError("no kernels"), "compact": UnsupportedError("no exits")}
    with caplog.at_level(logging.WARNING, "eefast"):
        found = [plan(net), plan(net)]
    assert [(p.engine, p.reasons) for p in found] == [("reference", ("no exits",))] * 2
    assert [r.message for r in caplog.records] == ["engine='auto' runs the reference engine: no exits"]
    with pytest.raises(ValueError, match=r"dtype=torch\.float16: the reference engine runs in"):
        plan(net, dtype=torch.float16)


@pytest.mark.parametrize("engine", ["auto", "compact", "resident"])
def test_a_network_that_only_the_reference_engine_runs(builders: Builders, engine: str, caplog: Any) -> None:
    net = zoo.eenet("eenet8", 2, num_classes=3, input_shape=SHAPE, filters=2).eval()
    net.stages[1].register_forward_hook(lambda *_: None)
    if engine == "auto":
        assert plan(net).engine == "reference"
        assert "with a forward hook" in plan(net).reason
        assert len(caplog.records) == 1
    else:
        with pytest.raises(ValueError, match=f"engine='{engine}' cannot run: .*hook.*use engine='reference' or 'auto'"):
            plan(net, engine)
    assert builders.built == []


@pytest.mark.parametrize("no_kernels", ["", "no Triton"])
def test_weights_beyond_the_caches(net: Any, builders: Builders, no_kernels: str) -> None:
    """The resident engine is not tried where the compact one can run; by name it is."""
    builders.megabytes, builders.no_kernels = planner.CACHEABLE_MEGABYTES + 1, no_kernels
    found = plan(net)
    if no_kernels:
        assert found.engine == "resident"
    else:
        assert found.engine == "compact"
        assert found.reasons[0] == (
            "weights of 129 MB are more than what caches hold, so the resident engine was not tried"
        )
    assert plan(net, "resident").engine == "resident"


@pytest.mark.parametrize("part", ["lowered", "resident", "compact"])
def test_exceptions_are_obstacles_but_wrong_settings_are_raised(net: Any, builders: Builders, part: str) -> None:
    builders.errors[part] = RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nand more")
    assert "cannot run: RuntimeError: CUDNN_STATUS_NOT_SUPPORTED" in plan(net).reasons[0]
    builders.errors[part] = ValueError("EEFAST_CONV='fft' is unknown")
    with pytest.raises(ValueError, match=r"^EEFAST_CONV='fft' is unknown$"):
        plan(net)


def test_a_plan_is_a_value(net: Any, builders: Builders) -> None:
    one = plan(net, "resident")
    assert one == plan(net, "resident")
    assert hash(one) == hash(plan(net, "resident"))
    with pytest.raises(FrozenInstanceError):
        one.engine = "compact"  # type: ignore[misc]


class TestRealEngines:
    @pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
    def test_auto_takes_the_faster_engine_and_says_why(self, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner, "speeds", {})
        found = plan(net)
        (speeds,) = planner.speeds.values()
        assert found.engine == ("resident" if speeds.least[0] <= speeds.least[1] else "compact")
        other = {"resident": "compact", "compact": "resident"}[found.engine]
        assert f"as fast as {other}, " in str(found)
        assert "as fast as PyTorch without exits (16 images to the final exit, medians: " in str(found)

    @pytest.mark.parametrize("call", ["accelerate", "the accelerated network", "the network"])
    @pytest.mark.parametrize("engine", ["auto", "compact", "reference", "resident"])
    def test_another_number_of_classes_is_refused_with_the_way_out(self, engine: str, call: str) -> None:
        net, x = network(conv()), images(5, ODD_SHAPE)
        fast = eefast.accelerate(net, engine=engine)
        for head in net.heads:
            head.classifier = nn.Linear(8, 100)
        calls = {
            "accelerate": lambda: eefast.accelerate(net, engine=engine),
            "the accelerated network": lambda: fast(x),
            "the network": lambda: net(x),
        }
        message = r"the head of exit 0 answers with 100 classes, the network was built for 5; .*with_criterion"
        with pytest.raises(ValueError, match=message):
            calls[call]()
        rebuilt = net.with_criterion(net.criterion.name, [1.0])
        assert eefast.accelerate(rebuilt, engine=engine)(x).logits.shape == (5, 100)

    def test_planning_under_inference_mode_serves_calls_outside_of_it(self) -> None:
        net, x = network(conv()), images(5, ODD_SHAPE)
        with torch.inference_mode():
            fast: Any = eefast.accelerate(net, engine="compact")
        assert not any(t.is_inference() for step in fast.engine.steps for t in step.stage.parameters())
        torch.testing.assert_close(fast(x).logits, net(x).logits, rtol=1e-4, atol=1e-4)


class Subtracting(nn.Module):
    """Writes over what it gets."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x.sub_(0.5)))


@pytest.mark.parametrize("options", [{"engine": "reference"}, {"engine": "compact", "stages": "pytorch"}, {}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_first_stage_that_writes_over_its_input_gets_a_copy(
    channels: int, layout: torch.memory_format, options: dict[str, Any]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stages = [Subtracting(channels), nn.Conv2d(4, 4, 3)]
        heads = [ExitHead("pool", shape, 3, (channels, 7, 6)) for shape in ((4, 7, 6), (4, 5, 4))]
    net = eefast.EarlyExitNet(stages, heads, input_shape=(channels, 7, 6), criterion="max_probability").eval()
    x = images(9, (channels, 7, 6)).contiguous(memory_format=layout)
    with torch.no_grad():
        net.thresholds.fill_(net(x.clone(), thresholds=[0.0]).confidence.median())
        given, expected = x.clone(), net(x.clone())
    assert len(expected.exit_index.unique()) == 2
    fast = eefast.accelerate(net, **options)
    partial = fast.until(0)(x)
    calls = stage_calls(fast.engine) or []
    found = [fast(x), fast(x), *fast.stream([x]), partial.finished(fast.resume(partial.survivors))]
    for call in calls[:1]:
        call(x, net.thresholds.repeat(len(x)))
    assert torch.equal(x, given)
    for result in found:
        assert torch.equal(result.exit_index, expected.exit_index)
        torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-5)
