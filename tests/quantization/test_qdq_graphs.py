"""Which convolutions and values of a stage become integers, and that the rest of it stays as it is."""

import pytest
import torch
from networks import Stage, images, lived_in
from runtime_stages import STAGES, stage
from torch import nn
from torch.nn import functional as F

from eefast.qdq import QdqConvolution, QuantizeDequantize
from eefast.quantization.qdq_graphs import convolutions, folded_graph, qdq_stage


def rounded_after(made):
    """What each rounded value comes from: the type of the module, or the name of the function."""
    graph = made.graph
    kinds = []
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(node.target), QuantizeDequantize):
            (source,) = node.args
            is_module = source.op == "call_module"
            kinds.append(type(graph.get_submodule(source.target)).__name__ if is_module else source.name.rstrip("_1"))
    return kinds


VALUES = {
    "residual": ["input", "ReLU", "QdqConvolution"],
    "mobile": ["input", "QdqConvolution", "SiLU", "QdqConvolution", "AdaptiveAvgPool2d", "QdqConvolution"],
    "dense": ["relu", "QdqConvolution", "AvgPool2d", "QdqConvolution"],
}


@pytest.mark.parametrize(("kind", "expected"), VALUES.items())
def test_values_around_convolutions_are_rounded(kind, expected):
    graph = folded_graph(stage(kind), "stages.0")
    made = qdq_stage(graph, convolutions(graph), "stages.0")
    assert rounded_after(made) == expected
    used = [module for module in made.modules() if isinstance(module, QdqConvolution)]
    assert len(used) == sum(isinstance(module, nn.Conv2d) for module in stage(kind).modules())
    assert not any(isinstance(module, nn.Conv2d) for module in made.modules())


def test_norms_of_timm_are_folded_and_what_does_nothing_is_passed_over():
    pytest.importorskip("timm", reason="needs timm")
    from timm.layers import BatchNormAct2d

    norms = BatchNormAct2d(4), BatchNormAct2d(4, act_layer=nn.SiLU)
    original = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.Conv2d(4, 4, 1), norms[1]), 0)
    graph = folded_graph(original, "stages.0")
    made = qdq_stage(graph, convolutions(graph), "stages.0")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
    assert rounded_after(made) == ["input", "ReLU", "QdqConvolution"]


@pytest.mark.parametrize("kind", STAGES)
@torch.no_grad()
def test_without_names_nothing_changes(kind):
    original, x = stage(kind), images(3, (3, 9, 11))
    made = qdq_stage(folded_graph(original, "stages.0"), [], "stages.0").eval()
    torch.testing.assert_close(made(x), original(x.clone()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_other_readers_of_a_value_read_it_rounded():
    original = lived_in(Stage(lambda m, x: m.a(x) + F.relu(x), a=nn.Conv2d(3, 3, 1)), 0)
    graph = folded_graph(original, "stages.0")
    made, x = qdq_stage(graph, convolutions(graph), "stages.0").eval(), images(3, (3, 5, 7))
    for module in made.modules():
        if isinstance(module, QuantizeDequantize):
            module.scale.fill_(0.5)
            module.zero.fill_(128)
    rounded = (x * 2).round() / 2
    expected = (original.a(rounded) * 2).round() / 2 + rounded.relu()
    # Half a step either way, where the weights' integers decide.
    assert (made(x) - expected).abs().max() <= 0.5


def test_names_that_are_not_there():
    with pytest.raises(ValueError, match=r"config.json: stages.0 has no convolution 'wobble', but _0_0, _0_2_conv$"):
        qdq_stage(folded_graph(stage("residual"), ""), ["wobble"], "config.json: stages.0")


def test_what_cannot_be_traced_is_named():
    made = Stage(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"stages\.1 cannot be quantised: not folded: torch\.fx cannot trace it"):
        folded_graph(made, "stages.1")


def test_convolutions_with_other_padding_stay():
    graph = folded_graph(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")), "stages.0")
    assert convolutions(graph) == {}
