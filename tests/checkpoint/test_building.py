"""Weights of unknown origin → a network: what does not fit is refused before anything is copied."""

import pytest
import torch
from networks import lived_in
from safetensors.torch import load_file, save_file

from eefast import zoo
from eefast.checkpoint.building import build, shape_of
from eefast.checkpoint.loading import CheckpointError, load


def change(name, value):
    return lambda weights: {**weights, name: value}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: {}, "stages.0.0.0.weight is missing"),
        (lambda weights: {k: v for k, v in weights.items() if k != "stages.2.1.0.bias"}, "lacks weights, 1 of them"),
        (change("alien", torch.zeros(1)), "has unknown weights, 1 of them: alien"),
        (change("heads.1.classifier.bias", torch.zeros(4)), r"heads.1.classifier.bias is \(4,\)"),
        (change("heads.1.classifier.bias", torch.zeros(3, dtype=torch.int32)), "int32"),
        (change("heads.1.classifier.bias", torch.zeros(3, dtype=torch.float8_e5m2)), "float8"),
        (change("stages.0.0.1.num_batches_tracked", torch.tensor(1.0)), "num_batches_tracked"),
        (change("thresholds", torch.tensor([0.5, 0.5], dtype=torch.float16)), "thresholds"),
        (change("thresholds", torch.tensor([0.5])), "thresholds"),
        (change("thresholds", torch.tensor([0.5, torch.nan])), "none of them NaN"),
    ],
)
def test_wrong_weights_are_one_clear_error(broken, edit, message):
    weights = edit(load_file(broken / "model.safetensors"))
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(broken)


CONFIG = {
    "name": "eenet8",
    "num_classes": 3,
    "input_shape": (1, 8, 8),
    "normalization": None,
    "head": "pool",
    "filters": 2,
}


@pytest.fixture(scope="module")
def weights():
    return lived_in(zoo.eenet(**CONFIG), 1).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_gets_copies_of_the_weights_in_their_dtype(weights, dtype):
    given = {k: v.to(dtype) if v.is_floating_point() and k != "thresholds" else v for k, v in weights.items()}
    given["heads.0.classifier.weight"] = given["heads.0.classifier.weight"].T.contiguous().T  # its columns in a row
    net = build(CONFIG, given, 10**6)
    assert not net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, given[name])
        assert value.dtype == given[name].dtype
        assert value.is_contiguous()
        assert value.data_ptr() != given[name].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": (2, 8, 8)}, r"input_shape=\(2, 8, 8\) does not fit the weights, where it is 1"),
        ({"num_classes": 4}, "num_classes=4 does not fit the weights, where it is 3"),
        ({"filters": 3}, "filters=3 does not fit the weights, where it is 2"),
        ({"normalization": ((0.5,) * 3, (1.0,) * 3)}, "normalization has 3 means and 3 deviations"),
        ({"head": "conv1"}, r"eenet8 lacks weights, \d+ of them: heads.0.convs.0.0.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_other_weights_is_refused(weights, change, message):
    with pytest.raises(ValueError, match=message):
        build({**CONFIG, **change}, weights, 10**6)


def test_no_more_is_copied_than_the_file_has(weights):
    size = sum(value.numel() * value.element_size() for value in weights.values())
    build(CONFIG, weights, size)
    with pytest.raises(ValueError, match=f"its weights claim more than the {size - 1} bytes of the file"):
        build(CONFIG, weights, size - 1)


def test_weights_that_are_not_finite_are_refused(weights):
    with pytest.raises(ValueError, match=r"the weight heads.1.classifier.bias holds NaN"):
        build(CONFIG, {**weights, "heads.1.classifier.bias": torch.full((3,), torch.nan)}, 10**6)


@pytest.mark.parametrize("found", [{}, {"a": torch.zeros(3)}, {"a": torch.zeros(3, 1, 1)}], ids=["none", "1", "3"])
def test_the_rank_of_a_weight_is_checked(found):
    with pytest.raises(ValueError, match="the weight a is missing or does not have 2 dimensions"):
        shape_of(found, "a", 2)
