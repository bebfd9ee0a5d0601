"""Quantised stages → layers: their order, their zero points and scales in the exits, and what is refused by name."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from quantized_networks import Steps, image_constants, network
from torch import Tensor, fx, nn

import eefast
from eefast import zoo
from eefast.heads import ExitHead
from eefast.ops import Kind
from eefast.ops.resident_steps import COLUMNS
from eefast.planning import weight_order
from eefast.planning.errors import UnsupportedError
from eefast.planning.integer_lowering import is_quantized, lower_integers
from eefast.planning.layers import IntegerLayer
from eefast.planning.packing import PackedWeights, program
from eefast.qdq import QdqStage
from eefast.quantized import QuantizedAffine, QuantizedConvolution, QuantizedStage


def stages_of(net: eefast.EarlyExitNet) -> list[QuantizedStage]:
    return [m for m in net.modules() if isinstance(m, QuantizedStage)]


@pytest.mark.parametrize("head", ["pool", "conv1", "conv3"])
@pytest.mark.parametrize("blocks", ["basic", "pre-activation", "pool"])
def test_every_step_becomes_one_layer_with_its_buffers(blocks: str, head: str) -> None:
    net = network(1, blocks=blocks, head=head)
    lowered = lower_integers(net)
    steps = [step for stage in stages_of(net) for step in stage.steps]
    layers = [layer for layer in lowered.layers if layer.kind != Kind.EXIT]
    assert len(layers) == len(steps)
    for kind, made in ((Kind.CONVOLUTION, QuantizedConvolution), (Kind.AFFINE, QuantizedAffine)):
        ours = [layer for layer in layers if layer.kind == kind]
        theirs = [step for step in steps if isinstance(step, made)]
        tensors = [{p.data_ptr() for p in layer.parts} for layer in ours]
        assert all({b.data_ptr() for b in step.buffers()} in tensors for step in theirs)
        assert len(ours) == len(theirs)
    fast = [step.winograd for step in steps if isinstance(step, QuantizedConvolution)]
    assert sorted(layer.algorithm(0) for layer in layers if layer.kind == Kind.CONVOLUTION) == sorted(fast)
    assert {1, 2} <= set(fast)
    assert torch.equal(cast(Tensor, lowered.image), cast(Tensor, stages_of(net)[0].image))
    assert {zero for _, _, zero in lowered.maps} == {0, *(zero for stage in stages_of(net) for zero in stage.zeros)}


@pytest.mark.parametrize("kind", ["pool", "bnpool", "plain"])
def test_scale_and_zero_point_of_the_map_are_in_the_weights_of_the_exit(kind: str) -> None:
    """Beside the head in float64 on the features of random integers."""
    net = network(2, (3, 5, 4), head=kind, blocks="pre-activation", exits=0, width=6)
    head, stage = cast(ExitHead, copy.deepcopy(net.heads[0]).double()), stages_of(net)[0]
    (layer,) = [layer for layer in lower_integers(net).layers if layer.kind == Kind.EXIT]
    q = torch.randint(0, 256, (4, 6, 5, 4), generator=torch.Generator().manual_seed(0)).double()
    zero, scale = stage.zeros[stage.output], stage.scales[stage.output]
    assert zero > 0
    with torch.no_grad():
        logits, _, row = head((q - zero) * scale)
    seen = q.flatten(1) if kind == "plain" else q.mean((2, 3))
    found = seen @ layer.weight.flatten(1).double().t() + layer.bias
    wanted = torch.cat([logits, row[:, None]], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert layer.kernel == (kind == "plain")


class Doubling(QuantizedAffine):
    def forward(self, integers: Tensor, residual: None = None, fill: Tensor | int = 0) -> Tensor:
        return 2 * super().forward(integers)


def test_simulated_int8_is_refused() -> None:
    net = zoo.eenet("eenet8", 2, input_shape=(1, 8, 8))
    net.stages[0] = QdqStage(fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 1, 1))))
    assert is_quantized(net)
    with pytest.raises(UnsupportedError, match="stage 0 is in INT8 with layers that it has no step in integers for"):
        lower_integers(net)


def exchange_last_step(stage: QuantizedStage) -> None:
    stage.steps[-1] = Doubling(len(stage.steps) - 1, torch.ones(16), torch.zeros(16))


def exchange_first_step(stage: QuantizedStage) -> None:
    stage.steps[0] = QuantizedAffine(0, torch.ones(3), torch.zeros(3))


REFUSED = {
    "another scale": (1, lambda stage: stage.scales.mul_(2), "stage 1 takes maps of another scale than it is given"),
    "another zero": (1, lambda stage: setattr(stage, "zeros", (9, *stage.zeros[1:])), "stage 1 takes maps of another"),
    "no image": (0, lambda stage: setattr(stage, "image", None), "stage 0 takes maps, at a place where there are none"),
    "image": (2, lambda stage: setattr(stage, "image", torch.ones(2, 22)), "stage 2 takes images, at a place where"),
    "own step": (0, exchange_last_step, r"stage 0 has Doubling\(16.*which the resident engine has no step for"),
    "affine image": (0, exchange_first_step, r"stage 0 has QuantizedAffine\(3.* on the image, which the resident"),
    "hook": (0, lambda s: s.register_forward_hook(print), "stage 0 is a QuantizedStage with hooks or another forward"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_named(what: str) -> None:
    number, change, message = REFUSED[what]
    net = network(1)
    change(stages_of(net)[number])  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedError, match=message):
        lower_integers(net)


def test_a_part_in_floats_is_refused() -> None:
    net = network(1)
    assert is_quantized(net)
    net.stages[1] = nn.Conv2d(16, 19, 3, 2, 1)
    with pytest.raises(UnsupportedError, match="stage 1 is a Conv2d, not quantised as other parts of the network"):
        lower_integers(net)
    assert not is_quantized(zoo.eenet("eenet8", 2, input_shape=(1, 8, 8)))


def test_an_exit_on_the_image_is_refused() -> None:
    net = network(1, exits=0)
    net.stages[0] = Steps(torch.Generator(), 3, image=image_constants(3, None)).stage()
    with pytest.raises(UnsupportedError, match="exit 0 reads the image itself"):
        lower_integers(net)


@pytest.mark.parametrize("blocks", ["basic", "pre-activation", "pool"])
def test_the_program_says_where_weights_begin_and_what_is_fast(blocks: str) -> None:
    lowered = lower_integers(network(3, blocks=blocks, width=17))
    sections, known = len(lowered.sizes), PackedWeights()
    made = program(lowered, (0,) * sections, (2,) * sections, False, known)
    assert made.maps.tolist() == [list(m) for m in lowered.maps]
    assert made.groups.tolist() == [2] * sections
    assert made.image is lowered.image
    assert made.weights.dtype == torch.float64
    columns = {name: made.steps[:, i].tolist() for i, name in enumerate(COLUMNS)}
    assert columns["winograd"] == [layer.algorithm(4) for layer in lowered.layers]
    ends = [*columns["weight"][1:], len(made.weights)]
    for layer, begin, end, at in zip(lowered.layers, columns["weight"], ends, columns["packed"], strict=True):
        wanted = torch.cat([p.flatten().double() for p in layer.parts])
        assert torch.equal(made.weights[begin:end], wanted)
        assert at % 16 == 0
        assert isinstance(layer, IntegerLayer)
        if layer.kind == Kind.CONVOLUTION:
            packed = weight_order.int8_convolution(*layer.parts, winograd=layer.winograd)  # type: ignore[misc]
            assert torch.equal(made.packed[at : at + len(packed)].view(torch.int32), packed.view(torch.int32))
    size = len(known)
    program(lowered, (4,) * sections, (1,) * sections, False, known)
    assert len(known) == size
    assert lowered.nbytes == made.weights.numel()


def test_networks_of_other_algorithms_are_measured_apart() -> None:
    assert lower_integers(network(1)).geometry == lower_integers(network(2)).geometry
    geometries = [lower_integers(network(1, winograd=(winograd,))).geometry for winograd in (0, 1, 2)]
    assert len(set(geometries)) == 3
