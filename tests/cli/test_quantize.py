"""`eefast quantize`: a folder that loads, thresholds for its outputs, what is printed, other commands, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import held_out_of, run
from idx_files import idx_bytes
from networks import Stage, lived_in, one_by_one

import eefast
from eefast import zoo
from eefast.quantized import QuantizedConvolution, QuantizedStage
from eefast.thresholds import calibration
from eefast.thresholds.outputs import collect


def words(shop, *more):
    return ["quantize", shop / "net", "--data-root", shop, "--held-out", 31, "--seed", 5, "--few-images", *more]


@pytest.fixture(scope="module")
def made(shop):
    """The folder of a quantised network, and what the command said."""
    done = run(*words(shop, "--output", shop / "int8", "--json", shop / "quantize.json"))
    return shop / "int8", done.stdout, json.loads((shop / "quantize.json").read_text())


def mean_cost(net, images):
    return float(one_by_one(net, net.prepare(images)).cost.double().mean())


def test_quantize_writes_a_network_that_loads(shop, made):
    folder, text, report = made
    net, quantized = eefast.load(shop / "net"), eefast.load(folder)
    assert all(isinstance(stage, QuantizedStage) for stage in quantized.stages)
    images, labels = held_out_of(shop, 31, 5)
    # The same weights as from these images in Python.
    expected = eefast.quantize(net, images)
    for name, value in expected.state_dict().items():
        assert name == "thresholds" or torch.equal(quantized.state_dict()[name], value), name
    # The best thresholds at the cost that the float network has.
    bound = mean_cost(net, images)
    outputs, _ = collect(expected, [(images, labels)])
    best = calibration.calibrate(outputs, labels, net.cost, "learned", max_cost=bound)
    assert quantized.thresholds.tolist() == list(best.thresholds) == report["thresholds"]
    assert mean_cost(quantized, images) <= bound + 1e-9
    assert json.loads((folder / "thresholds.json").read_text()) == {"learned": list(best.thresholds)}
    assert report["chosen"]["learned"]["accuracy"] == report["int8"]["accuracy"] == best.accuracy
    assert f"at most the mean cost in float32, {bound:.4f}" in text
    assert f"saved: {folder}" in text


def test_the_table_is_what_both_networks_answer(shop, made):
    folder, text, report = made
    images, labels = held_out_of(shop, 31, 5)
    nets = {"float32": eefast.load(shop / "net"), "int8": eefast.load(folder)}
    answers = {name: one_by_one(net, net.prepare(images)) for name, net in nets.items()}
    for name, net in nets.items():
        last = net.all_exits(net.prepare(images))[-1].logits.argmax(1)
        assert report[name]["accuracy"] == float((answers[name].labels == labels).double().mean())
        assert report[name]["mean_cost"] == pytest.approx(float(answers[name].cost.mean()), abs=1e-6)
        assert report[name]["last_exit_accuracy"] == float((last == labels).double().mean())
        for kind in ("accuracy", "last_exit_accuracy"):
            assert f"{report[name][kind]:.2%}" in text
    others = float((answers["float32"].exit_index != answers["int8"].exit_index).double().mean())
    assert report["other_exits"] == others
    assert f"{others:.2%} of the images take another exit" in text
    convolutions = [m for m in nets["int8"].modules() if isinstance(m, QuantizedConvolution)]
    assert sum(report["convolutions"].values()) == len(convolutions)
    assert report["convolutions"]["F(2×2)"] == sum(c.winograd == 2 for c in convolutions)
    assert report["int8"]["megabytes"] < report["float32"]["megabytes"]


def test_thresholds_that_are_kept_warn_once(shop, tmp_path, caplog):
    # Thresholds of an earlier run in the folder are not those of this network.
    shutil.copytree(shop / "net", tmp_path / "net")
    folder = tmp_path / "net-int8"
    command = ["quantize", tmp_path / "net", *words(shop)[2:], "--no-winograd"]
    run(*command, "--criterion", "all", "--max-cost", 0.8)
    assert set(json.loads((folder / "thresholds.json").read_text())) == set(eefast.criteria.CRITERIA)
    done = run(*command, "--keep-thresholds")
    assert "those of the float32 network, not chosen on outputs in INT8" in done.stdout
    assert "0 F(2,3), 0 F(2×2)" in done.stdout
    assert not (folder / "thresholds.json").exists()
    kept = eefast.load(folder)
    assert kept.thresholds.tolist() == eefast.load(shop / "net").thresholds.tolist()
    images, _ = held_out_of(shop, 31, 5)
    caplog.clear()
    for _ in range(3):
        kept(images)
    assert caplog.text.count("thresholds are those of the float network") == 1
    # After `eefast calibrate` nothing is left to say.
    run("calibrate", folder, *words(shop)[2:], "--max-cost", 0.7, "--no-assurance", "--save")
    caplog.clear()
    eefast.load(folder)(images)
    assert not caplog.records


def test_other_commands_take_the_folder(shop, made, tmp_path):
    folder, _, _ = made
    done = run("evaluate", folder, "--data-root", shop, "--json", "-")
    report = json.loads(done.stdout)
    images = torch.cat([x for x, _ in [_test_images(shop)]])
    assert report["flips"]["count"] == 0
    assert report["evaluation"]["mean_cost"] == pytest.approx(mean_cost(eefast.load(folder), images), abs=1e-6)
    run("plot", folder, *words(shop)[2:], "--output", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


def _test_images(shop):
    from eefast.data import datasets

    found = datasets.dataset("mnist", shop, "test")
    return found.images, found.labels


def test_a_quantised_network_is_not_trained(shop, made, tmp_path):
    folder, _, _ = made
    options = ["--net", "eenet8", "--num-exits", 2, "--held-out", 7, "--batch-size", 2, "--output", tmp_path / "x"]
    with pytest.raises(
        ValueError, match=r"weights=.*int8.* is a quantised network, which is not trained; give the float"
    ):
        run("train", "--data-root", shop, "--weights", folder, *options, "--device", "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held-out", 15], r"calibration_images are 15; give at least 16"),
        (["--range-images", 15], r"calibration_images are 15; give at least 16"),
        (["--percentile", 9], r"percentile=9.0 must be in 90 … 100"),
        (["--min-accuracy", 0.5, "--max-cost", 0.5], r"min_accuracy=0.5, max_cost=0.5: give one of them"),
        (["--keep-thresholds", "--max-cost", 0.5], r"keep_thresholds=True chooses nothing"),
        (["--criterion", "best"], r"criterion='best' is unknown"),
        (["--held-out", 99], r"held_out=99 must be in 1 … 70"),
    ],
)
def test_quantize_refuses_options(shop, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(*words(shop, "--output", tmp_path / "x", *options))
    assert not (tmp_path / "x").exists()


def test_too_few_images_for_the_budget_are_refused(shop):
    with pytest.raises(ValueError, match="31 held-out images are too few"):
        run(*[word for word in words(shop) if word != "--few-images"])


def test_constant_images_are_refused(shop, tmp_path):
    for stem, n in (("train", 70), ("t10k", 17)):
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(torch.full((n, 28, 28), 7).byte().numpy()))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.zeros(n).byte().numpy()))
    with pytest.raises(ValueError, match="calibration_images are constant"):
        run(
            "quantize",
            shop / "net",
            "--data-root",
            tmp_path,
            "--held-out",
            31,
            "--few-images",
            "--output",
            tmp_path / "x",
        )


def test_what_cannot_be_quantised_is_named_with_its_path(shop, tmp_path, monkeypatch):
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 28, 28), normalization=((0.1307,), (0.3081,))), 1)
    net.stages[1].add_module("gate", Stage(lambda m, x: x if x.sum() > 0 else -x))
    monkeypatch.setattr("eefast.checkpoint.loading.load", lambda path: net)
    with pytest.raises(ValueError, match=r"stages\.1 cannot be quantised: .* torch\.fx cannot trace it"):
        run(*words(shop, "--output", tmp_path / "x"))


@pytest.mark.parametrize(
    ("where", "message"),
    [("net", "holds a network that is not quantised"), ("quantize.json", "is a file; name a folder")],
)
def test_no_other_network_is_replaced(shop, made, where, message):
    before = (shop / "net" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(*words(shop, "--output", shop / where))
    assert (shop / "net" / "model.safetensors").read_bytes() == before


def test_a_quantised_network_is_not_quantised_again(shop, made):
    with pytest.raises(ValueError, match="net is quantised already"):
        run("quantize", made[0], *words(shop)[2:])


def test_the_default_folder_is_beside_the_network(shop, tmp_path: Path, monkeypatch):
    shutil.copytree(shop / "net", tmp_path / "net")
    monkeypatch.chdir(tmp_path / "net")
    run("quantize", ".", *words(shop)[2:], "--keep-thresholds")
    assert eefast.load(tmp_path / "net-int8").name == "eenet8"
