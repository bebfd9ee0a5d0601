"""Runs that stop and go on: the answers of the whole run, in every engine; what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import quantized_networks
import torch
from killed_partial_runs import killed_and_continued
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import Tensor, nn

import eefast
from eefast import criteria, ops, rules, zoo
from eefast.engines.resident import ResidentEngine
from eefast.survivors import Partial, Survivors

needs_cpp = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
ENGINES = ["reference", "compact", pytest.param("resident", marks=needs_cpp)]
SHAPE = (3, 13, 11)


def eenet(name: str = "eenet20", **more: Any) -> eefast.EarlyExitNet:
    exits = 2 if name == "eenet8" else 3
    made = lived_in(zoo.eenet(name, exits, input_shape=SHAPE, num_classes=7, **more), 0)
    spread_thresholds(made, images(37, SHAPE), 0.3)
    return made


def quantized(**more: Any) -> eefast.EarlyExitNet:
    made = quantized_networks.network(2, SHAPE, exits=3, **more)
    spread_thresholds(made, images(37, SHAPE), 0.3)
    return made


def spread(net: eefast.EarlyExitNet) -> eefast.EarlyExitNet:
    spread_thresholds(net, images(37, SHAPE), 0.3)
    return net


NETWORKS: Mapping[str, Callable[[], eefast.EarlyExitNet]] = {
    "eenet20": eenet,
    "flattened": lambda: eenet(head="plain"),
    "convolved heads": lambda: eenet(head="conv2"),
    "bottlenecks": lambda: eenet("eenet50"),
    "depthwise heads": lambda: eenet(head="depthwise"),
    "strided heads": lambda: eenet(head="strided3"),
    "deep heads": lambda: eenet(head="deep2"),
    "int8": quantized,
    "int8, pre-activation": lambda: quantized(blocks="pre-activation", head="bnpool"),
    "int8, depthwise heads": lambda: spread(eefast.quantize(eenet(head="depthwise"), images(32, SHAPE))),
    "int8, strided heads": lambda: spread(eefast.quantize(eenet(head="strided2"), images(32, SHAPE))),
    "int8, convolved heads": lambda: quantized(blocks="pool", head="conv2"),
}

RULES: Mapping[str, rules.Rule] = {
    "patience": rules.patience(3),
    "vote": rules.vote([1.0, 0.5, 2.0, 1.0]),
    "survival": rules.survival(3),
    "carried": rules.carried([0.0, 1.0, 0.5, 1.0]),
    "fitted": rules.fitted([[0.5, 1.0, 0.25, 0.5, 0.125]] * 4, [0.1] * 4, keep=0.5, keep_if_same=0.25, logits=0.5),
}


@torch.no_grad()
def under(rule: rules.Rule | rules.PythonRule, net: eefast.EarlyExitNet, x: Tensor) -> eefast.EarlyExitNet:
    """The network under a rule, with thresholds that two fifths of the images exceed at each exit."""
    for head in net.heads:  # so that exits often agree
        head.classifier.bias[2] += 1
    outputs, limits = net.all_exits(net.prepare(x)), list[float]()
    before, value = torch.zeros(len(x), net.num_classes), torch.zeros(len(x))
    table = rule.table() if isinstance(rule, rules.Rule) else rule.step
    for i, out in enumerate(outputs[:-1]):
        before, value = criteria.carry_on(table, i, out.logits, out.confidence_logit, before, value)
        low, high = value.sort().values[len(x) * 3 // 5 :][:2].tolist()
        limits.append((low + high) / 2 if low < high else low - 0.5 if value.min() < low else low + 0.5)
    return net.with_criterion(rule, limits).eval()


def added(exit_index: int, logits: Tensor, row: Tensor, before: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Confidences add up, and logits."""
    own = torch.sigmoid(row)
    return (logits, own) if exit_index == 0 else (logits + before, own + value)


PYTHON_RULE = rules.PythonRule("added", added)

ALIKE = ("flattened", "bottlenecks", "int8, pre-activation")
"""What runs the same code as others here."""


def slow_unless_it_differs(name: str, engine: str) -> Any:
    few = name in ALIKE or (engine != "resident" and "heads" in name)
    marks = [pytest.mark.slow] * few + [needs_cpp] * (engine == "resident")
    return pytest.param(name, engine, marks=marks, id=f"{name}-{engine}")


def assert_equal_bits(got: eefast.ExitResult, wanted: eefast.ExitResult) -> None:
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


def assert_same(got: eefast.ExitResult, wanted: eefast.ExitResult, fast: eefast.Accelerated) -> None:
    """Bit for bit in the resident engine; libraries may sum in another order for batches of other sizes."""
    if fast.plan.engine == "resident":
        assert_equal_bits(got, wanted)
        return
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def in_steps(fast: eefast.Accelerated, x: Tensor, through: Callable[[Survivors], Survivors]) -> eefast.ExitResult:
    """The answers of a run that stops after every exit; through: what happens to the survivors in between."""
    runs: list[Partial] = []
    for exit_index in range(fast.num_exits):
        runs.append(fast.until(exit_index)(through(runs[-1].survivors) if runs else x))
    result = fast.resume(through(runs[-1].survivors))
    for run in reversed(runs):
        result = run.finished(result)
    return result


@needs_cpp
@pytest.mark.parametrize("name", ["eenet20", "eenet50"])
def test_features_that_no_cache_holds(name: str) -> None:
    shape = 1, 27, 29
    net, x = lived_in(zoo.eenet(name, 2, input_shape=shape), 0), images(67, shape)
    spread_thresholds(net, x, 0.3)
    fast = eefast.accelerate(net, engine="resident")
    survivors = fast.until(0)(x).survivors
    assert survivors.features[0].nbytes * len(x) > 1 << 20
    assert_equal_bits(in_steps(fast, x, lambda s: s), fast(x))


@pytest.mark.parametrize(
    ("name", "engine"),
    [slow_unless_it_differs(name, engine) for name in NETWORKS for engine in ("reference", "compact", "resident")],
)
@pytest.mark.sampled(6)
def test_stopping_after_every_exit_changes_no_answer(name: str, engine: str) -> None:
    net, x = NETWORKS[name](), images(37, SHAPE)
    fast = eefast.accelerate(net, engine=engine)
    whole = fast(x)
    assert len(whole.exit_index.unique()) > 2
    assert_same(in_steps(fast, x, lambda s: Survivors.from_bytes(s.to_bytes())), whole, fast)
    for exit_index in range(net.num_exits):
        partial = fast.until(exit_index)(x)
        assert torch.equal(partial.exited, whole.exit_index <= exit_index)
        assert torch.equal(partial.survivors.positions, (~partial.exited).nonzero().squeeze(1))
        assert_same(partial.finished(fast.resume(partial.survivors)), whole, fast)


@pytest.mark.parametrize("engine", ["reference", "compact"])
@torch.no_grad()
def test_survivors_can_be_resumed_twice_where_a_stage_writes_over_its_input(engine: str) -> None:
    net = eenet()
    net.stages[1] = nn.Sequential(nn.LeakyReLU(0.3, inplace=True), net.stages[1])
    norm = nn.BatchNorm2d(net.heads[0].feature_shape[0]).eval()  # so that there are negative features
    norm.running_mean += 0.5
    net.stages[0] = nn.Sequential(net.stages[0], norm)
    spread_thresholds(net, images(37, SHAPE), 0.3)
    fast, x = eefast.accelerate(net, engine=engine), images(19, SHAPE)
    stopped = fast.until(0)(x)
    before = stopped.survivors.features.clone()
    for _ in range(2):
        assert_same_answers(stopped.finished(fast.resume(stopped.survivors)), one_by_one(net, x), net)
    fast.until(1)(stopped.survivors)
    assert torch.equal(stopped.survivors.features, before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["eenet20", "int8"])
@torch.no_grad()
def test_survivors_hold_the_features_and_the_answer_so_far(name: str, engine: str) -> None:
    net, x = NETWORKS[name](), images(19, SHAPE)
    partial = eefast.accelerate(net, engine=engine).until(1)(x)
    features = x
    for stage in net.stages[:2]:
        features = stage(features)
    rows, found = partial.survivors.positions, partial.survivors.features
    wanted = features[rows]
    if name == "int8":
        assert found.dtype == torch.uint8
        stage = net.stages[1]
        wanted = wanted / stage.scales[stage.output] + stage.zeros[stage.output]
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-4, atol=1e-4)
    logits, _, row = net.heads[1](features)
    torch.testing.assert_close(partial.survivors.logits, logits[rows], rtol=1e-4, atol=1e-4)
    assert torch.equal(partial.survivors.logits, partial.result.logits[rows])
    torch.testing.assert_close(partial.survivors.confidence, torch.sigmoid(row)[rows], rtol=1e-4, atol=1e-4)
    assert partial.result.exit_index[rows].eq(1).all()
    assert torch.equal(partial.result.cost, net.cost[partial.result.exit_index])


@needs_cpp
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_survivors_of_several_threads_are_in_the_order_of_their_rows(share: float) -> None:
    net, x = eenet("eenet8"), images(97, SHAPE)
    with torch.no_grad():
        net.thresholds[0] = net.all_exits(x)[0].confidence.quantile(1 - share) + 1e-4
    fast = eefast.accelerate(net, engine="resident")
    whole, before = fast(x), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        partial = fast.until(0)(x)
        rest = fast.resume(partial.survivors)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(partial.survivors.positions, (whole.exit_index > 0).nonzero().squeeze(1))
    assert partial.survivors.features.is_contiguous(memory_format=torch.channels_last)
    assert_equal_bits(partial.finished(rest), whole)


@needs_cpp
@torch.no_grad()
def test_merged_batches_of_any_size_and_thresholds_of_each_image() -> None:
    net = eenet()
    fast = eefast.accelerate(net, engine="resident")
    batches = [images(n, SHAPE, seed=n) for n in (5, 0, 31, 1)]
    limits = [None, None, torch.rand(31, 3), None]
    ends = [None, None, None, [1]]
    wholes = [fast(x, thresholds=t, exit_limit=e) for x, t, e in zip(batches, limits, ends, strict=True)]
    runs = [fast.until(0)(x, thresholds=t, exit_limit=e) for x, t, e in zip(batches, limits, ends, strict=True)]
    merged = Survivors.merged([run.survivors for run in runs])
    assert merged.size == 37
    assert merged.limits.shape == (3, len(merged))
    later = fast.until(1)(merged)
    answers = later.finished(fast.resume(later.survivors))
    result = eefast.ExitResult(*(torch.cat(parts) for parts in zip(*(run.result for run in runs), strict=True)))
    for part, new in zip(result, answers, strict=True):
        part[merged.positions] = new
    whole = eefast.ExitResult(*(torch.cat(parts) for parts in zip(*wholes, strict=True)))
    assert_equal_bits(result, whole)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_exit_none_exits_and_thresholds_that_change_later(engine: str) -> None:
    net = eenet()
    fast, x = eefast.accelerate(net, engine=engine), images(7, SHAPE)
    net.thresholds.fill_(-1)
    partial = fast.until(0)(x)
    assert partial.exited.all()
    assert len(fast.resume(partial.survivors).logits) == 0
    net.thresholds.fill_(2)
    partial = fast.until(0)(x)
    net.thresholds.fill_(-1)  # the run keeps those that it began with
    assert fast.resume(partial.survivors).exit_index.eq(3).all()
    assert len(fast.until(2)(x[:0]).survivors) == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["eenet20", "int8"])
def test_images_with_nan(name: str, engine: str) -> None:
    net, x = NETWORKS[name](), images(9, SHAPE)
    x[[0, 4], 1, 3, 5] = float("nan")
    fast = eefast.accelerate(net, engine=engine)
    assert_same(in_steps(fast, x, lambda s: s), fast(x), fast)


@needs_cpp
def test_images_of_another_size_and_uint8() -> None:
    net = quantized(normalization=quantized_networks.NORMALIZATION)
    x = torch.randint(0, 256, (9, 3, 17, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for made in (net, eenet(normalization=quantized_networks.NORMALIZATION)):
        fast = eefast.accelerate(made, engine="resident")
        assert_equal_bits(in_steps(fast, x, lambda s: s), fast(x))


@needs_cpp
@pytest.mark.parametrize("engine", ["compact", "resident"])
def test_bfloat16(engine: str) -> None:
    net, x = eenet(), images(9, SHAPE)
    fast = eefast.accelerate(net, engine=engine, dtype=torch.bfloat16)
    partial = fast.until(1)(x)
    result, whole = partial.finished(fast.resume(Survivors.from_bytes(partial.survivors.to_bytes()))), fast(x)
    if engine == "resident":
        assert_equal_bits(result, whole)
    else:
        assert partial.survivors.features.dtype == torch.bfloat16
        torch.testing.assert_close(result.logits, whole.logits, rtol=0.05, atol=0.05)


@needs_cpp
def test_other_winograd_tiles_of_another_process_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from eefast.planning import tuning

    net, x = eenet(), images(9, SHAPE)
    one = eefast.accelerate(net, engine="resident")
    chosen = one.engine.program.algorithms
    monkeypatch.setattr(tuning, "choices", {})
    monkeypatch.setattr(tuning, "fastest", lambda *_: (tuple(0 if a else 2 for a in chosen), (1,) * len(chosen)))
    other = eefast.accelerate(net, engine="resident")
    assert isinstance(other.engine, ResidentEngine)
    assert other.engine.program.algorithms != chosen
    partial = one.until(0)(x)
    assert_equal_bits(partial.finished(other.resume(partial.survivors)), one(x))


def test_another_engine_only_where_that_is_accepted() -> None:
    net, x = eenet(), images(9, SHAPE)
    edge, server = eefast.accelerate(net, engine="reference"), eefast.accelerate(net, engine="compact")
    partial = edge.until(1)(x)
    with pytest.raises(ValueError, match=r"engine=reference instead of compact.*elsewhere=True"):
        server.resume(partial.survivors)
    rest = server.resume(partial.survivors, elsewhere=True)
    assert_same_answers(partial.finished(rest), one_by_one(net, x), net)


def test_stages_in_another_library_only_where_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = eenet(), images(9, SHAPE)
    edge, server = (eefast.accelerate(net, engine="compact", stages="pytorch") for _ in range(2))
    partial = edge.until(1)(x)
    second = server.engine.steps[1]  # type: ignore[attr-defined]
    monkeypatch.setattr(second.stage, "library", "ONNX Runtime", raising=False)
    with pytest.raises(ValueError, match=r"stages=PyTorch instead of PyTorch, ONNX Runtime, PyTorch.*elsewhere=True"):
        server.resume(partial.survivors)
    rest = server.resume(partial.survivors, elsewhere=True)
    assert_same_answers(partial.finished(rest), one_by_one(net, x), net)


def test_integers_become_features_where_another_engine_goes_on() -> None:
    net, x = quantized(), images(9, SHAPE)
    edge, server = eefast.accelerate(net, engine="compact"), eefast.accelerate(net, engine="reference")
    partial = edge.until(1)(x)
    assert_same_answers(partial.finished(server.resume(partial.survivors, elsewhere=True)), one_by_one(net, x), net)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": "0.0.9"}, r"eefast 0.0.9, this is .*: finish the run with the version that began it"),
        ({"structure": "0" * 16}, r"a network built otherwise \(hash 0000"),
        ({"weights": "0" * 16}, r"the same network with other weights \(hash 0000"),
        ({"criterion": "entropy"}, r"the exit rule 'entropy', the network has 'learned' now"),
        ({"arithmetic": {"engine": "reference", "device": "cuda"}}, "device=cuda instead of cpu"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:20],
)
def test_survivors_of_something_else_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    fast = eefast.accelerate(eenet("eenet8"), engine="reference")
    survivors = fast.until(0)(images(5, SHAPE)).survivors
    with pytest.raises(ValueError, match=message):
        fast.resume(replace(survivors, **changed))


def test_changed_weights_are_noticed() -> None:
    net = eenet("eenet8")
    fast = eefast.accelerate(net, engine="reference")
    survivors = fast.until(0)(images(5, SHAPE)).survivors
    with torch.no_grad():
        next(net.parameters())[0] += 1e-6
    with pytest.raises(ValueError, match="other weights"):
        fast.resume(survivors)


def test_where_a_run_cannot_stop() -> None:
    fast = eefast.accelerate(eenet("eenet8"), engine="reference")
    with pytest.raises(ValueError, match="exit_index=3 is no early exit; the network has"):
        fast.until(3)
    later = fast.until(1)(images(5, SHAPE)).survivors
    with pytest.raises(ValueError, match="exit_index=1, but these survivors have passed exit 1"):
        fast.until(1)(later)
    with pytest.raises(ValueError, match="survivors keep the thresholds of the call"):
        fast.until(1)(fast.until(0)(images(5, SHAPE)).survivors, exit_limit=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["eenet20", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.sampled(7)
def test_rules_that_carry_begin_where_they_stopped(name: str, rule: str, engine: str) -> None:
    net, x = NETWORKS[name](), images(37, SHAPE)
    net = under(RULES[rule], net, x)
    fast = eefast.accelerate(net, engine=engine)
    whole = fast(x)
    assert len(whole.exit_index.unique()) > 2
    assert_same(in_steps(fast, x, lambda s: Survivors.from_bytes(s.to_bytes())), whole, fast)
    halves = [fast.until(1)(part) for part in x.split(20)]
    assert torch.equal(halves[0].exited, whole.exit_index[:20] <= 1)
    merged = Survivors.merged([half.survivors for half in halves])
    rest = fast.resume(merged)
    for a, b in zip(rest, whole, strict=True):
        torch.testing.assert_close(a, b[merged.positions], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["reference", "compact"])
def test_rules_in_python_begin_where_they_stopped(engine: str) -> None:
    x = images(37, SHAPE)
    net = under(PYTHON_RULE, eenet(), x)
    fast = eefast.accelerate(net, engine=engine)
    whole = fast(x)
    assert len(whole.exit_index.unique()) > 2
    assert_same(in_steps(fast, x, lambda s: Survivors.from_bytes(s.to_bytes())), whole, fast)


def test_tables_of_rules_must_fit() -> None:
    one, two = (eenet().with_criterion(rules.vote([1.0, 1.0, 1.0, last])).eval() for last in (1.0, 2.0))
    fast, x = eefast.accelerate(one, engine="reference"), images(5, SHAPE)
    never = [float("inf")] * 3
    mine = fast.until(0)(x, thresholds=never).survivors
    other = eefast.accelerate(two, engine="reference").until(0)(x, thresholds=never).survivors
    with pytest.raises(ValueError, match="two tables of the exit rule 'vote' cannot go on together"):
        Survivors.merged([mine, other])
    with pytest.raises(ValueError, match="the exit rule 'vote' and no table of it"):
        fast.resume(replace(mine, rule=None))
    # The table travels with the survivors, as thresholds do.
    assert_equal_bits(fast.resume(other), eefast.accelerate(two, engine="reference").resume(other))


class Dense(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


@needs_cpp
def test_features_that_are_the_first_channels_of_a_larger_map() -> None:
    """As in DenseNet, whose layers write one map, of which an exit in between sees a part."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), Dense(16), Dense(32), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(48, 7),
    )  # fmt: skip
    net = lived_in(eefast.attach(backbone, ["0", "1"], input_shape=SHAPE), 0)
    x = images(17, SHAPE)
    spread_thresholds(net, x, 0.3)
    fast = eefast.accelerate(net, engine="resident")
    assert_equal_bits(in_steps(fast, x, lambda s: s), fast(x))


@needs_cpp
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_from_its_last_file(times: int, tmp_path: Path) -> None:
    assert killed_and_continued(tmp_path, times) > 0
