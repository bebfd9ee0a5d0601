"""The network and images that options name: where from, and what does not fit one another."""

from importlib import resources

import pytest
import torch
from command_line import run

import eefast
from eefast import zoo
from eefast.cli import inputs
from eefast.data import mnist


def opened(path, dataset=None, root=None, device="cpu", other_data=False):
    return inputs.open_network(path, dataset, root, False, 0, device, other_data)


@pytest.fixture(scope="module")
def shipped():
    with resources.as_file(resources.files("eefast") / "assets" / "eenet-mnist") as folder:
        yield folder


def test_the_data_set_is_that_of_the_record(shipped):
    net, source = opened(shipped)
    assert (source.dataset, source.data_root, source.record) == ("mnist", None, net.record)
    assert net.record.dataset == "mnist"


def test_without_a_record_the_normalisation_tells_the_data_set(shop, capfd):
    _, source = opened(shop / "net")
    assert (source.dataset, source.record) == ("mnist", None)
    assert "net has no training.json; its normalisation is that of mnist, which is used (--dataset)" in (
        capfd.readouterr().err.replace("\n", " ")
    )


def test_other_data_is_taken_where_it_is_asked_for(shipped):
    with pytest.raises(ValueError, match=r"trained on mnist, and --dataset fashion-mnist is another .* --other-data"):
        opened(shipped, "fashion-mnist")
    _, source = opened(shipped, "fashion-mnist", other_data=True)
    assert (source.dataset, source.record) == ("fashion-mnist", None)
    # What training kept aside is not asked for either.
    assert opened(shipped, other_data=True)[1].record is None


@pytest.mark.parametrize(
    ("channels", "dataset", "message"),
    [
        (1, "cifar10", "1 channels and has 10 classes, but cifar10 has 3 channels and 10 classes; name with --dataset"),
        (3, "mnist", "3 channels and has 10 classes, but mnist has 1 channels and 10 classes"),
        (3, "tiny-imagenet", "3 channels and has 10 classes, but tiny-imagenet has 3 channels and 200 classes"),
    ],
)
def test_data_of_other_channels_or_classes_is_refused(tmp_path, channels, dataset, message):
    zoo.eenet("eenet8", input_shape=(channels, 12, 12)).eval().save(tmp_path)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "minst"}, "dataset='minst' is unknown"),
        ({"device": "cuda"}, "device='cuda': PyTorch finds no CUDA device here; take cpu"),
    ],
    ids=["data set", "device"],
)
def test_names_are_checked_before_anything_is_read(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "no such folder", **options)


def test_a_file_needs_the_name_of_a_data_set(shop):
    with pytest.raises(ValueError, match=r"does not say what it was trained on; name the data set with --dataset"):
        opened(shop / "train-labels-idx1-ubyte")


@pytest.mark.parametrize("count", [None, 7, 41, 42])
def test_the_first_images_or_all_are_taken(shop, count):
    net, source = opened(shop / "net", root=shop)
    found = inputs.load_images(net, source, "test", count)
    assert len(found) == min(count or 41, 41)
    whole = inputs.load_images(net, source, "test")
    assert all(torch.equal(found[i][0], whole[i][0]) for i in range(len(found)))


def test_mnist_needs_no_folder_for_its_test_images_only(shop, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    net, source = opened(shop / "net")
    images, labels = mnist.mnist_test()
    found = inputs.load_images(net, source, "test")
    assert torch.equal(found.images, images)
    assert torch.equal(found.labels, labels)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inputs.load_images(net, source, "train")


def test_nothing_is_checked_where_nothing_is_saved(shop):
    inputs.check_saving(shop / "train-labels-idx1-ubyte", False)
    inputs.check_saving(shop / "net", True)
    assert eefast.load(shop / "net").thresholds is not None


def test_calibrate_saves_into_folders_only(shop):
    with pytest.raises(ValueError, match="is a file"):
        run("calibrate", shop / "train-labels-idx1-ubyte", "--save")


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "plot"])
def test_missing_images_say_how_to_get_them(shop, tmp_path, command):
    with pytest.raises(FileNotFoundError, match=r"does not exist; download=True \(--download\)"):
        run(command, shop / "net", "--data-root", tmp_path / "gone")
    assert "--download" in run(command, "--help").stdout


def test_evaluate_refuses_data_of_other_channels_or_classes(shop):
    with pytest.raises(ValueError, match="cifar10 has 3 channels and 10 classes; name with --dataset what"):
        run("evaluate", shop / "net", "--dataset", "cifar10")
