"""`eefast calibrate`: thresholds that keep their budget on the network itself, cached outputs, scaling, refusals."""

import json

import pytest
import torch
from command_line import held_out_of, run
from networks import one_by_one

import eefast


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
    ]
    cache = tmp_path / "held.safetensors"
    done = run(*words, "--criterion", "all", "--save", "--cache", cache, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["chosen"]) == set(eefast.criteria.CRITERIA)
    images, labels = held_out_of(shop, 31, 5)
    thresholds = json.loads((tmp_path / "net" / "thresholds.json").read_text())
    loaded = eefast.load(tmp_path / "net")
    assert loaded.thresholds.tolist() == report["chosen"]["learned"]["thresholds"]
    for name, chosen in report["chosen"].items():
        assert thresholds[name] == chosen["thresholds"]
        assert f"{chosen['accuracy']:.2%}" in done.stdout
        answer = one_by_one(net.with_criterion(name, thresholds[name]), net.prepare(images))
        assert chosen["cost"] == pytest.approx(float(answer.cost.mean()), abs=1e-6)
        assert chosen["cost"] <= 0.7
        assert chosen["accuracy"] == pytest.approx(float((answer.labels == labels).float().mean()))
        assert chosen["exits"] == answer.exit_index.bincount(minlength=3).tolist()
    # The cache replaces these images, and no others.
    again = run(*words, "--criterion", "all", "--cache", cache, "--data-root", tmp_path / "gone", "--json", "-")
    assert json.loads(again.stdout)["chosen"] == report["chosen"]
    with pytest.raises(ValueError, match="was collected with images=31 of mnist by seed 5, not 31 of mnist by seed 6"):
        run(*words, "--seed", 6, "--cache", cache)


def test_calibrate_takes_half_a_point_off_the_final_exit_by_default(shop):
    words = ["calibrate", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images", "--json", "-"]
    report = json.loads(run(*words).stdout)
    assert report["bound"] == {"max_accuracy_drop": 0.005}
    assert list(report["chosen"]) == ["learned"]
    assert report["chosen"]["learned"]["accuracy"] >= report["exits"][-1]["accuracy"] - 0.005
    assert report["scaling"] is None
    report = json.loads(run(*words, "--min-accuracy", 0, "--criterion", "margin").stdout)
    assert report["chosen"]["margin"]["cost"] == pytest.approx(float(eefast.load(shop / "net").cost[0]))


def test_calibrate_scales_what_it_saves(shop, tmp_path):
    eefast.load(shop / "net").save(tmp_path / "net")
    words = ["--data-root", shop, "--held-out", 31, "--few-images", "--max-cost", 0.7, "--criterion", "entropy"]
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-accuracy", 1], r"learned: min_accuracy=1\.0 cannot be kept; the nearest is accuracy"),
        (["--min-accuracy", 0.5, "--max-cost", 0.5], r"min_accuracy=0.5, max_cost=0.5: give one of them"),
        (["--max-cost", 1.5], r"max_cost=1.5 must be in 0 … 1"),
        (["--criterion", "best"], r"criterion='best' is unknown"),
        (["--held-out", 99], r"held_out=99 must be in 1 … 70"),
    ],
)
def test_calibrate_refuses_options(shop, options, message):
    words = ["calibrate", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images"]
    with pytest.raises(ValueError, match=message):
        run(*words, *options)
