"""`eefast calibrate`: thresholds that keep their budget on the network itself, cached outputs, scaling, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from command_line import held_out_of, run
from idx_files import idx_bytes
from networks import lived_in, one_by_one

import eefast
from eefast import zoo
from eefast.measure import time_costs
from eefast.measure.time_costs import TimeCosts
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.candidates import make_candidate
from eefast.thresholds.comparing import compare
from eefast.thresholds.dropping import find_thresholds_and_exits
from eefast.thresholds.outputs import collect


def test_calibrate_saves_what_it_says(shop, tmp_path):
    net = eefast.load(shop / "net")
    net.save(tmp_path / "net")
    words = [
        "calibrate",
        tmp_path / "net",
        "--data-root",
        shop,
        "--held-out",
        31,
        "--few-images",
        "--seed",
        5,
        "--max-cost",
        0.7,
        "--no-assurance",
    ]
    cache = tmp_path / "held.safetensors"
    done = run(*words, "--criterion", "all", "--save", "--cache", cache, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["chosen"]) == {*eefast.criteria.CRITERIA, *eefast.criteria.CARRYING}
    assert set(report["compared"]) == set(report["chosen"])
    assert report["compared_at"] == report["chosen"]["max_probability"]["cost"]
    images, labels = held_out_of(shop, 31, 5)
    thresholds = json.loads((tmp_path / "net" / "thresholds.json").read_text())
    loaded = eefast.load(tmp_path / "net")
    assert loaded.thresholds.tolist() == report["chosen"]["learned"]["thresholds"]
    # Those of others hold for numbers that are not saved.
    assert set(thresholds) == set(eefast.criteria.CRITERIA)
    for name, chosen in report["chosen"].items():
        assert chosen["cost"] <= 0.7
        if name not in thresholds:
            continue
        assert thresholds[name] == chosen["thresholds"]
        assert f"{chosen['accuracy']:.2%}" in done.stdout
        answer = one_by_one(net.with_criterion(name, thresholds[name]), net.prepare(images))
        assert chosen["cost"] == pytest.approx(float(answer.cost.mean()), abs=1e-6)
        assert chosen["accuracy"] == pytest.approx(float((answer.labels == labels).float().mean()))
        assert chosen["exits"] == answer.exit_index.bincount(minlength=3).tolist()
    # The cache replaces these images, and no others.
    again = run(*words, "--criterion", "all", "--cache", cache, "--data-root", tmp_path / "gone", "--json", "-")
    assert json.loads(again.stdout)["chosen"] == report["chosen"]
    with pytest.raises(ValueError, match="was collected with images=31 of mnist by seed 5, not 31 of mnist by seed 6"):
        run(*words, "--seed", 6, "--cache", cache)


@pytest.mark.parametrize("name", ["carried", "fitted", "vote"])
def test_calibrate_saves_the_numbers_that_it_fits(shop, tmp_path, name):
    net = eefast.load(shop / "net")
    net.save(tmp_path / "net")
    words = ["calibrate", tmp_path / "net", "--data-root", shop, "--held-out", 31, "--few-images", "--seed", 5]
    words += ["--max-cost", 0.7, "--no-assurance", "--criterion", name, "--profile", "eco:cost=0.5"]
    done = run(*words, "--save", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    images, labels = held_out_of(shop, 31, 5)
    outputs, _ = collect(net, [(images, labels)])
    candidate = make_candidate(name, outputs, labels)
    seen = candidate.outputs(outputs)
    expected = calibrate(seen, labels, net.cost, name, max_cost=0.7)
    assert report["chosen"][name]["thresholds"] == list(expected.thresholds)
    compared = compare(outputs, labels, net.cost, [name], expected.cost)
    assert report["compared"] == {name: vars(compared[name])}
    assert f"{100 * compared[name].gain:+.2f} ± {100 * compared[name].spread:.2f}" in done.stdout
    saved = eefast.load(tmp_path / "net")
    assert saved.exit_rule == candidate.criterion
    assert json.loads((tmp_path / "net" / "thresholds.json").read_text()) == {name: list(expected.thresholds)}
    assert list(saved.profiles) == ["eco"]
    answer = saved(images)
    assert expected.cost == pytest.approx(float(answer.cost.mean()), abs=1e-6)
    assert expected.accuracy == pytest.approx(float((answer.labels == labels).float().mean()))
    # Its own numbers stay where no criterion is named.
    again = json.loads(run(*words[:-4], "--json", "-").stdout)
    assert again["chosen"][name]["thresholds"] == pytest.approx(list(expected.thresholds), abs=1e-4)
    assert again["compared"] == {}


def test_thresholds_by_what_exits_cost_in_time(shop, tmp_path, monkeypatch):
    """Measured once; the network that is saved, and `cost` when it is loaded, count MACs as before."""
    times = TimeCosts("PyTorch", 7, (0.5, 0.625, 1.0))
    monkeypatch.setattr(time_costs, "measured", lambda net, images: replace(times, batch_size=len(images)))
    net = eefast.load(shop / "net")
    net.save(tmp_path / "net")
    words = ["calibrate", tmp_path / "net", "--data-root", shop, "--held-out", 31, "--few-images", "--seed", 5]
    words += ["--max-cost", 0.75, "--no-assurance", "--cost", "time", "--batch-size", 9]
    done = run(*words, "--save", "--json", tmp_path / "report.json")
    assert "costs are times to the exits ÷ the plain network's, PyTorch, batch 9: 0.500, 0.625, 1.000" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    images, labels = held_out_of(shop, 31, 5)
    outputs, labels = collect(net, [(images, labels)])
    wanted = calibrate(outputs, labels, torch.tensor(times.cost), max_cost=0.75)
    assert report["chosen"]["learned"]["thresholds"] == list(wanted.thresholds)
    assert report["chosen"]["learned"]["cost"] == pytest.approx(wanted.cost)
    assert report["time_costs"]["batch_size"] == 9
    loaded = eefast.load(tmp_path / "net")
    assert torch.equal(loaded.cost, net.cost)
    assert loaded.thresholds.tolist() == pytest.approx(list(wanted.thresholds))


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--cost", "joules"], "cost='joules' is unknown"), (["--cost", "time", "--drop-exits"], "counts MACs")],
)
def test_costs_that_cannot_be_counted(shop, more, message):
    with pytest.raises(ValueError, match=message):
        run("calibrate", shop / "net", "--data-root", shop, "--max-cost", 0.7, *more)


def test_calibrate_takes_half_a_point_off_the_final_exit(shop):
    words = ["calibrate", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images", "--json", "-"]
    report = json.loads(run(*words, "--no-assurance").stdout)
    assert report["bound"] == {"max_accuracy_drop": 0.005}
    assert report["assurance"] is None
    assert list(report["chosen"]) == ["learned"]
    assert report["chosen"]["learned"]["accuracy"] >= report["exits"][-1]["accuracy"] - 0.005
    assert report["scaling"] is None
    report = json.loads(run(*words, "--no-assurance", "--min-accuracy", 0, "--criterion", "margin").stdout)
    assert report["chosen"]["margin"]["cost"] == pytest.approx(float(eefast.load(shop / "net").cost[0]))


@pytest.fixture(scope="module")
def larger_shop(shop, tmp_path_factory):
    """MNIST's training files with 300 images of noise."""
    folder, random = tmp_path_factory.mktemp("larger"), torch.Generator().manual_seed(3)
    images = torch.randint(256, (300, 28, 28), generator=random, dtype=torch.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images.numpy()))
    labels = torch.randint(9, (300,), generator=random, dtype=torch.uint8)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels.numpy()))
    return folder


@pytest.mark.parametrize("agreement", [False, True], ids=["accuracy", "agreement"])
def test_calibrate_holds_on_new_images_by_default(shop, larger_shop, agreement):
    words = ["calibrate", shop / "net", "--data-root", larger_shop, "--held-out", 250, "--other-data"]
    words += ["--max-accuracy-drop", 0.35, "--max-cost", 0.98, *(["--agreement"] if agreement else [])]
    done = run(*words, "--json", shop / "report.json")
    assert "with probability 0.9, as 175 of these images judged" in done.stdout
    report = json.loads((shop / "report.json").read_text())
    assert (report["assurance"], report["agreement"]) == (0.9, agreement)
    assert report["bound"] == {"max_accuracy_drop": 0.35, "max_cost": 0.98}
    net = eefast.load(shop / "net")
    outputs, labels = collect(net, [held_out_of(larger_shop, 250, 1)])
    expected = calibrate(
        outputs, None if agreement else labels, net.cost, max_accuracy_drop=0.35, max_cost=0.98, assurance=0.9
    )
    assert report["chosen"]["learned"]["thresholds"] == list(expected.thresholds)
    assert report["chosen"]["learned"]["judged_by"] == 175


@pytest.mark.parametrize("saved_with", ["learned", "patience"])
def test_calibrate_leaves_exits_out(shop, tmp_path, saved_with):
    """Also of a network that is saved with a rule which reads the exits before, where another one is asked for."""
    net = lived_in(zoo.eenet("eenet20", 4, head="conv3", input_shape=(1, 28, 28), normalization=((0.1,), (0.3,))), 1)
    net.eval().with_criterion(saved_with).save(tmp_path / "net")
    words = ["calibrate", tmp_path / "net", "--data-root", shop, "--held-out", 31, "--few-images", "--seed", 5]
    words += ["--dataset", "mnist", "--min-accuracy", 0.15, "--no-assurance", "--drop-exits"]
    if saved_with != "learned":
        with pytest.raises(ValueError, match="criterion='patience' reads the exits before"):
            run(*words)
        words += ["--criterion", "learned"]
    done = run(*words, "--save", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    outputs, labels = collect(net, [held_out_of(shop, 31, 5)])
    left_out, found = find_thresholds_and_exits(outputs, labels, net.stage_costs, min_accuracy=0.15)
    assert report["left_out"] == list(left_out) != []
    assert f"exits left out: {', '.join(map(str, left_out))}" in done.stdout
    saved = eefast.load(tmp_path / "net")
    assert (saved.num_exits, saved.criterion.name) == (4 - len(left_out), "learned")
    assert saved.thresholds.tolist() == list(found.thresholds) == report["chosen"]["learned"]["thresholds"]
    images, _ = held_out_of(shop, 31, 5)
    answer = one_by_one(saved, saved.prepare(images))
    assert found.cost == pytest.approx(float(saved.path_cost[answer.exit_index].mean()), abs=1e-6)
    with pytest.raises(ValueError, match="--drop-exits takes one criterion, no --scale"):
        run(*words, "--criterion", "all")


def test_calibrate_saves_profiles(shop, tmp_path):
    net = eefast.load(shop / "net")
    net.profiles = {"old": net.thresholds, "eco": net.thresholds}
    net.save(tmp_path / "net")
    words = ["calibrate", tmp_path / "net", "--data-root", shop, "--held-out", 31, "--few-images", "--seed", 5]
    words += ["--max-cost", 0.7, "--no-assurance", "--profile", "eco:cost=0.5", "--profile", "sure:drop=0"]
    done = run(*words, "--save", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    outputs, labels = collect(net, [held_out_of(shop, 31, 5)])
    expected = {
        "eco": calibrate(outputs, labels, net.cost, max_cost=0.5),
        "sure": calibrate(outputs, labels, net.cost, max_accuracy_drop=0.0),
    }
    saved = eefast.load(tmp_path / "net").profiles
    assert list(saved) == ["old", "eco", "sure"]
    for name, found in expected.items():
        assert report["profiles"][name]["thresholds"] == list(found.thresholds) == list(saved[name].thresholds)
        assert f"{name:4}" in done.stdout
    with pytest.raises(ValueError, match=r"profile none: learned: max_cost=0\.0 cannot be kept"):
        run(*words[:-4], "--profile", "none:cost=0")


def test_calibrate_scales_what_it_saves(shop, tmp_path):
    eefast.load(shop / "net").save(tmp_path / "net")
    words = ["--data-root", shop, "--held-out", 31, "--few-images", "--max-cost", 0.7, "--criterion", "entropy"]
    words += ["--no-assurance"]
    done = run("calibrate", tmp_path / "net", *words, "--scale", "--save", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    before, after = eefast.load(shop / "net"), eefast.load(tmp_path / "net")
    assert after.criterion.name == "entropy"
    assert "temperature" in done.stdout
    for one, two, t in zip(before.heads, after.heads, report["scaling"]["temperature"], strict=True):
        torch.testing.assert_close(one.classifier.weight / t, two.classifier.weight)
    images, labels = held_out_of(shop, 31, 1)
    answer = one_by_one(after, after.prepare(images))
    assert report["chosen"]["entropy"]["cost"] == pytest.approx(float(answer.cost.mean()), abs=1e-6)
    assert report["chosen"]["entropy"]["accuracy"] == pytest.approx(float((answer.labels == labels).float().mean()))
    assert report["exits"] != report["exits_before_scaling"]


@pytest.mark.parametrize("changes", [["--criterion", "margin"], ["--scale"], []], ids=["rule", "scaled", "neither"])
def test_profiles_that_no_longer_hold_are_named(shop, tmp_path, changes):
    net = eefast.load(shop / "net")
    net.profiles = {"eco": [0.3, 0.4], "normal": [0.6, 0.7]}
    net.save(tmp_path / "net")
    words = ["--data-root", shop, "--held-out", 31, "--few-images", "--no-assurance", "--max-cost", 0.7, "--save"]
    done = run("calibrate", tmp_path / "net", *words, *changes)
    left = list(eefast.load(tmp_path / "net").profiles)
    assert left == ([] if changes else ["eco", "normal"])
    assert ("left out: eco, normal; make them again by --profile" in done.stderr) == bool(changes)


@pytest.mark.parametrize(("words", "count"), [(["--no-assurance"], 31), ([], 9)])
def test_images_that_judge_fit_no_scaling(shop, monkeypatch, words, count):
    seen = []
    monkeypatch.setattr("eefast.thresholds.scaling.fit_scaling", lambda out, labels: seen.append(len(labels)) or 1 / 0)
    words = ["--data-root", shop, "--held-out", 31, "--few-images", "--max-cost", 0.7, "--scale", *words]
    with pytest.raises(ZeroDivisionError):
        run("calibrate", shop / "net", *words)
    assert seen == [count]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--min-accuracy", 1, "--no-assurance"],
            r"learned: min_accuracy=1\.0 cannot be kept; the nearest is accuracy",
        ),
        (["--max-cost", 0.5], "learned: 31 samples are too few for assurance=0.9; give at least 100"),
        (["--max-cost", 0.5, "--assurance", 1], "assurance=1.0 must be above 0 and below 1"),
        (
            ["--max-cost", 0.5, "--assurance", 0.95, "--no-assurance"],
            "--assurance 0.95 and --no-assurance exclude each other",
        ),
        (["--min-accuracy", 0.5, "--max-accuracy-drop", 0.5], "=0.5: give one of them for the accuracy"),
        (["--max-cost", 1.5], r"max_cost=1.5 must be in 0 … 1"),
        (["--criterion", "vote", "--drop-exits"], "--drop-exits: criterion='vote' reads the exits before"),
        (["--criterion", "best"], r"criterion='best' is unknown"),
        (["--held-out", 99], r"held_out=99 must be in 1 … 70"),
    ],
)
def test_calibrate_refuses_options(shop, options, message):
    words = ["calibrate", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images"]
    with pytest.raises(ValueError, match=message):
        run(*words, *options)
