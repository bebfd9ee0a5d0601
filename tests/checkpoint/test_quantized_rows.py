"""Quantised networks in folders: every kind comes back bit for bit; rows and numbers that do not fit are one error."""

import copy
import json
import shutil

import pytest
import torch
from damaged_files import damage, loads_or_complains
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import images, lived_in
from safetensors.torch import load_file, save_file
from torch import nn

import eefast
from eefast.checkpoint.loading import CheckpointError
from eefast.heads import HEADS, ExitHead
from eefast.record import TrainingRecord
from eefast.thresholds.calibration import Calibration, save_thresholds

SHAPE = (2, 9, 7)


def quantized(head="pool", winograd=1, **more):
    net = lived_in(eefast.zoo.eenet("eenet20", 2, (1, 2), head, 3, SHAPE, **more), seed=1)
    return eefast.quantize(net, images(16, SHAPE), winograd=winograd)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.sampled(3)
def test_a_quantised_network_comes_back(tmp_path, head):
    net = quantized(
        head,
        winograd=HEADS.index(head) % 3,
        normalization=((0.1, 1 / 3), (0.7, 0.123456789012345)),
        thresholds=[0.1, float("inf")],
    )
    net.save(tmp_path)
    got = eefast.load(tmp_path)
    assert not got.training
    assert got.name == "eenet20"
    assert got.config == net.config
    state = got.state_dict()
    assert {name: (v.dtype, v.tolist()) for name, v in state.items()} == {
        name: (v.dtype, v.tolist()) for name, v in net.state_dict().items()
    }
    assert str(got) == str(net)
    assert torch.equal(got.cost, net.cost)
    assert torch.equal(got.path_cost, net.path_cost)
    assert got.stage_costs == net.stage_costs
    pixels = torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8)
    assert all(torch.equal(a, b) for a, b in zip(got(pixels), net(pixels), strict=True))


@pytest.mark.parametrize("shape", [(3, 20, 16), (3, 1, 64)], ids=str)
@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d((1, 2), 2), nn.MaxPool2d((1, 3), 1, (0, 1)), nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
        nn.MaxPool2d(1, 2), nn.Conv2d(8, 8, 1),
    ],
    ids=["pool", "padded pool", "convolution", "1×1 pool", "1×1"],
)  # fmt: skip
@torch.no_grad()
def test_windows_of_one_row_come_back_in_networks_on_maps(tmp_path, layer, shape):
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    stages, heads, features = [first, nn.Sequential(layer, nn.Conv2d(8, 8, 1), nn.ReLU())], [], torch.zeros(1, *shape)
    for stage in stages:
        features = stage(features)
        heads.append(ExitHead("pool", features.shape[1:], 5, shape))
    net = lived_in(eefast.EarlyExitNet(stages, heads, input_shape=shape, criterion="max_probability"), 1)
    made = eefast.quantize(net, images(16, shape))
    made.save(tmp_path)
    x = images(5, shape, 1)
    outputs = zip(eefast.load(tmp_path).all_exits(x), made.all_exits(x), strict=True)
    assert all(torch.equal(got.logits, wanted.logits) for got, wanted in outputs)


def test_the_nested_parts_of_a_resnet_come_back(tmp_path):
    """Max pooling, projections without a ReLU, and a head that the backbone's pooling became."""
    backbone = eefast.surgery.backbones.backbone("torchvision:resnet18", 4, 3)
    net = lived_in(eefast.attach(backbone, ["layer1"], input_shape=(3, 33, 31)), seed=0)
    made = eefast.quantize(net, images(16, (3, 33, 31)), winograd=False)
    made.save(tmp_path)
    got, x = eefast.load(tmp_path), images(3, (3, 33, 31))
    assert all(torch.equal(a, b) for a, b in zip(got(x), made(x), strict=True))
    got.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_thresholds_are_saved_and_the_warning_stays_where_they_are_the_float_networks(tmp_path, caplog):
    net, x = quantized(), images(2, SHAPE)
    net.save(tmp_path)
    eefast.load(tmp_path)(x)
    assert "thresholds are those of the float network" in caplog.text
    caplog.clear()
    save_thresholds(eefast.load(tmp_path), tmp_path, {"learned": Calibration("learned", (0.25, 0.75), 1.0, 1.0)})
    got = eefast.load(tmp_path)
    got(x)
    assert got.thresholds.tolist() == [0.25, 0.75]
    assert not caplog.records


def test_the_record_comes_back(tmp_path):
    net = quantized()
    net.record = TrainingRecord("eenet20", 3, SHAPE, "mnist", None, None, 100, "0" * 16, 10, 1)
    net.save(tmp_path)
    assert eefast.load(tmp_path).record == net.record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    quantized("conv1").save(path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


STEP = ("stages", 0, "steps", 0)
BAD_ROWS = [
    (("name",), ["", None, "x" * 201, 7]),
    (("num_classes",), [2, 0, 10**12, None]),
    (("input_shape",), [[2, 9, 0], [1, 9, 7], None]),
    (("float_thresholds",), [None, [], {"none": [0.5]}, {"learned": 0.5}, {"learned": ["nan"]}, {"learned": [None]}]),
    (("costs",), [None, [], [[1, 2]], [[1, 2], [1, 2], [1, -2]], [[0, 0]] * 3, [[1, 2.0]] * 3, [[1, 2, 3]] * 3]),
    (("stages",), [None, [], [{}], 3]),
    (("stages", 1), [None, {}, []]),
    (("stages", 0, "zeros"), [[], [0], None, [0, 0, 0, 256], [0, 0, 0, -1], [0, 0, 0, True], [0, 9, 0, 0], [0] * 9]),
    (("stages", 1, "zeros"), [[1, 0, 0]]),
    (("stages", 0, "output"), [0, 4, -1, None, True, 1.0]),
    (("stages", 0, "steps"), [[], None, [None] * 3, [[]] * 3, [{"kind": "relu"}] * 3]),
    ((*STEP, "kind"), ["relu", None, [], "affine", "max_pool"]),
    ((*STEP, "source"), [1, -1, None, 4096]),
    (("stages", 0, "steps", 1, "source"), [0, 2, 5]),
    ((*STEP, "residual"), [0, 1, -2, None]),
    (("stages", 0, "steps", 2, "residual"), [0, 3, 4096]),
    ((*STEP, "channels"), [0, 17, 65536, None]),
    ((*STEP, "kernel"), [0, 1, 4, 5, 128, 129, None, 3.0]),
    ((*STEP, "stride"), [0, 3, None]),
    ((*STEP, "padding"), [-1, 4, 65535]),
    ((*STEP, "relu"), [0, None, "yes"]),
    ((*STEP, "winograd"), [1, 2, 3, -1, True, False, None]),
    (("stages", 0, "steps", 1, "winograd"), [0, 2, True, 1.0]),
    ((*STEP, "surprise"), [1]),
    (("heads", 0), [None, {}, []]),
    (("heads", 0, "kind"), ["softmax", None, [], 1]),
    (("heads", 0, "eps"), [0, -1, 2, "x", 1e-5]),
    (("heads", 0, "convs"), [None, {}, 3]),
    (("heads", 0, "convs", "output"), [2, None]),
    (("heads", 0, "convs", "steps", 0, "channels"), [15, 17]),
    (("heads", 2, "kind"), ["plain"]),
]


def changed(config, path, value):
    config = copy.deepcopy(config)
    at = config
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return config


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BAD_ROWS for value in values], ids=repr)
def test_a_wrong_row_is_one_clear_error(broken, path, value):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(changed(config, path, value)))
    with pytest.raises(CheckpointError) as error:
        eefast.load(broken)
    assert "cannot be loaded" not in str(error.value), "an unforeseen error"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((*STEP, "stride"), r"config.json: stages\[0\].steps\[0\] says stride=None; it must be 1 or 2"),
        (("heads", 1, "kind"), r"config.json: heads\[1\] says kind=None; it must be one of pool"),
    ],
)
def test_an_error_names_the_row(broken, path, message):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(changed(config, path, None)))
    with pytest.raises(CheckpointError, match=message):
        eefast.load(broken)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stages.0.scales", lambda t: t.float(), "must be torch.float64"),
        ("stages.0.scales", lambda t: -t, "must be above 0"),
        ("stages.0.scales", lambda t: t * torch.nan, "NaN"),
        ("stages.0.scales", lambda t: t * 1.01, "the stage before"),
        ("heads.0.convs.0.scales", lambda t: t * 1.01, "the stage before"),
        ("stages.0.image", lambda t: t.half(), "must be torch.float32"),
        ("stages.0.image", lambda t: -t, "multipliers above 0"),
        ("stages.0.steps.0.weight", lambda t: t.float(), "must be torch.int8"),
        ("stages.0.steps.0.weight", lambda t: t.int(), "must be torch.int8"),
        ("stages.0.steps.0.weight", lambda t: torch.full_like(t, -128), "-127 … 127"),
        ("stages.0.steps.0.bias", lambda t: torch.full_like(t, 2**31 - 1), "32 bits"),
        ("stages.0.steps.0.bias", lambda t: torch.full_like(t, -(2**31)), "32 bits"),
        ("stages.0.steps.0.bias", lambda t: t + torch.tensor([[1], [0]]), "two equal rows"),
        ("stages.0.steps.1.bias", lambda t: (t + torch.tensor([[1], [0]])).int(), "equal parity"),
        ("stages.0.steps.0.scale", lambda t: 0 * t, "must be above 0"),
        ("stages.0.steps.0.scale", lambda t: t.double(), "must be torch.float32"),
        ("stages.0.steps.0.ratio", lambda t: t + 1, "without residual"),
        ("stages.0.steps.2.ratio", lambda t: torch.full_like(t, 0.1), "16 significant bits"),
        ("stages.0.steps.2.ratio", lambda t: 0 * t, "16 significant bits"),
        ("stages.0.steps.2.ratio", lambda t: -t, "16 significant bits"),
    ],
)
def test_wrong_numbers_are_one_clear_error(broken, name, value, message):
    weights = load_file(broken / "model.safetensors")
    dtype = weights[name].dtype
    made = value(weights[name])
    made = made.to(dtype) if made.dtype == torch.int64 else made
    save_file({**weights, name: made.contiguous()}, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        eefast.load(broken)


def test_f_2x2_has_pairs_of_bias_rows_of_equal_parity(tmp_path):
    """The even and the odd row of the even columns, and of the odd columns."""
    quantized(winograd=2).save(tmp_path)
    weights, name = load_file(tmp_path / "model.safetensors"), "stages.0.steps.1.bias"
    assert weights[name].shape == (4, 16)
    for rows in ((0, 2), (1, 3)):
        bias = weights[name].clone()
        bias[list(rows)] += 1
        save_file({**weights, name: bias}, tmp_path / "model.safetensors")
        eefast.load(tmp_path)
        bias[rows[1]] += 1
        save_file({**weights, name: bias}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="equal parity"):
            eefast.load(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_folders_load_or_are_one_clear_error(folder, tmp_path, data):
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(data.draw(damage((folder / name).read_bytes(), header=4000)))
    loads_or_complains(tmp_path)
