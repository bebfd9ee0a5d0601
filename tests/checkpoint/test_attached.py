"""A backbone of torchvision or timm with exits is saved and loaded as every other network, or refused by name."""

import copy
import json
import re

import pytest
import torch
from networks import images, lived_in
from torch import nn

import eefast
from eefast.checkpoint.loading import CheckpointError, load
from eefast.surgery import attach, backbone

SHAPE = (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "exits", "head", "shape"),
    [
        ("torchvision:mobilenet_v3_small", ["features.1", "features.4"], ["conv2", "depthwise"], (3, 40, 33)),
        ("torchvision:regnet_y_400mf", ["trunk_output.block1"], "pool", (3, 33, 40)),  # computes its sizes by tensors
        pytest.param("timm:vit_tiny_patch16_224", ["blocks.2"], "token", (3, 224, 224), marks=pytest.mark.slow),
        ("timm:efficientvit_m0", [], "pool", (3, 224, 224)),  # has tables that it does not save
    ],
)
def test_an_attached_network_comes_back_bit_for_bit(tmp_path, name, exits, head, shape):
    net = lived_in(attach(backbone(name, 5).eval(), exits, head=head, input_shape=shape), seed=3).half()
    net.save(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    got = load(tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert {key: value.dtype for key, value in got.state_dict().items()} == {
        key: value.dtype for key, value in net.state_dict().items()
    }
    assert torch.equal(got.cost, net.cost)
    x = images(2, shape)
    assert all(torch.equal(a, b) for a, b in zip(got.float()(x), net.float()(x), strict=True))


@pytest.fixture(scope="module")
def small():
    """A ResNet with two exits."""
    return lived_in(attach(backbone("timm:resnet10t", 5), ["layer1", "layer2"], input_shape=SHAPE), 1)


def test_the_config_says_how_it_is_built(small, tmp_path):
    small.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "format": 1,
        "kind": "attached",
        "backbone": "timm:resnet10t",
        "exits": ["layer1", "layer2"],
        "head": "pool",
        "num_classes": 5,
        "input_shape": [3, 32, 32],
        "normalization": None,
        "criterion": "learned",
    }
    got = load(tmp_path)
    assert (got.name, got.config) == ("timm:resnet10t", small.config)
    got.with_criterion("margin").save(tmp_path)
    assert load(tmp_path).criterion.name == "margin"


def test_a_folder_in_the_old_format_is_read_and_replaced(small, tmp_path):
    small.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["kind"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "attached.json").write_text(json.dumps(config))
    got = load(tmp_path)
    x = images(3, SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(got(x), small(x), strict=True))
    got.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_copy_of_a_known_backbone_with_other_weights_can_be_saved(tmp_path):
    body = copy.deepcopy(backbone("timm:resnet10t", 5))
    lived_in(body, 2)
    attach(body, ["layer1"], input_shape=SHAPE).save(tmp_path)
    with torch.no_grad():
        x = images(2, SHAPE)
        assert torch.equal(load(tmp_path).plain()(x), body(x))


@pytest.mark.parametrize("made", ["elsewhere", "with another activation", "with another classifier", "wrapped"])
def test_a_backbone_that_could_not_be_built_again_is_refused_by_name(tmp_path, made):
    body = backbone("timm:resnet10t", 5)
    exits, name = ["layer1"], "ResNet"
    if made == "elsewhere":
        import timm

        body = timm.create_model("resnet10t", num_classes=5)
    elif made == "with another activation":
        body.layer1[0].act2 = nn.SiLU()
    elif made == "with another classifier":
        body.fc = nn.Linear(512, 7)
    else:
        body, exits, name = nn.Sequential(body), ["0.layer1"], "Sequential"
    net = attach(body, exits, input_shape=SHAPE)
    for refused in (net, net.with_criterion("margin")):
        with pytest.raises(
            ValueError, match=rf"built from a {name} that eefast\.surgery\.backbone did not make"
        ) as raised:
            refused.save(tmp_path / "net")
    for way_out in ("eefast.zoo.eenet", 'eefast.attach(eefast.surgery.backbone("torchvision:NAME"', "state_dict()"):
        assert way_out in str(raised.value)
    assert not (tmp_path / "net").exists()


def test_an_unknown_kind_is_one_clear_error(small, tmp_path):
    small.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"kind": "pruned"}))
    message = (
        "config.json says kind='pruned'; it must be one of eenet, attached, quantized, qdq; a newer eefast may read it"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path)


def test_attach_is_public():
    assert eefast.attach is attach
