"""Rows of a program's tables: what parts compute, beside the network's stages one after another."""

from __future__ import annotations

import pytest
import torch
from networks import images, lived_in
from torch import nn

import eefast
from eefast import ops, zoo
from eefast.engines.program_parts import map_sizes, part
from eefast.engines.resident import ResidentEngine
from eefast.heads import ExitHead

pytestmark = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
SHAPE = (3, 13, 10)


def engine_of(net: eefast.EarlyExitNet) -> ResidentEngine:
    engine = eefast.accelerate(net, engine="resident").engine
    assert isinstance(engine, ResidentEngine)
    return engine


@pytest.fixture(scope="module")
def net() -> eefast.EarlyExitNet:
    return lived_in(zoo.eenet("eenet20", 3, "linear", input_shape=SHAPE, num_classes=7), 0)


@pytest.fixture(scope="module")
def engine(net: eefast.EarlyExitNet) -> ResidentEngine:
    return engine_of(net)


@pytest.mark.parametrize("backend", ["C++", "PyTorch"])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (1, 1), (1, 2), (2, 3), (3, 3)])
@torch.no_grad()
def test_a_part_computes_its_stages(
    net: eefast.EarlyExitNet, engine: ResidentEngine, first: int, last: int, backend: str
) -> None:
    channels = [cost.feature_shape[0] for cost in net.stage_costs]
    made = part(engine.program, first, last, channels)
    x = images(5, SHAPE)
    for stage in net.stages[:first]:
        x = stage(x)
    wanted = x
    for stage in net.stages[first : last + 1]:
        wanted = stage(wanted)
    features = None
    if last < net.num_exits:
        size = map_sizes(made, *x.shape[2:])[-1]
        assert size == tuple(wanted.shape[2:])
        features = torch.empty(5, channels[last], *size).contiguous(memory_format=torch.channels_last)
    exits_there = last - first + (features is not None)
    never = torch.full((exits_there,), 2.0)
    arguments = x, made.steps, made.maps, made.groups, made.weights, made.packed, never, "learned", 7
    run = ops.resident_forward.run if backend == "C++" else ops.resident_forward.reference
    logits, _, exits = run(*arguments, features=features)
    torch.testing.assert_close(logits, net.heads[last](wanted).logits, rtol=1e-4, atol=1e-4)
    if features is None:
        assert exits.eq(exits_there).all()
    else:
        places = exits - exits_there
        assert places.sort().values.tolist() == [*range(5)]
        torch.testing.assert_close(features[places], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["C++", "PyTorch"])
@torch.no_grad()
def test_only_samples_that_go_on_are_stored(net: eefast.EarlyExitNet, engine: ResidentEngine, backend: str) -> None:
    made, x = part(engine.program, 0, 1, [16, 32, 64, 64]), images(9, SHAPE)
    middle = net.stages[0](x)
    features = net.stages[1](middle)
    first, second = (
        torch.sigmoid(head(y).confidence_logit) for head, y in zip(net.heads, (middle, features), strict=False)
    )
    limits = torch.stack([first.median(), second[first <= first.median()].median()])
    stored = torch.full_like(features, -7).contiguous(memory_format=torch.channels_last)
    run = ops.resident_forward.run if backend == "C++" else ops.resident_forward.reference
    arguments = x, made.steps, made.maps, made.groups, made.weights, made.packed, limits, "learned", 7
    logits, confidence, exits = run(*arguments, features=stored)
    wanted = torch.where(first > limits[0], 0, torch.where(second > limits[1], 1, 2))
    assert torch.equal(exits.clamp(max=2), wanted)
    (goes_on,) = (exits >= 2).nonzero(as_tuple=True)
    assert len(goes_on) == 3
    torch.testing.assert_close(stored[exits[goes_on] - 2], features[goes_on], rtol=1e-4, atol=1e-4)
    assert stored[3:].eq(-7).all()
    torch.testing.assert_close(logits[goes_on], net.heads[1](features).logits[goes_on], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(confidence[goes_on], second[goes_on], rtol=1e-4, atol=1e-4)


def test_the_weights_are_shared(engine: ResidentEngine) -> None:
    made = part(engine.program, 1, 2, [16, 32, 64, 64])
    assert made.packed is engine.program.packed
    assert made.weights is engine.program.weights
    assert len(made.steps) < len(engine.program.steps)


def test_a_head_that_makes_smaller_maps_is_part_of_its_stage() -> None:
    def head(last: bool) -> ExitHead:
        made = ExitHead("conv1", (8, 12, 12) if not last else (8, 6, 6), 7, (3, 12, 12))
        if not last:
            made.convs[0][0].stride = (2, 2)
        return made

    stages = [nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1))]
    net = lived_in(eefast.EarlyExitNet(stages, [head(False), head(True)], input_shape=(3, 12, 12)), 0)
    engine, x = engine_of(net), images(5, (3, 12, 12))
    made = part(engine.program, 0, 0, [8, 8])
    stored = torch.empty(5, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    arguments = x, made.steps, made.maps, made.groups, made.weights, made.packed, torch.full((1,), 2.0), "learned", 7
    _, _, exits = ops.resident_forward.run(*arguments, features=stored)
    torch.testing.assert_close(stored[exits - 1], net.stages[0](x), rtol=1e-4, atol=1e-4)


def test_stores_and_loads_that_do_not_fit_are_refused(net: eefast.EarlyExitNet, engine: ResidentEngine) -> None:
    program, x = part(engine.program, 0, 1, [16, 32, 64, 64]), images(2, SHAPE)
    features = torch.empty(2, 32, 13, 10).contiguous(memory_format=torch.channels_last)
    good = torch.empty(2, *net.stage_costs[1].feature_shape).contiguous(memory_format=torch.channels_last)
    arguments = x, program.steps, program.maps, program.groups, program.weights, program.packed, torch.zeros(2)
    for given, message in {
        None: "there are no features to write it to",
        features[:, :, :-1]: "features has shape",
        good.double(): "features is Double; expected float32|features is .*convert it",
        good.contiguous(): "channels-last|strides",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ops.resident_forward.run(*arguments, "learned", 7, features=given)
    for given, message in {
        torch.zeros(2, 7): r"before has shape \[2, 7\]; expected \[N, K \+ 1\]",
        torch.zeros(2, 8).double(): "before is Double; expected float32|before is .*convert it",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ops.resident_forward.run(*arguments, "carried", 7, rule=torch.zeros(3, 9), features=good, before=given)
    with pytest.raises(RuntimeError, match="before is given, but no rule that reads it"):
        ops.resident_forward.run(*arguments, "learned", 7, features=good, before=torch.zeros(2, 8))
    later = program.steps.clone()
    later[-2, 2] = 0  # the last exit becomes the one before
    with pytest.raises(RuntimeError, match="a map is stored after the last early exit only"):
        ops.resident_forward.run(x, later, *arguments[2:], "learned", 7, features=good)
    early = program.steps[[*range(len(program.steps) - 2), -1, -2]]
    with pytest.raises(RuntimeError, match=r"a map is stored by the last step only"):
        ops.resident_forward.run(x, early, *arguments[2:], "learned", 7, features=good)
    whole = engine.program
    arguments = x, whole.steps, whole.maps, whole.groups, whole.weights, whole.packed, torch.zeros(3)
    with pytest.raises(RuntimeError, match="features are given, but no step stores a map"):
        ops.resident_forward.run(*arguments, "learned", 7, features=good)
    later = part(whole, 1, 3, [16, 32, 64, 64])
    steps = later.steps.clone()
    steps[1, 1] = 0  # a convolution of map 0, which the step before loads
    with pytest.raises(RuntimeError, match=r"steps\[1\] .*it reads features that are loaded into another map"):
        ops.resident_forward.run(
            torch.zeros(2, 16, 13, 10), steps, later.maps, later.groups, later.weights, later.packed, torch.zeros(2),
            "learned", 7,
        )  # fmt: skip
