"""`eefast evaluate`: figures as one image at a time gives them, also for checkpoints of the reference."""

import json

import pytest
from command_line import run
from networks import one_by_one
from reference_nets import EENet, answers, save, trained

import eefast
from eefast.data import datasets


def test_evaluate_agrees_with_one_by_one(shop):
    net = eefast.load(shop / "net")
    report = json.loads(run("evaluate", shop / "net", "--data-root", shop, "--batch-size", 9, "--json", "-").stdout)
    test = datasets.dataset("mnist", shop, "test")
    answer = one_by_one(net, net.prepare(test.images))
    found = report["evaluation"]
    assert found["images"] == 41
    assert found["accuracy"] == pytest.approx(float((answer.labels == test.labels).float().mean()))
    assert found["mean_cost"] == pytest.approx(float(answer.cost.mean()), abs=1e-6)
    exits = [r + w for r, w in zip(found["right"], found["wrong"], strict=True)]
    assert exits == answer.exit_index.bincount(minlength=3).tolist()
    assert report["flips"] == {"count": 0, "distance": 0.0}
    assert found["class_accuracy"][9] is None
    done = run("evaluate", shop / "net", "--data-root", shop, "--engine", "reference", "--images", 7)
    assert "7 images of mnist" in " ".join(done.stdout.split())
    assert "engine reference" in done.stdout
    with pytest.raises(ValueError, match="stages='openvino' is for engine='compact', not for engine='reference'"):
        run("evaluate", shop / "net", "--data-root", shop, "--engine", "reference", "--stages", "openvino")


def test_evaluate_takes_the_shipped_images_without_a_folder(shop):
    report = json.loads(run("evaluate", shop / "net", "--images", 3, "--json", "-").stdout)
    assert report["evaluation"]["images"] == 3


def test_evaluate_takes_a_checkpoint_of_the_reference(shop, tmp_path):
    test = datasets.dataset("mnist", shop, "test")
    x = (test.images.float() / 255 - 0.1307) / 0.3081
    model = trained(EENet(20, (2, 4), input_shape=(1, 28, 28)), x)
    save(model.state_dict(), tmp_path / "model.pt")
    exits = answers(model, x)[1]
    report = json.loads(
        run("evaluate", tmp_path / "model.pt", "--dataset", "mnist", "--data-root", shop, "--json", "-").stdout
    )["evaluation"]
    assert [r + w for r, w in zip(report["right"], report["wrong"], strict=True)] == exits.bincount(
        minlength=3
    ).tolist()
