"""Files of the reference repository answer as the reference; those of other networks are one clear error."""

import numpy as np
import pytest
import torch
from networks import images
from reference_nets import MODULE, STATE, CustomEENet, EENet, answers, save, save_as_in_2019, trained
from torch import nn

from eefast import zoo
from eefast.checkpoint.loading import CheckpointError, load
from eefast.checkpoint.reference import architecture


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
@pytest.mark.sampled(8)
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
@pytest.mark.sampled(3)
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


def change(name, value):
    return lambda weights: {**weights, name: value}


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
