"""Networks in simulated INT8 in folders: they come back bit for bit; what does not fit is one error."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from networks import images, lived_in
from safetensors.torch import load_file, save_file

import eefast
from eefast import zoo
from eefast.checkpoint.loading import CheckpointError
from eefast.qdq import QdqConvolution
from eefast.surgery import attach, backbone
from eefast.thresholds.calibration import Calibration, save_thresholds

SHAPE = (3, 33, 40)


def quantized(name, exits):
    net = lived_in(attach(backbone(name, 5).eval(), exits, input_shape=SHAPE), seed=3)
    return eefast.quantize(net, images(16, SHAPE))


@pytest.fixture(scope="module")
def made():
    return quantized("timm:test_efficientnet", ["blocks.0", "blocks.2"])


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    place = tmp_path_factory.mktemp("int8")
    made.save(place)
    return place


def test_it_comes_back_bit_for_bit(made, folder):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    got = eefast.load(folder)
    assert torch.equal(torch.rand(1), expected)
    assert not got.training
    assert got.config == made.config
    assert got.name == "timm:test_efficientnet"
    state = made.state_dict()
    assert {name: value.dtype for name, value in got.state_dict().items()} == {n: v.dtype for n, v in state.items()}
    assert all(torch.equal(value, state[name]) for name, value in got.state_dict().items())
    assert got.stage_costs == made.stage_costs
    x = images(3, SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(got(x), made(x), strict=True))


def carrying(kind):
    if kind == "attached":
        body = backbone("timm:test_efficientnet", 5).eval()
        return attach(body, ["blocks.0", "blocks.2"], head=["pool", "conv1"], input_shape=SHAPE, carry="features")
    return zoo.eenet(kind, 2, num_classes=5, input_shape=SHAPE, carry="features")


@pytest.mark.parametrize("kind", ["eenet8", "attached"])
def test_networks_that_carry_features_come_back_bit_for_bit(tmp_path, kind):
    made = eefast.quantize(lived_in(carrying(kind), seed=3), images(16, SHAPE))
    made.save(tmp_path)
    got, x = eefast.load(tmp_path), images(3, SHAPE)
    assert got.config == made.config
    assert got.config["carry"] == "features"
    assert got.stage_costs == made.stage_costs
    assert all(torch.equal(a, b) for a, b in zip(got(x), made(x), strict=True))
    if kind == "eenet8":
        changed_config(tmp_path, lambda c: c.update(placement=[1, 3]))
        with pytest.raises(CheckpointError, match=r"placement=\[1, 3\], but the network has \[1, 2\]"):
            eefast.load(tmp_path)


def test_weights_take_a_byte_each(made, folder):
    weights = sum(m.weight.numel() for m in made.modules() if isinstance(m, QdqConvolution))
    others = sum(v.numel() * v.element_size() for v in made.state_dict().values()) - weights
    assert (folder / "model.safetensors").stat().st_size < weights + others + 100_000


def test_saved_thresholds_are_warned_of_until_they_are_chosen_again(made, folder, tmp_path, caplog):
    eefast.load(folder)(images(1, SHAPE))
    assert "the thresholds are those of the float network" in caplog.text
    save_thresholds(copy.deepcopy(made), tmp_path, {"learned": Calibration("learned", (0.5, 0.5), 0.9, 0.5)})
    assert eefast.load(tmp_path).config["float_thresholds"] == {}


def changed_config(place: Path, change) -> None:
    config = json.loads((place / "config.json").read_text())
    change(config)
    (place / "config.json").write_text(json.dumps(config))


CONFIGS = {
    "no such convolution": (lambda c: c["convolutions"][1].append("wobble"), r"stages\.1 has no convolution 'wobble'"),
    "a stage too few": (lambda c: c["convolutions"].pop(), "has convolutions of 2 stages for 2 exits"),
    "no names": (lambda c: c["convolutions"].__setitem__(0, [3]), "convolutions=.*must be a list of at most"),
    "fewer convolutions": (lambda c: c["convolutions"][0].pop(), "lacks weights|has unknown weights"),
    "another backbone": (
        lambda c: c.update(backbone="timm:test_resnet"),
        "exits",
    ),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_do_not_fit(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "net")
    changed_config(tmp_path / "net", change)
    with pytest.raises(CheckpointError, match=message):
        eefast.load(tmp_path / "net")


SCALE, ZERO = "stages.0.graph.int8__0_conv_stem.scale", "stages.0.graph.rounded_input_1.zero"
NUMBERS = {
    "a scale of 0": (SCALE, lambda v: v * 0, r"int8__0_conv_stem\.scale must be float32 numbers above 0"),
    "scales in float16": (SCALE, lambda v: v.half(), r"int8__0_conv_stem\.scale must be float32 numbers above 0"),
    "NaN": (SCALE, lambda v: v * torch.nan, "NaN"),
    "a zero of 256": (ZERO, lambda v: v * 0 + 256, r"rounded_input_1\.zero=256 must be in 0 … 255"),
    "a zero of floats": (ZERO, lambda v: v.float(), "needs"),
}


@pytest.mark.parametrize(("name", "change", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_that_are_none(folder, tmp_path, name, change, message):
    shutil.copytree(folder, tmp_path / "net")
    weights = load_file(tmp_path / "net" / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, tmp_path / "net" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        eefast.load(tmp_path / "net")
