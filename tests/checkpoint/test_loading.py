"""Checkpoints: what is saved comes back, reference files answer as the reference, nothing hostile runs or crashes."""

import argparse
import datetime
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import images, lived_in
from reference_nets import BasicBlock, CustomEENet, EENet, answers, importable, save, save_as_in_2019, trained
from safetensors.torch import load_file, save_file
from torch import nn

from eefast import EarlyExitNet, zoo
from eefast.checkpoint.loading import CheckpointError, load
from eefast.checkpoint.reference import architecture
from eefast.checkpoint.weights import load_weights
from eefast.criteria import CRITERIA
from eefast.heads import HEADS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The networks here are too small for two threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("head", "criterion"), [*((head, "learned") for head in HEADS), *(("pool", name) for name in CRITERIA)]
)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    lived_in(zoo.eenet("eenet8", num_classes=3, input_shape=(1, 8, 8), normalization=((0.5,), (2.0,))), 3).save(path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


BAD_CONFIG = {
    "format": [0, 2, "1", None, True, 1.0],
    "name": ["eenet9", "eenet20", None, [], {}, 8],
    "num_exits": [0, 3, -1, "2", 2.0, None, True, 10**30],
    "placement": [[], [1], [2, 1], [1, 2, 3], [1, 2.0], "fine", None, [True, 2], [[1], 2]],
    "head": ["softmax", "plain", "bnpool", "conv2", None, [], 1],
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


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: No such file"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_folder_points_to_the_folder(folder, name):
    with pytest.raises(CheckpointError, match="give the folder"):
        load(folder / name)


@pytest.mark.parametrize("argument", [{"input_shape": (1, 8, 8)}, {"head": "pool"}, {"normalization": ((0,), (1,))}])
def test_arguments_for_reference_files_are_refused_for_folders(folder, argument):
    with pytest.raises(CheckpointError, match="leave them out, the folder has them"):
        load(folder, **argument)


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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_folders_load_or_are_one_clear_error(folder, tmp_path, data):
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(data.draw(damage((folder / name).read_bytes(), header=900)))
    loads_or_complains(tmp_path)


MODULE, STATE = "module", "state_dict"


def assert_answers_as(net, model, x):
    """`net` takes the exits of the reference in one batch, and alone it says the same to the last digits."""
    probabilities, exits = answers(model, x)
    exact, exits_in_double = answers(model, x, torch.float64)
    assert torch.equal(exits, exits_in_double), "a confidence too close to the threshold to tell anything"
    assert len(exits.unique()) > 1, "every image takes the same exit, which tells little"
    with torch.no_grad():
        batch, alone = net(x), [net(image) for image in x.split(1)]
    for result in (batch.exit_index, torch.cat([one.exit_index for one in alone])):
        assert torch.equal(result, exits)
    assert torch.equal(batch.labels, probabilities.argmax(dim=1))
    tolerance = 2 * float((probabilities - exact).abs().max()) + torch.finfo(torch.float32).eps
    torch.testing.assert_close(torch.cat([one.probs for one in alone]), probabilities, rtol=0, atol=tolerance)
    torch.testing.assert_close(batch.probs, probabilities, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def eenet20():
    """One trained reference network per version and exit type, as `load` must find it."""
    made = {}

    def make(version, exit_type, shape=(3, 32, 32), placement=(2, 4)):
        key = version, exit_type, shape, placement
        if key not in made:
            x = images(7, shape, seed=4)
            made[key] = trained(EENet(20, placement, exit_type, 7, shape, version=version), x), x
        return made[key]

    return make


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", [MODULE, STATE])
@pytest.mark.parametrize(
    ("version", "exit_type", "head"),
    [
        ("head", "pool", "pool"),
        ("forked", "bnpool", "bnpool"),
        ("pteenet", "conv", "conv1"),
        ("fully_connected", "pool", "pool"),
        ("fc", "pool", "pool"),
    ],
)
def test_reference_files_answer_as_the_reference(tmp_path, eenet20, version, exit_type, head, kind, legacy):
    model, x = eenet20(version, exit_type)
    path = save(model if kind == MODULE else model.state_dict(), tmp_path / "model.pt", legacy)
    said = kind == MODULE and version != "fc"
    net = load(path, input_shape=None if said else x.shape[1:], head=head, normalization=((0.5,) * 3, (0.2,) * 3))
    assert (net.config["name"], net.config["head"], net.config["placement"]) == ("eenet20", head, [2, 4])
    assert net.num_classes == 7
    assert not net.training
    assert net.normalization == ((0.5,) * 3, (0.2,) * 3)
    assert_answers_as(net, model, x)


@pytest.mark.parametrize("exit_type", ["conv2", "conv3"])
def test_longer_convolution_exits_of_pteenet(tmp_path, eenet20, exit_type):
    model, x = eenet20("pteenet", exit_type, (1, 13, 11))
    net = load(save(model.state_dict(), tmp_path / "model.pt"), input_shape=(1, 13, 11))
    assert net.config["head"] == exit_type
    assert_answers_as(net, model, x)


@pytest.mark.parametrize("kind", [MODULE, STATE])
def test_plain_exits(tmp_path, eenet20, kind):
    model, x = eenet20("head", "plain", (1, 13, 11), (1, 3))
    path = save(model if kind == MODULE else model.state_dict(), tmp_path / "model.pt")
    net = load(path, input_shape=(1, 13, 11))
    assert net.config["head"] == "plain"
    assert_answers_as(net, model, x)
    with pytest.raises(CheckpointError, match=r"input_shape=\(1, 13, 12\) does not fit plain exits"):
        load(path, input_shape=(1, 13, 12))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_bnpool_exits_come_out_of_the_module_only(tmp_path, eenet20, legacy):
    model, x = eenet20("head", "bnpool")
    assert_answers_as(load(save(model, tmp_path / "module.pt", legacy)), model, x)
    bare = save(model.state_dict(), tmp_path / "bare.pt", legacy)
    with pytest.raises(CheckpointError, match=r"lacks the BatchNorms .* load the file that torch.save\(model\) wrote"):
        load(bare, input_shape=(3, 32, 32), head="bnpool")


@pytest.mark.parametrize("exit_type", ["pool", "bnpool"])
def test_a_module_as_torch_1_0_pickled_it_on_a_gpu(tmp_path, eenet20, exit_type):
    model, x = eenet20("head", exit_type)
    path = save_as_in_2019(model, tmp_path / "model.pt")
    assert b"get_thnn_function_backend" in path.read_bytes()
    assert b"class ExitBlock(nn.Module)" in path.read_bytes()
    assert_answers_as(load(path), model, x)


@pytest.mark.parametrize(("filters", "kind"), [(2, MODULE), (4, STATE), (8, MODULE)])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_eenet8_answers_as_the_reference(tmp_path, filters, kind, legacy):
    x = images(9, (1, 28, 28), seed=5)
    model = trained(CustomEENet((1, 28, 28), 10, filters), x)
    path = save(model if kind == MODULE else model.state_dict(), tmp_path / "model.pt", legacy)
    net = load(path, input_shape=(1, 28, 28), head="pool")
    assert net.config["name"] == "eenet8"
    assert net.config["filters"] == filters
    assert_answers_as(net, model, x)
    with pytest.raises(CheckpointError, match=r"give input_shape=\(channels, height, width\)"):
        load(path)


@pytest.mark.parametrize(
    ("depth", "placement", "shape"),
    [
        (32, (15,), (3, 17, 16)),
        (18, (1, 2, 7), (3, 24, 33)),
        (50, (4, 16), (3, 17, 16)),
    ],
)
def test_every_kind_of_block_answers_as_the_reference(tmp_path, depth, placement, shape):
    x = images(5, shape, seed=6)
    model = trained(EENet(depth, placement, "pool", 11, shape), x)
    net = load(save(model, tmp_path / "model.pt"))
    assert (net.config["name"], net.config["placement"]) == (f"eenet{depth}", list(placement))
    assert_answers_as(net, model, x)


@pytest.mark.parametrize(
    ("depth", "placement"),
    [
        (20, (9,)), (32, (15,)), (44, (1, 21)), (56, (2, 3, 4, 26)), (110, (3, 6, 8, 10, 12, 14, 16, 18)),
        (18, (1, 2, 7)), (34, (5,)), (50, (4, 16)), (101, (3, 20)), (152, (3, 20)),
    ],
)  # fmt: skip
def test_depth_and_placement_are_read_off_the_shapes_of_the_weights(depth, placement):
    with torch.device("meta"):
        shapes = EENet(depth, (*placement,), "pool", 2, (3, 16, 16)).state_dict()
        ours = zoo.eenet(f"eenet{depth}", placement=placement, num_classes=2).state_dict()
    # The last stage has two names in the reference, which are told by their memory.
    n = len(placement)
    shapes |= {name: shapes[f"stages.{n}.{name[7:]}"] for name in shapes if name.startswith("layers.")}
    config, weights = architecture(shapes)
    assert (config["name"], config["placement"]) == (f"eenet{depth}", list(placement))
    assert {name: v.shape for name, v in weights.items()} == {
        name: v.shape for name, v in ours.items() if name != "thresholds"
    }


@pytest.mark.parametrize("exits", [1, 3, 7])
def test_the_threshold_of_loss_v3_decides_exactly_as_in_double(tmp_path, exits):
    x = images(9, (1, 12, 12), seed=7)
    model = trained(EENet(20, range(1, exits + 1), input_shape=(1, 12, 12), loss_func="v3"), x)
    net = load(save(model, tmp_path / "model.pt"))
    threshold = float(net.thresholds[0])
    above = float(torch.tensor(threshold).nextafter(torch.tensor(2.0)))
    # Every float32 up to the threshold is at most 1/n in double, every one above it is more.
    assert threshold <= 1 / exits < above
    assert net.thresholds.tolist() == [threshold] * exits
    if exits > 1:
        assert_answers_as(net, model, x)


@pytest.mark.parametrize("kind", [MODULE, STATE])
def test_names_of_data_parallel_are_understood(tmp_path, kind):
    x = images(7, (1, 12, 12), seed=4)
    model = trained(EENet(20, (2, 4), "pool", 7, (1, 12, 12)), x)
    expected = load(save(model, tmp_path / "model.pt")).state_dict()
    model.set_multiple_gpus()
    thing = nn.DataParallel(model) if kind == STATE else model
    path = save(thing if kind == MODULE else thing.state_dict(), tmp_path / "parallel.pt")
    got = load(path, input_shape=(1, 12, 12)).state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_batch_counters_may_be_absent(tmp_path, eenet20):
    model, x = eenet20("fc", "pool")
    state = {name: value for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    assert_answers_as(load(save(state, tmp_path / "model.pt"), input_shape=(3, 32, 32)), model, x)


def test_half_precision_files_stay_in_half_precision(tmp_path, eenet20):
    model, _ = eenet20("head", "pool")
    state = {name: v.half() if v.is_floating_point() else v for name, v in model.state_dict().items()}
    net = load(save(state, tmp_path / "model.pt"), input_shape=(3, 32, 32))
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float16}
    assert net.thresholds.dtype == torch.float32


def test_a_loaded_reference_network_can_be_saved(tmp_path, eenet20):
    model, x = eenet20("head", "bnpool")
    load(save(model, tmp_path / "model.pt"), normalization=((0.5,) * 3, (0.2,) * 3)).save(tmp_path / "folder")
    assert_answers_as(load(tmp_path / "folder"), model, x)


class Settings:
    """What people keep beside the weights: an object of a class that only they have."""


def around(state):
    """`state` as people's training scripts save it, by what they use."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(value.float().clone()) for value in state.values()])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def named(prefix):
        return {prefix + name: value for name, value in state.items()}

    return {
        "plain": state,
        "DataParallel": named("module."),
        "torch.compile": named("_orig_mod."),
        "compiled, then parallel": named("module._orig_mod."),
        "parallel, then compiled": named("_orig_mod.module."),
        "Lightning": {
            "state_dict": {**named("model."), "loss.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 0.1, "path": pathlib.PurePosixPath("data"), "settings": Settings()},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
            "loops": {"fit_loop": {"state_dict": {}}},
        },
        "net": {"net": state, "acc": 93.1, "epoch": 3},
        "model_state_dict": {"epoch": 1, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict()},
        "nested": {"checkpoint": {"model": state}},
        "timm": {
            "arch": "resnet18",
            "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"), dtype=torch.float16, size=torch.Size([3])),
            "state_dict": state,
            "state_dict_ema": named("module."),
            "optimizer": optimizer.state_dict(),
            "metric": np.float64(0.9),
        },
        "averaged": {"model_ema": {**named("module."), "n_averaged": torch.tensor(3)}},
        "odd": {
            "model": state,
            "when": datetime.datetime(2026, 1, 1),
            "counts": Counter("abc"),
            "lists": defaultdict(list, a=[1]),
            "random": np.random.default_rng(0),
            "array": np.zeros(3),
            "sets": {1, 2, frozenset({3})},
            "complex": [1j, b"bytes", bytearray(b"x"), 2**200, slice(1, 2)],
            "sizes": {(3, 32, 32): 1},
        },
    }


AROUND = sorted(around(CustomEENet((1, 8, 8), 3, 2).state_dict()))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", AROUND)
def test_weights_are_found_where_people_keep_them(tmp_path, name, protocol):
    state = lived_in(CustomEENet((1, 8, 8), 3, 2), seed=8).state_dict()
    expected = load(save(state, tmp_path / "plain.pt"), input_shape=(1, 8, 8)).state_dict()
    torch.save(around(state)[name], tmp_path / "model.pt", pickle_protocol=protocol)
    got = load(tmp_path / "model.pt", input_shape=(1, 8, 8)).state_dict()
    assert all(torch.equal(got[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", AROUND)
def test_weights_of_a_backbone_are_found_where_people_keep_them(tmp_path, name):
    made, other = (lived_in(CustomEENet((1, 8, 8), 3, 2), seed) for seed in (8, 9))
    torch.save(around(made.state_dict())[name], tmp_path / "model.pt")
    load_weights(other, tmp_path / "model.pt")
    assert all(torch.equal(other.state_dict()[key], value) for key, value in made.state_dict().items())


def test_of_several_networks_the_usual_one_is_taken_and_said(tmp_path, caplog):
    states = [lived_in(CustomEENet((1, 8, 8), 3, 2), seed).state_dict() for seed in (8, 9)]
    first = load(save(states[0], tmp_path / "plain.pt"), input_shape=(1, 8, 8)).state_dict()
    path = save({"model_ema": states[1], "model": states[0]}, tmp_path / "model.pt")
    got = load(path, input_shape=(1, 8, 8)).state_dict()
    assert all(torch.equal(got[key], value) for key, value in first.items())
    assert "those under 'model' are used" in caplog.text
    two = {f"{prefix}.{key}": value for prefix in ("teacher", "student") for key, value in states[0].items()}
    with pytest.raises(CheckpointError, match=r"holds 2 networks, under 'student.', 'teacher.'"):
        load(save(two, tmp_path / "model.pt"), input_shape=(1, 8, 8))


@pytest.mark.parametrize("prefix", ["", "net.", "module."])
def test_weights_of_eefast_without_their_folder_say_the_way_out(tmp_path, prefix):
    state = {prefix + key: value for key, value in zoo.eenet("eenet8").state_dict().items()}
    with pytest.raises(CheckpointError, match=r"do not say its exit rule; give the folder that net.save\(folder\)"):
        load(save({"state_dict": state}, tmp_path / "last.ckpt"), input_shape=(3, 32, 32))


@pytest.fixture(scope="module")
def state():
    return EENet(20, (2, 4), "pool", 7, (1, 12, 12)).state_dict()


def without(*parts):
    return lambda state: {name: v for name, v in state.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("alien.weight", torch.zeros(1)), "'alien.weight' is no weight of an EENet"),
        (change("stages.0.1.conv9.weight", torch.zeros(1)), "unknown weights, 1 of them: stages.0.1.conv9.weight"),
        (change("thresholds", torch.zeros(2)), "'thresholds' is no weight of an EENet"),
        (change("fc.weight", torch.zeros(7, 64)), "twice, under different names"),
        (change("layers.0.conv1.weight", torch.zeros(16, 16, 3, 3)), "differs from the last stage"),
        (change("layers.9.conv1.weight", torch.zeros(16, 16, 3, 3)), "differs from the last stage"),
        (change("exits.0.classifier.0.weight", torch.zeros(7, 17)), "plain"),
        (change("exits.1.classifier.0.weight", torch.zeros(7, 17)), r"heads.1.classifier.weight is \(7, 17\)"),
        (change("exits.0.classifier.0.weight", torch.zeros(7)), "does not have 2 dimensions"),
        (change("exits.5.classifier.0.weight", torch.zeros(7, 16)), "numbered from 0"),
        (change("stages.0.0.0.weight", torch.zeros(16, 2, 3, 3)), "input_shape=.* weights, where it is 2"),
        (change("stages.0.0.0.weight", torch.zeros(16, 1, 5, 5)), "are no EENet of eefast.zoo"),
        (change("stages.0.0.0.weight", torch.tensor(0.0)), "dimensions"),
        (change("stages.0.0.0.weight", torch.zeros(16, 1, 3, 3).to_sparse()), "not a dense tensor in memory"),
        (change("stages.0.0.0.weight", torch.zeros(16, 1, 3, 3, dtype=torch.complex64)), "complex64"),
        (change("stages.0.0.0.weight", "weight"), "is a str, not a dense tensor"),
        (change("stages.0.0.0.weight", torch.zeros(1).expand(10**9, 10**9)), "more than the file holds"),
        (change("exits.0.classifier.0.weight", torch.zeros(1).expand(10**9, 16)), "more than the file holds"),
        (change("exits.0.classifier.0.weight", torch.zeros(1, device="meta")), "not a dense tensor in memory"),
        (without("exits.0"), "numbered from 0"),
        (without("exits"), "numbered from 0"),
        (without("classifier"), "exits.0.classifier.0.weight is missing"),
        (without("conv2"), "lacks weights"),
        (without("stages.0.0.0", "layers"), "is no EENet"),
        (without("stages.2.3", "layers.3"), "8 residual blocks"),
        (without("exits.1.confidence.0.bias"), "lacks weights, 1 of them: heads.1.confidence.bias"),
        (lambda state: {"state_dict": {**state, "epoch": 3}}, "'epoch' is a int, not a dense tensor in memory"),
        (lambda state: {"weights_of": state, "epoch": 3}, "not a dense tensor in memory"),
        (lambda state: {0: torch.zeros(1)}, "neither a module"),
        (lambda state: {}, "is no EENet"),
        (lambda state: list(state.values()), "holds a list"),
        (lambda state: torch.zeros(3), "holds a Tensor"),
        (lambda state: None, "holds a NoneType"),
        (lambda state: zoo.resnet("resnet20").state_dict(), "is no EENet"),
        (
            lambda state: CustomEENet((1, 8, 8), 3, 4).state_dict() | {"exit1_classifier.0.bias": torch.zeros(2)},
            "heads.1",
        ),
    ],
)
def test_a_wrong_state_dict_is_one_clear_error(tmp_path, state, edit, message):
    path = save(edit(state), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        load(path, input_shape=(1, 12, 12))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("input_shape", [(1, 12), (1, 0, 12), (1, 12, 12.0), 12, "1,12,12", (1, 10**9, 10**9)])
def test_a_wrong_input_shape_is_named(tmp_path, state, input_shape):
    with pytest.raises(CheckpointError, match="input_shape="):
        load(save(state, tmp_path / "model.pt"), input_shape=input_shape)


@pytest.mark.parametrize("head", ["conv1", "plain", "bnpool", "softmax"])
def test_an_exit_type_that_the_file_has_not_is_named(tmp_path, eenet20, head):
    path = save(eenet20("head", "pool")[0], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"head='{head}', but the exits of this file are 'pool'"):
        load(path, head=head)


def test_a_bnpool_module_without_its_batchnorms_is_refused(tmp_path):
    model = EENet(20, (2, 4), "bnpool")
    for exit_block in model.exits:
        del exit_block.layers[0]
    with pytest.raises(CheckpointError, match="its exits are 'bnpool', but its weights are those of 'pool'"):
        load(save(model, tmp_path / "model.pt"))


@pytest.mark.parametrize("kind", [MODULE, STATE])
def test_bnpool_of_pteenet_is_refused(tmp_path, eenet20, kind):
    model, _ = eenet20("pteenet", "bnpool")
    path = save(model if kind == MODULE else model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="ReLU that EENet's does not have"):
        load(path, input_shape=(3, 32, 32))


@pytest.mark.parametrize("threshold", [float("nan"), None, "0.5", True, [0.5], np.float64(0.5), torch.tensor(0.5)])
def test_a_threshold_that_is_no_number_is_refused(tmp_path, threshold):
    model = EENet(20, (2, 4), input_shape=(1, 8, 8))
    model.exit_threshold = threshold
    with pytest.raises(CheckpointError, match="exit_threshold"):
        load(save(model, tmp_path / "model.pt"))


class Call:
    """Pickles as a call, which any ordinary unpickler makes."""

    def __init__(self, function, *args, state=None):
        self.answer = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.answer


def calls(marker):
    """Payloads that would all create `marker`."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch '{marker}'"),
        "eval": Call(eval, touch),
        "exec": Call(exec, touch),
        "subprocess": Call(subprocess.call, ["touch", str(marker)]),
        "open": Call(open, str(marker), "w"),
        "getattr": Call(getattr, Call(open, str(marker), "w"), "close"),
        "torch.save": Call(torch.save, {}, str(marker)),
        "numpy": Call(np.save, str(marker), 0),
        "state": Call(OrderedDict, state={"x": Call(os.system, f"touch '{marker}'")}),
    }


CALLS = sorted(calls(""))


@pytest.mark.parametrize("name", CALLS)
def test_the_payloads_are_real(tmp_path, name):
    pickle.loads(pickle.dumps(calls(tmp_path / "marker")[name], protocol=2))
    assert list(tmp_path.glob("marker*"))


def module_with(payload):
    model = CustomEENet((1, 8, 8), 3, 2)
    model.exit0_classifier.__dict__["hidden"] = [{"deep": (payload,)}]
    return model


WRAPPINGS = {
    "bare": lambda payload: payload,
    "state_dict": lambda payload: OrderedDict(CustomEENet((1, 8, 8), 3, 2).state_dict(), weight=payload),
    "key": lambda payload: {"a": torch.zeros(1), "b": [payload]},
    "module": module_with,
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", CALLS)
def test_no_payload_runs(tmp_path, name, legacy, wrapping):
    path = save(WRAPPINGS[wrapping](calls(tmp_path / "marker")[name]), tmp_path / "model.pt", legacy)
    with pytest.raises(CheckpointError):
        load(path, input_shape=(1, 8, 8))
    assert not list(tmp_path.glob("marker*"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", CALLS)
def test_no_payload_of_a_plain_pickle_runs(tmp_path, name, protocol):
    payload = pickle.dumps({"a": calls(tmp_path / "marker")[name]}, protocol)
    for content in (payload, legacy_file(payload), archive(data_pkl=payload, version=b"3")):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(CheckpointError):
            load(tmp_path / "model.pt", input_shape=(1, 8, 8))
    assert not list(tmp_path.glob("marker*"))


def test_the_error_names_the_code_and_does_not_recommend_to_run_it(tmp_path):
    path = save(calls(tmp_path / "marker")["os.system"], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"names '(posix|nt).system'.*nothing of it was run") as error:
        load(path)
    assert "weights_only" not in str(error.value)


def test_loading_in_threads_allows_no_names_to_anybody_else(intact, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    path = tmp_path / "model.pt"
    path.write_bytes(intact[MODULE, True])
    with ThreadPoolExecutor(4) as threads:
        nets = list(threads.map(lambda _: load(path, input_shape=(1, 8, 8)), range(12)))
    assert len({id(net) for net in nets}) == 12
    assert set(torch.serialization.get_safe_globals()) == before


def legacy_file(body: bytes, keys: list[str] = []) -> bytes:  # noqa: B006
    """The old format around a pickled object and no storages."""
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, protocol=2) for part in header) + body + pickle.dumps(keys, protocol=2)


class RecordPickler(pickle.Pickler):
    """Writes `Record` objects as persistent ids, as the old format wrote storages and classes."""

    def persistent_id(self, thing):
        return thing.parts if isinstance(thing, Record) else None


class Record:
    def __init__(self, *parts):
        self.parts = parts

    def __repr__(self):
        return f"Record{self.parts}"


def with_records(thing) -> bytes:
    stream = io.BytesIO()
    with importable():
        RecordPickler(stream, protocol=2).dump(thing)
    return legacy_file(stream.getvalue())


@pytest.mark.parametrize(
    "thing",
    [
        Record("module", os.system, "f.py", "source"),
        Record("module", nn.Linear, "f.py", "source"),
        Record("module", Record("module", eval, "f.py", "source"), "f.py", "source"),
        Record("module", "f.py", "source"),
        Record("module", BasicBlock, "f.py", "source", "more"),
        Record("module"),
        Record("class", nn.Linear, "f.py", "source"),
        Record("storage", "FloatStorage", "0", "cpu", 1, None),
        Record("storage", torch.FloatStorage, "0", "cpu", 2**62, None),
        Record("storage", torch.FloatStorage, "0", "cpu", -1, None),
        Record("storage"),
        [Record("storage", torch.FloatStorage, "0", "cuda:7", 1, ("1", 0, 2**40))],
        Record(),
        "module",
    ],
    ids=lambda thing: str(thing)[:50],
)
def test_records_of_the_old_format_run_and_write_nothing(tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "dump_patches", True)
    (tmp_path / "model.pt").write_bytes(with_records(thing))
    with pytest.raises(CheckpointError):
        load(tmp_path / "model.pt", input_shape=(1, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_sources_in_a_module_are_neither_compared_nor_written(tmp_path, monkeypatch, eenet20, recwarn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "dump_patches", True)
    model, _ = eenet20("head", "pool")
    path = save_as_in_2019(model, tmp_path / "model.pt")
    path.write_bytes(path.read_bytes().replace(b"class ExitBlock(nn.Module)", b"class ExitBlock(os.Module)"))
    recwarn.clear()
    load(path)
    assert not recwarn.list
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_modules_without_end_are_refused(tmp_path):
    loop = EENet(20, (2, 4), input_shape=(1, 8, 8))
    loop.exits[0]._modules["itself"] = loop
    doubling = EENet(20, (2, 4), input_shape=(1, 8, 8))
    for _ in range(64):
        doubling = nn.Sequential(doubling, doubling)
    for model in (loop, doubling):
        with pytest.raises(CheckpointError, match="its modules hold over"):
            load(save(model, tmp_path / "model.pt"))


@pytest.mark.parametrize("table", [None, [], {"a" * 1000: None}, {1: torch.zeros(1)}, torch.zeros(1)])
def test_modules_without_tables_are_refused(tmp_path, table):
    model = EENet(20, (2, 4), input_shape=(1, 8, 8))
    model.exits[0].__dict__["_parameters"] = table
    with pytest.raises(CheckpointError, match="_parameters"):
        load(save(model, tmp_path / "model.pt"))


def archive(compression=zipfile.ZIP_STORED, **records: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in records.items():
            file.writestr(f"archive/{name.replace('__', '/').replace('_', '.')}", content)
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


TENSOR_OF_NOTHING = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00(%s%st(K\x01K\x01t\x89ccollections\nOrderedDict\n)RtR."
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello",
        b"PK",
        b"PK\x03\x04",
        b"\x80\x02.",
        b"\x80\x02}q\x00.",
        b"\x93NUMPY",
        bytes(1000),
        np.random.default_rng(0).bytes(5000),
        archive(),
        archive(data_pkl=b""),
        archive(data_pkl=b"\x80\x02]q\x00.", version=b"3"),
        archive(data_pkl=b"\x80\x02}q\x00X\xff\xff\xff\xff", version=b"3"),
        archive(data_pkl=b"\x80\x02r\xff\xff\xff\xff.", version=b"3"),
        archive(data_pkl=b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", version=b"3"),
        archive(
            data_pkl=TENSOR_OF_NOTHING % (b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f"), data__0=bytes(16), version=b"3"
        ),
        archive(data_pkl=TENSOR_OF_NOTHING % (b"J\xff\xff\xff\xff", b"K\x01"), data__0=bytes(16), version=b"3"),
        archive(zipfile.ZIP_DEFLATED, data_pkl=b"\x80\x02]q\x00.", data__0=bytes(10**7), version=b"3"),
        legacy_file(b""),
        legacy_file(b"\x80\x02tQ."),
        legacy_file(b"\x80\x02(X\x06\x00\x00\x00moduletQ."),
        legacy_file(pickle.dumps({}, protocol=2), ["no such storage"]),
        legacy_file(pickle.dumps({}, protocol=2)) + bytes(100),
        tar(),
        archive(data_pkl=b"\x80\x02]q\x00.", constants_pkl=b"\x80\x02).", version=b"3"),
        struct.pack("<Q", 2**60) + b"{}",
    ],
    ids=lambda content: repr(content[:4]),
)
def test_other_files_are_one_clear_error(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=str(tmp_path / "model.pt")):
        load(tmp_path / "model.pt", input_shape=(1, 8, 8))


def test_an_archive_that_unpacks_to_more_than_itself_is_refused_unread(tmp_path):
    content = archive(zipfile.ZIP_DEFLATED, data__0=bytes(10**7), data_pkl=b"\x80\x02]q\x00.", version=b"3")
    (tmp_path / "bomb.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="is compressed, 10000000 bytes packed into"):
        load(tmp_path / "bomb.pt")


def damage(content: bytes, header: int | None = None) -> st.SearchStrategy[bytes]:
    """`content` cut short, or with some bytes changed, preferably among the first `header` ones."""
    position = st.integers(0, (header or len(content)) - 1) | st.integers(0, len(content) - 1)
    changes = st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=4)
    return st.integers(0, len(content) - 1).map(lambda n: content[:n]) | changes.map(lambda c: changed(content, c))


def changed(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    copy = bytearray(content)
    for position, value in changes:
        copy[position % len(copy)] = value
    return bytes(copy)


def loads_or_complains(path):
    try:
        net = load(path, **({} if path.is_dir() else {"input_shape": (1, 8, 8)}))
    except CheckpointError:
        return
    assert isinstance(net, EarlyExitNet)
    with torch.no_grad():
        result = net(torch.zeros(2, *net.input_shape, dtype=next(net.parameters()).dtype))
    assert result.logits.shape == (2, net.num_classes)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / "model.pt"
    model = CustomEENet((1, 8, 8), 3, 2)
    return {
        (kind, legacy): save(model if kind == MODULE else model.state_dict(), path, legacy).read_bytes()
        for kind in (MODULE, STATE)
        for legacy in (False, True)
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_load_or_are_one_clear_error(intact, tmp_path, data):
    content = intact[data.draw(st.sampled_from(sorted(intact)))]
    (tmp_path / "model.pt").write_bytes(data.draw(damage(content)))
    loads_or_complains(tmp_path / "model.pt")


def test_the_undamaged_files_load(intact, tmp_path):
    for content in intact.values():
        (tmp_path / "model.pt").write_bytes(content)
        assert load(tmp_path / "model.pt", input_shape=(1, 8, 8)).num_classes == 3
