"""A whole search: what it saves and reports, resumed runs, and networks that cannot be searched."""

import json

import pytest
import torch
from candidate_cases import silent

import eefast
from eefast.data import datasets
from eefast.search import run
from eefast.search.choice import Kept
from eefast.search.options import SearchOptions
from eefast.search.run import make_supernet, search
from eefast.thresholds.calibration import Calibration
from eefast.train.images import open_images

SMALL = {"kinds": ("pool", "depthwise"), "exits": ("2", "5"), "epochs": 1, "batch_size": 16, "device": "cpu"}


def options(place, output, **more):
    given = {"network": place / "net", "data_root": place, "output": output, "seed": 3, "held_out": 70, **SMALL, **more}
    return SearchOptions(**given)


@pytest.fixture(scope="module")
def searched(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    return output, search(options(place, output, max_cost=0.5, criteria=("max_probability",), test=True), silent)


def answers(net, images, labels):
    """Share of right answers and mean cost of image after image, heads on the way included."""
    found = [net(image) for image in images.split(1)]
    right = sum(int(result.labels) == int(label) for result, label in zip(found, labels, strict=True))
    return right / len(labels), sum(float(net.path_cost[result.exit_index]) for result in found) / len(labels)


@torch.no_grad()
def test_the_saved_network_does_what_the_report_says(place, searched):
    output, report = searched
    net, before = eefast.load(output), eefast.load(place / "net")
    kept = open_images(options(place, output, max_cost=1)).held_out
    images, labels = (torch.stack([kept[i][0] for i in range(70)]), torch.tensor([int(kept[i][1]) for i in range(70)]))
    accuracy, cost = answers(net, images, labels)
    assert (report.found.thresholds.accuracy, report.mean_cost) == pytest.approx((accuracy, cost), abs=1e-5)
    assert cost <= 0.5 + 1e-6
    test = datasets.dataset("mnist", place, "test")
    assert (report.test["accuracy"], report.test["mean_cost"]) == pytest.approx(
        answers(net, test.images, test.labels), abs=1e-5
    )
    assert [*map(str, net.config["placement"])] == [*map(str, report.found.places)]
    assert sum(report.exits) == 70
    assert net.record == before.record
    # The frozen backbone answers as before, to the last bit of its weights.
    ours = [layer for stage in net.stages for layer in stage]
    theirs = [layer for stage in before.stages for layer in stage]
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    stored = json.loads((output / "search.json").read_text())
    assert stored["found"]["thresholds"]["thresholds"] == [*report.found.thresholds.thresholds]
    assert [(c["place"], c["kind"]) for c in stored["candidates"]] == [
        (place, kind) for place in (2, 5) for kind in ("pool", "depthwise")
    ]


def test_another_limit_needs_no_training(place, searched, monkeypatch):
    output, before = searched
    monkeypatch.setattr(run.EarlyExitModule, "training_step", lambda *_: pytest.fail("it is trained"))
    found = search(
        options(place, output, max_time=0.9, max_parameters=10**6, criteria=("margin", "entropy"), resume=True), silent
    )
    assert found.mean_time <= 0.9 + 1e-6
    assert found.candidates == before.candidates
    assert found.found.thresholds.criterion in ("margin", "entropy")
    assert eefast.load(output).criterion.name == found.found.thresholds.criterion
    with pytest.raises(ValueError, match=r"kinds=\['pool'\], but the run to resume has"):
        search(options(place, output, max_cost=0.5, kinds=("pool",), resume=True), silent)
    with pytest.raises(ValueError, match=r"max_cost=0.01 cannot be kept; the lowest mean cost is 0\."):
        search(options(place, output, max_cost=0.01, resume=True), silent)


def test_schemes_have_the_test_accuracy_of_the_network_that_they_are(place, searched, monkeypatch):
    def scheme_exits(supernet, candidates, criterion, limit, progress):
        # So accurate that it is what is found: then the saved network is measured on the test images, too.
        return {"fine": Kept((1, 2), Calibration(criterion, (0.3, 0.3), 2.0, 0.1))}

    monkeypatch.setattr(run, "scheme_exits", scheme_exits)
    report = search(options(place, searched[0], max_cost=0.5, test=True, resume=True), silent)
    assert report.schemes["fine"] == report.found
    wanted = {key: pytest.approx(report.test[key], abs=1e-6) for key in ("accuracy", "mean_cost")}
    assert report.schemes_test == {"fine": wanted}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_network(place, tmp_path, monkeypatch):
    small = {"max_cost": 0.5, "criteria": ("learned",), "exits": ("2",), "epochs": 2}
    whole = search(options(place, tmp_path / "whole", **small), silent)
    with monkeypatch.context() as patch:

        def stop(module):
            if module.current_epoch == 1:
                raise KeyboardInterrupt

        patch.setattr(run.EarlyExitModule, "on_train_epoch_start", stop)
        with pytest.raises(KeyboardInterrupt, match="goes on after epoch 1"):
            search(options(place, tmp_path / "stopped", **small), silent)
    resumed = search(options(place, tmp_path / "stopped", **small, resume=True), silent)
    assert (resumed.found, resumed.candidates) == (whole.found, whole.candidates)
    first, second = (eefast.load(tmp_path / name).state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "was trained on the 160 images of mnist but for 70 by seed 3; use these, or add --other-data"),
        ({"held_out": 60}, "was trained on the 160 images of mnist but for 70 by seed 3"),
        ({"network": "eenet20"}, r"network='eenet20' has random weights, .* --train-backbone"),
        ({"network": "torchvision:resnet18"}, r"network='torchvision:resnet18' has random weights, .*--weights"),
        ({"weights": "a.pt"}, r"weights='a.pt': .* has its own; leave this out"),
        ({"kinds": ("plain",), "exits": ("8",)}, "no kind of head of plain fits"),
    ],
)
def test_networks_that_cannot_be_searched(place, tmp_path, changes, message):
    wrong = options(place, tmp_path, max_cost=0.5, **changes)
    with pytest.raises(ValueError, match=message):
        make_supernet(wrong, open_images(wrong))


def test_a_network_that_is_not_there_is_named(place, tmp_path):
    wrong = options(place, tmp_path, max_cost=0.5, network=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="is neither a folder or file nor one of eenet8"):
        make_supernet(wrong, open_images(wrong))


def test_backbones_and_new_networks_are_trained_too(place, tmp_path):
    for name, exits in (("eenet20", ("1",)), ("timm:resnet10t", ("layer2",))):
        given = options(place, tmp_path, max_cost=0.5, network=name, exits=exits, freeze_backbone=False)
        made = make_supernet(given, open_images(given))
        assert made.places == (exits[0], exits[0]) or made.places == (1, 1)
        assert made.net.record.held_out == 70
