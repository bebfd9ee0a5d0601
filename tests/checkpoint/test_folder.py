"""Folders of networks: what is saved comes back bit for bit; what is wrong or damaged is one clear error."""

import json
import shutil

import pytest
import torch
from damaged_files import damage, loads_or_complains
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import images, lived_in
from torch import nn

from eefast import EarlyExitNet, zoo
from eefast.checkpoint.loading import CheckpointError, load
from eefast.criteria import CRITERIA
from eefast.heads import HEADS


def activations(net):
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())


def epsilon(net):
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eps = 0.1


def other_pool(net):
    net.heads[0].pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())


def normalised_weight(net):
    nn.utils.weight_norm(next(m for m in net.modules() if isinstance(m, nn.Conv2d)))


def wrapped(net):
    net.stages[1] = nn.Sequential(net.stages[1], nn.Tanh())


@pytest.mark.parametrize("change", [activations, epsilon, other_pool, normalised_weight, wrapped])
def test_what_load_would_build_otherwise_is_not_saved(tmp_path, change):
    net = zoo.eenet("eenet20", 2, (1, 3), num_classes=3, input_shape=(2, 9, 7)).eval()
    change(net)
    for changed in (net, net.with_criterion("margin"), net.without_exits([0])):
        with pytest.raises(ValueError, match=r"layers were changed since eenet20 was built|built from eenet20 without"):
            changed.save(tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("head", "criterion"), [*((head, "learned") for head in HEADS), *(("pool", name) for name in CRITERIA)]
)
@pytest.mark.sampled(5)
def test_a_saved_network_comes_back(tmp_path, head, criterion):
    thresholds, shape = [0.123456789, float("inf")], (2, 9, 7)
    normalization = ((0.1, 1 / 3), (0.7, 0.123456789012345))
    net = lived_in(
        zoo.eenet("eenet20", 2, (1, 3), head, 3, shape, criterion=criterion, normalization=normalization), seed=1
    )
    net.thresholds = torch.tensor(thresholds)
    net.save(tmp_path / "new" / "folder")
    got = load(tmp_path / "new" / "folder")
    assert not got.training
    assert got.criterion == net.criterion
    assert [list(part) for part in got.normalization] == [list(part) for part in normalization]
    assert got.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(got.state_dict()[name], value) for name, value in net.state_dict().items())
    assert torch.equal(got.cost, net.cost)
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    assert all(torch.equal(a, b) for a, b in zip(got(pixels), net(pixels), strict=True))


def test_heads_of_several_kinds_come_back(tmp_path):
    kinds, x = ["plain", "depthwise", "conv1", "strided2"], images(3, (2, 9, 7))
    net = lived_in(zoo.eenet("eenet20", 4, (0, 1, 3, 4), kinds, 3, (2, 9, 7)), seed=1)
    net.save(tmp_path)
    got = load(tmp_path)
    assert [head.kind for head in got.heads] == [*kinds, "pool"]
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(got.all_exits(x), net.all_exits(x), strict=True))
    assert net.without_exits([1]).config["head"] == ["plain", "conv1", "strided2"]
    assert net.without_exits([0, 1, 3]).config["head"] == "conv1"


@pytest.mark.parametrize("name", ["eenet8", "eenet20", "eenet18"])
def test_every_kind_of_trunk_comes_back(tmp_path, name):
    net = lived_in(zoo.eenet(name, filters=3) if name == "eenet8" else zoo.eenet(name, 1, "pareto"), seed=2)
    net.save(tmp_path)
    got = load(str(tmp_path))
    assert got.config == {**net.config, "normalization": None}
    x = images(2, (3, 32, 32))
    assert all(torch.equal(a, b) for a, b in zip(got(x), net(x), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back_and_thresholds_stay_exact(tmp_path, dtype):
    net = zoo.eenet("eenet8", thresholds=[0.1, 1 / 3]).to(dtype)
    net.save(tmp_path)
    got = load(tmp_path)
    assert {name: value.dtype for name, value in got.state_dict().items()} == {
        name: value.dtype for name, value in net.state_dict().items()
    }
    assert got.thresholds.tolist() == torch.tensor([0.1, 1 / 3]).tolist()
    assert all(parameter.requires_grad for parameter in got.parameters())


def test_loading_leaves_random_numbers_and_files_alone(tmp_path):
    net = zoo.eenet("eenet8")
    net.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    got = load(tmp_path)
    assert torch.equal(torch.rand(1), expected)
    with torch.no_grad():
        next(got.parameters()).add_(1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sorted(before) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    net = zoo.eenet("eenet8", thresholds=[0.25, 0.75])
    net.save(tmp_path)
    net.normalization = ([object()] * 3, [1.0] * 3)
    with pytest.raises(TypeError):
        net.save(tmp_path)
    assert load(tmp_path).thresholds.tolist() == [0.25, 0.75]


def test_networks_built_from_modules_say_that_they_cannot_be_saved(tmp_path):
    net = zoo.eenet("eenet8")
    built = EarlyExitNet(list(net.stages), list(net.heads), input_shape=(3, 32, 32))
    with pytest.raises(ValueError, match="built from modules"):
        built.save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


BAD_CONFIG = {
    "format": [0, 2, "1", None, True, 1.0],
    "name": ["eenet9", "eenet20", None, [], {}, 8],
    "num_exits": [0, 3, -1, "2", 2.0, None, True, 10**30],
    "placement": [[], [1], [2, 1], [1, 2, 3], [1, 2.0], "fine", None, [True, 2], [[1], 2]],
    "head": [
        "softmax",
        "plain",
        "bnpool",
        "conv2",
        None,
        [],
        1,
        ["pool"],
        ["pool", "plain"],
        ["pool", 1],
        ["pool"] * 3,
    ],
    "num_classes": [0, 2, 4, 10**12, "3", None, True, 3.0],
    "input_shape": [[2, 8, 8], [1, 8], [1, 8, 0], [1, 8, 8.0], [1, 10**9, 10**9], "1x8x8", None, [1, 8, 8, 8]],
    "normalization": [
        [[0.5], [2.0, 2.0]],
        [[0.5]],
        [0.5, 2.0],
        [["0.5"], [2.0]],
        [[True], [2.0]],
        [[10**400], [2.0]],
        {},
    ],
    "criterion": ["confidence", None, [], 0],
    "filters": [0, 1, 3, 65535, "2", None, 10**9],
    "surprise": [1, None],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_CONFIG.items() for value in values])
def test_a_wrong_config_is_one_clear_error(broken, key, value):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError) as error:
        load(broken)
    assert str(broken) in str(error.value)


def test_an_error_names_the_key_the_value_and_what_it_must_be(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "head": "softmax"}))
    with pytest.raises(CheckpointError, match=r"config.json says head='softmax'; it must be one of pool, bnpool"):
        load(broken)


@pytest.mark.parametrize("key", sorted(BAD_CONFIG.keys() - {"surprise"}))
def test_a_config_without_one_of_its_keys_is_one_clear_error(broken, key):
    config = json.loads((broken / "config.json").read_text())
    del config[key]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"'{key}'" if key != "name" else "'name'"):
        load(broken)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"{} {}", b'{"format": NaN}'])
def test_a_config_that_is_no_object_is_one_clear_error(broken, text):
    (broken / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(broken)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(broken, name):
    (broken / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(broken)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_folders_load_or_are_one_clear_error(folder, tmp_path, data):
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(data.draw(damage((folder / name).read_bytes(), header=900)))
    loads_or_complains(tmp_path)
