"""Nothing that eefast does changes a module that it was given, whatever is in it and whatever goes wrong."""

import threading
from contextlib import nullcontext

import pytest
import torch
from changed_backbones import (
    SHAPE,
    SIMPLE,
    as_it_is,
    backbone,
    frozen_parts,
    hooked,
    meta,
    norm_twice,
    parametrized,
    stages_and_heads,
    tied_weights,
    two_names,
    without_statistics,
)  # fmt: skip
from networks import assert_same_answers, images, one_by_one
from snapshots import unchanged
from torch import nn

import eefast
from eefast import fingerprints
from eefast.cost import macs
from eefast.heads import ExitHead
from eefast.surgery.attachment import attach
from eefast.thresholds import outputs
from eefast.train.tags import refreshed


@pytest.mark.parametrize("change", SIMPLE)
@pytest.mark.sampled(8)
def test_attach_changes_nothing(change):
    b = backbone(change)
    state = torch.get_rng_state()
    with unchanged(b, random_numbers=False):
        net = attach(b, ["first"], input_shape=SHAPE)
    new = torch.get_rng_state()
    torch.set_rng_state(state)
    for i, stage in enumerate(net.stages):
        ExitHead("pool", (8, 13, 11) if i == 0 else (8, 7, 6), 5, SHAPE)
        assert stage is not None
    assert torch.equal(torch.get_rng_state(), new), "only the new heads' weights are drawn"
    assert {id(p) for p in b.parameters()} <= {id(p) for p in net.parameters()}
    assert net.training == b.training


@pytest.mark.parametrize("change", [*SIMPLE, meta])
@pytest.mark.sampled(8)
def test_building_a_network_changes_nothing(change):
    b = backbone(change)
    stages, heads = stages_and_heads(b)
    with unchanged(b, *heads):
        net = eefast.EarlyExitNet(stages, heads, input_shape=SHAPE)
        net.with_criterion("entropy")
        net.plain()
        assert macs(b, SHAPE)[1] == (5,)
    assert net.cost.device.type == "cpu"
    assert net.cost[-1] == 1


def test_building_a_network_whose_rows_are_one_changes_nothing():
    b = backbone(as_it_is)
    head = ExitHead("pool", (8, 13, 11), 5, SHAPE)
    head.confidence = head.classifier = nn.Linear(8, 1)
    with unchanged(head, b):
        eefast.EarlyExitNet([b.first], [head], input_shape=SHAPE)


def batches():
    return [(images(4, SHAPE), torch.tensor([0, 1, 2, 3]))] * 2


ENTRIES = {
    "accelerate": lambda net: eefast.accelerate(net)(images(4, SHAPE)),
    "compact": lambda net: eefast.accelerate(net, engine="compact").warmup(),
    "stream": lambda net: list(eefast.accelerate(net, engine="reference").stream([images(4, SHAPE)] * 3)),
    "with_criterion": lambda net: net.with_criterion("margin")(images(4, SHAPE)),
    "plain": lambda net: net.plain()(images(4, SHAPE)),
    "evaluate": lambda net: outputs.collect_answers(net, batches()),
    "fingerprint": fingerprints.weights,
    "print": repr,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "change", [as_it_is, two_names, tied_weights, norm_twice, parametrized, hooked, without_statistics]
)
@pytest.mark.sampled(18)
def test_running_a_network_changes_nothing(change, entry):
    b = backbone(change)
    stages, heads = stages_and_heads(b)
    net = eefast.EarlyExitNet(stages, heads, input_shape=SHAPE).eval()
    b.first[0].weight.requires_grad_(False)
    # Only the reference engine runs these, and says so.
    refused = entry == "compact" and change in (hooked, without_statistics)
    with (
        unchanged(net, b),
        torch.no_grad(),
        pytest.raises(ValueError, match="cannot run") if refused else nullcontext(),
    ):
        ENTRIES[entry](net)


@pytest.mark.parametrize("entry", [outputs.collect, lambda net, data: refreshed(net, data, net.cost)])
@pytest.mark.parametrize("goes_wrong", [False, True])
def test_every_module_gets_its_flag_back(entry, goes_wrong):
    b = backbone(frozen_parts)
    net = eefast.EarlyExitNet(*stages_and_heads(b), input_shape=SHAPE)
    data = [*batches(), *([(torch.zeros(1), torch.zeros(1))] * goes_wrong)]
    with unchanged(net):
        if goes_wrong:
            with pytest.raises(ValueError, match="x has shape"):
                entry(net, data)
        else:
            entry(net, data)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_count_or_cut_changes_nothing(error):
    class Failing(nn.Module):
        def forward(self, x):
            raise error("stop")

    b = backbone(two_names)
    b.third.append(Failing())
    stages, heads = stages_and_heads(b)
    with unchanged(b, *heads):
        with pytest.raises((error, ValueError)):
            attach(b, ["first"], input_shape=SHAPE)
        with pytest.raises(error):
            eefast.EarlyExitNet(stages, heads, input_shape=SHAPE)


def test_other_threads_run_the_module_while_it_is_counted_and_cut():
    b = backbone(two_names)
    x, wrong, done = images(2, SHAPE), [], threading.Event()
    with torch.no_grad():
        expected = b(x)

    def run():
        with torch.no_grad():
            while not done.is_set():
                try:
                    wrong.extend([] if torch.equal(b(x), expected) else ["other answer"])
                except Exception as error:
                    wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            eefast.EarlyExitNet(*stages_and_heads(b), input_shape=SHAPE)
            attach(b, ["first"], input_shape=SHAPE)
    finally:
        done.set()
        thread.join()
    assert wrong == []


def test_a_compiled_backbone_is_tried_uncompiled_and_stays():
    inner = backbone(as_it_is)
    compiled = torch.compile(inner, backend="eager")
    with unchanged(inner, random_numbers=False):
        net = attach(compiled, ["_orig_mod.first"], input_shape=SHAPE)
    x = images(3, SHAPE)
    with torch.no_grad():
        assert torch.equal(net.plain()(x), inner(x))
    with pytest.raises(ValueError, match=r"no module 'first'; take '_orig_mod\.first'"):
        attach(compiled, ["first"], input_shape=SHAPE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_buffer(dtype):
    b = backbone(as_it_is)
    expected = eefast.EarlyExitNet(*stages_and_heads(b), input_shape=SHAPE, normalization=((0.5,) * 3, (0.2,) * 3))
    pixels = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8)
    stages, heads = stages_and_heads(b)
    torch.set_default_dtype(dtype)
    try:
        net = eefast.EarlyExitNet(stages, heads, input_shape=SHAPE, normalization=expected.normalization)
        prepared = net.prepare(pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(net.get_buffer(n), expected.get_buffer(n)) for n in ("thresholds", "cost", "path_cost"))
    assert torch.equal(prepared, expected.prepare(pixels))


def test_thresholds_that_were_handed_in_stay():
    given = torch.tensor([0.1, 0.2])
    net = eefast.EarlyExitNet(*stages_and_heads(backbone(as_it_is)), input_shape=SHAPE, thresholds=given)
    net.thresholds.fill_(0.9)
    assert given.tolist() == [pytest.approx(0.1), pytest.approx(0.2)]


@pytest.mark.parametrize("engine", ["reference", "compact", "resident"])
def test_inference_mode_inside_and_outside(engine):
    x = images(5, SHAPE)
    with torch.inference_mode():
        b = backbone(as_it_is)
        net = eefast.EarlyExitNet(*stages_and_heads(b), input_shape=SHAPE).eval()
        inside = eefast.accelerate(net, engine=engine) if engine != "resident" else None
    net.thresholds.fill_(0.5)  # an ordinary tensor
    expected = one_by_one(net, x)
    for fast in filter(None, (inside, eefast.accelerate(net, engine=engine))):
        assert_same_answers(fast(x), expected, net)
        with torch.inference_mode():
            assert_same_answers(fast(x), expected, net)
            assert len(list(fast.stream([x] * 3))) == 3
        assert_same_answers(list(fast.stream([x] * 3))[2], expected, net)
    with torch.inference_mode():
        attached = attach(b, ["first"], input_shape=SHAPE)
    assert not attached.heads[0].classifier.weight.is_inference()
    with torch.no_grad():
        assert torch.equal(attached.plain()(x), b(x))


def test_a_plan_that_is_made_under_autocast_is_the_same():
    net = eefast.EarlyExitNet(*stages_and_heads(backbone(as_it_is)), input_shape=SHAPE).eval()
    x = images(5, SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        fast = eefast.accelerate(net, engine="compact")
    assert_same_answers(fast(x), one_by_one(net, x), net)
