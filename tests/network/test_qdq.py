"""Simulated INT8 beside sums of integers in NumPy."""

import copy

import numpy as np
import pytest
import torch
from networks import images
from torch import fx, nn

from eefast.qdq import QdqConvolution, QdqStage, QuantizeDequantize, round_nothing


def rounding(scale: float, zero: int) -> QuantizeDequantize:
    made = QuantizeDequantize()
    made.scale.fill_(scale)
    made.zero.fill_(zero)
    return made


def integers(x: torch.Tensor, scale: float, zero: int) -> np.ndarray:
    return np.clip(np.rint(x.double().numpy() / np.float64(np.float32(scale))) + zero, 0, 255).astype(np.int64)


@pytest.mark.parametrize(("scale", "zero"), [(0.03, 0), (0.011, 128), (0.02, 255)])
def test_values_are_the_nearest_of_256(scale: float, zero: int) -> None:
    x = images(3, (2, 5, 7))
    expected = (integers(x, scale, zero) - zero) * np.float32(scale)
    np.testing.assert_allclose(rounding(scale, zero)(x).numpy(), expected, rtol=1e-6)


CONVOLUTIONS = {
    "dense": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": (5, 3), "stride": (2, 1), "padding": (0, 1)},
    "depthwise": {"kernel_size": 3, "groups": 6, "bias": False},
    "same": {"kernel_size": 3, "dilation": 2, "padding": "same", "groups": 2},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@torch.no_grad()
def test_a_convolution_is_a_sum_of_integers(options: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, **options)
    made, x, scale, zero = QdqConvolution(conv), images(3, (6, 11, 9)), 0.017, 101
    each = np.abs(conv.weight.double().numpy()).max((1, 2, 3))
    weight = np.rint(conv.weight.double().numpy() / each[:, None, None, None] * 127)
    assert np.abs(made.weight.numpy() - weight).max() <= 1e-9
    exact = copy.deepcopy(conv).double()
    exact.weight.copy_(torch.from_numpy(weight))
    exact.bias = None
    sums = exact(torch.from_numpy(integers(x, scale, zero) - zero).double()).numpy()
    assert (sums == np.rint(sums)).all()
    bias = 0 if conv.bias is None else conv.bias.double().numpy()[:, None, None]
    expected = sums * scale * (each / 127)[:, None, None] + bias
    np.testing.assert_allclose(made(rounding(scale, zero)(x)).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_every_output_channel_has_its_scale() -> None:
    conv = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        conv.weight[0], conv.weight[1] = 1e-4, -1e3
    assert QdqConvolution(conv).weight.flatten().tolist() == [127] * 3 + [-127] * 3


def test_a_channel_of_zeros_stays_one() -> None:
    conv = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        conv.weight[1] = 0
    made = QdqConvolution(conv)
    assert made.scale.isfinite().all()
    assert not made.weight[1].any()


@pytest.fixture
def stage() -> QdqStage:
    graph = fx.symbolic_trace(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    graph.set_submodule("0", rounding(0.02, 128))
    graph.set_submodule("1", QdqConvolution(graph.get_submodule("1")))
    return QdqStage(graph).eval()


def test_all_numbers_are_buffers_that_keep_their_dtypes(stage: QdqStage) -> None:
    assert not list(stage.parameters())
    before = {name: value.dtype for name, value in stage.state_dict().items()}
    assert {name: value.dtype for name, value in stage.half().state_dict().items()} == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_features_keep_their_dtype(stage: QdqStage, dtype: torch.dtype) -> None:
    x = images(3, (3, 6, 7)).to(dtype)
    assert torch.equal(stage(x), stage(x.float()).to(dtype))


def test_training_is_refused(stage: QdqStage) -> None:
    x = images(3, (3, 6, 7))
    assert not stage(x).requires_grad
    with pytest.raises(RuntimeError, match="a quantised network is not trained"):
        stage(x.requires_grad_())
    with pytest.raises(RuntimeError, match="a quantised network is not trained"):
        stage.train()(x.detach())


@torch.no_grad()
def test_values_can_pass_as_they_are(stage: QdqStage) -> None:
    x, rounded = images(3, (3, 6, 7)), stage.graph.get_submodule("0")
    round_nothing(stage)
    assert torch.equal(stage(rounded(x)), stage(rounded(rounded(x))))
    assert not torch.equal(stage(x), stage(rounded(x)))
