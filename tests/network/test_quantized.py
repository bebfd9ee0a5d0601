"""Quantised stages beside NumPy: what a step reads, dtypes that stay, features that come back as the same integers."""

import copy
import pickle

import numpy as np
import pytest
import torch
from integer_oracle import stage_values

from eefast.quantized import QuantizedAffine, QuantizedConvolution, QuantizedMaxPool, QuantizedStage


def convolution(source, inputs, outputs, kernel=3, seed=0, winograd=0, **more):
    generator = torch.Generator().manual_seed(seed)
    window = [(kernel, kernel), (3, 4), (4, 4)][winograd]
    weight = torch.randint(-127, 128, (outputs, inputs, *window), generator=generator)
    bias = torch.randint(-9000, 9000, (max(2, 2 * winograd), outputs), generator=generator) * 2
    bias[1] = bias[1] if winograd else bias[0]
    scale = (0.5 + torch.rand(outputs, generator=generator)) / (40 * inputs * kernel)
    more = {"padding": kernel // 2, **more}
    return QuantizedConvolution(source, weight, bias, scale, kernel=kernel, winograd=winograd, **more)


def image_stage(channels=3):
    """Every kind of step, residuals of a stride and of zero points, an image whose pixels outside are not 0."""
    steps = [
        convolution(0, channels, 5, relu=True),
        convolution(1, 5, 5, relu=True, winograd=1, seed=1),
        convolution(1, 5, 7, kernel=1, stride=2, seed=2),
        convolution(2, 5, 7, stride=2, seed=3, residual=3, ratio=0.75),
        QuantizedAffine(4, torch.rand(7) + 0.5, 20 * torch.randn(7), relu=True),
        QuantizedMaxPool(4, 3, 2, 1),
        convolution(5, 7, 17, winograd=2, seed=6),
        convolution(6, 7, 17, kernel=5, seed=4),
    ]
    scales, zeros = [1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.5, 0.6], [0, 0, 0, 100, 17, 0, 17, 0, 255]
    image = torch.tensor([[50.0] * channels, [3.5 * c + 100 for c in range(channels)]])
    return QuantizedStage(steps, scales, zeros, output=8, image=image).eval()


def feature_stage():
    """Reads features of a zero point; its residual is its input."""
    steps = [convolution(0, 17, 17), convolution(1, 17, 17, kernel=1, residual=0, ratio=0.5, seed=5)]
    return QuantizedStage(steps, [0.6, 0.2, 0.3], [255, 40, 60], output=2).eval()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 3)], ids=str)
def test_every_value_is_that_of_numpy(channels, size):
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(9))
    first, second = image_stage(channels), feature_stage()
    for stage in (first, second):
        q = stage.input_integers(x)
        found, expected = stage.integers(q), stage_values(stage, q)
        assert found.keys() == expected.keys()
        for value, integers in found.items():
            assert np.array_equal(integers.numpy(), expected[value]), value
        assert len(found[stage.output].unique()) > 1
        needed = stage.integers(q, all_values=False)
        assert needed.keys() == {stage.output}
        assert torch.equal(needed[stage.output], found[stage.output])
        x = stage(x)
        expected_features = (expected[stage.output] - stage.zeros[stage.output]) * float(stage.scales[stage.output])
        np.testing.assert_allclose(x.numpy(), expected_features, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("scale", [3e-4, 0.017, 1.0, 33.3])
def test_features_of_any_dtype_give_the_integers_back(dtype, scale):
    q = torch.arange(256.0).view(1, 1, 16, 16)
    stage = QuantizedStage([], [scale], [77], output=0).eval()
    features = stage(((q - 77) * scale).to(dtype))
    assert features.dtype == dtype
    assert torch.equal(stage.input_integers(features), q)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_dtypes_of_the_integers_stay(convert):
    stage = image_stage()
    before = {name: value.dtype for name, value in stage.state_dict().items()}
    converted = convert(torch.nn.Sequential(copy.deepcopy(stage), torch.nn.Linear(3, 3)))
    assert converted[1].weight.dtype != torch.float32
    assert {name: value.dtype for name, value in converted[0].state_dict().items()} == before
    assert all(value.is_meta for value in converted.to("meta").buffers())


def test_copies_answer_the_same():
    stage, x = image_stage(), torch.randn(2, 3, 5, 7)
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert torch.equal(other(x), stage(x))
    other = image_stage()
    for value in other.buffers():
        value.zero_()
    other.load_state_dict(stage.state_dict())
    assert torch.equal(other(x), stage(x))


def test_autocast_does_not_change_the_integers():
    stage, x = image_stage(), torch.randn(2, 3, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = stage(x)
    assert torch.equal(found, stage(x))


def test_an_image_with_nan_is_nan_alone():
    stage, x = image_stage(), torch.randn(3, 3, 5, 7)
    x[1, 2, 4, 0] = torch.nan
    x[0, 0, 0, 0], x[2, 1, 1, 1] = torch.inf, -torch.inf
    found = stage(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], stage(x[[0, 2]]))
    assert found[[0, 2]].isfinite().all()


def test_training_and_gradients_are_refused():
    stage, x = image_stage(), torch.randn(2, 3, 5, 7)
    with pytest.raises(RuntimeError, match="train the float network"):
        stage(x.clone().requires_grad_())
    stage.train()
    with pytest.raises(RuntimeError, match="not trained"):
        stage(x)
    with torch.no_grad():
        stage(x)
