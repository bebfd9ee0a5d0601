"""Words of `eefast search` → its options, and what it prints and draws of a report."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import run

from eefast import zoo
from eefast.criteria import CRITERIA
from eefast.record import TrainingRecord
from eefast.search.options import SearchOptions
from eefast.search.run import Exits, SearchReport
from eefast.thresholds.calibration import Calibration

POINTS = tuple(
    Exits(("layer1", "layer3"), ("pool", "conv1"), Calibration("margin", (0.5, 0.25), 0.8 + i / 100, 0.1 + i / 50))
    for i in range(15)
)
REPORT = SearchReport(
    {"held_out": 70, "seed": 3}, ({"place": "layer1", "kind": "pool", "cost": 0.1, "accuracy": 0.7},), 0.95, POINTS[3],
    [40, 20, 10], 0.16, None, 12_345, POINTS, {"fine": POINTS[2]}, 26, True, False,
    {"accuracy": 0.82, "mean_cost": 0.17, "final_accuracy": 0.94},
    {"fine": {"accuracy": 0.81, "mean_cost": 0.15}}, [1.0],
)  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """The options that the search got; it is not run."""
    found: list[SearchOptions] = []
    monkeypatch.setattr("eefast.search.run.search", lambda options, progress: (found.append(options), REPORT)[1])
    return found


def test_what_is_printed_drawn_and_written(seen, tmp_path):
    words = ["search", "eenet20", "--train-backbone", "--max-cost", 0.2]
    done = run(*words, "--figure", tmp_path / "front.png", "--json", tmp_path / "found.json")
    lines = done.stdout.splitlines()
    assert "layer3      conv1       0.25      20" in lines
    assert "margin: accuracy 83.00%, mean cost 0.1600, 12,345 parameters" in lines
    assert "test: accuracy 82.00%, final exit 94.00%, mean cost 0.1700" in lines
    assert "fine          0.1400    82.00%         81.00%          0.1500  layer1 layer3" in lines
    assert "no exits of pareto, linear, gold_ratio keep the limit" in lines
    assert any(line.startswith("26 subsets of exits compared under each rule: all, at shared levels") for line in lines)
    assert sum("layer1:pool layer3:conv1" in line for line in lines) == 12, "the front is thinned, its ends stay"
    assert any(line.startswith("0.1000") for line in lines)
    assert "eefast train --weights runs/searched --held-out 70 --seed 3 …" in done.stderr
    assert any(line.startswith("0.3800") for line in lines)
    assert (tmp_path / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(asdict(REPORT)))
    assert json.loads(run(*words, "--json", "-").stdout) == json.loads(json.dumps(asdict(REPORT)))


def test_options(seen):
    run("search", "timm:resnet10t", "--max-time", 0.5, "--max-parameters", 99, "--criterion", "margin, entropy",
        "--kinds", "pool,depthwise", "--places", "layer1, layer2", "--weights", "w.pt", "--dataset", "cifar10",
        "--held-out", 60, "-b", 17, "--lr", 0.1, "--resume", "--output", "there")  # fmt: skip
    assert seen == [
        SearchOptions(
            network="timm:resnet10t", max_time=0.5, max_parameters=99, criteria=("margin", "entropy"),
            kinds=("pool", "depthwise"), exits=("layer1", "layer2"), weights=Path("w.pt"), dataset="cifar10",
            held_out=60, batch_size=17, learning_rate=0.1, resume=True, output=Path("there"), data_root=Path("data"),
        )
    ]  # fmt: skip


def test_held_out_images_are_those_of_the_networks_training(seen, tmp_path):
    net = zoo.eenet("eenet20", 1, input_shape=(1, 28, 28))
    net.record = TrainingRecord("eenet20", 10, (1, 28, 28), "fashion-mnist", None, None, 160, "0" * 16, 70, 3)
    net.save(tmp_path / "net")
    run("search", tmp_path / "net", "--max-cost", 0.5)
    assert (seen[0].dataset, seen[0].held_out, seen[0].seed) == ("fashion-mnist", 70, 3)
    assert seen[0].criteria == tuple(CRITERIA)
    for words in (["--seed", 4], ["--held-out", 60]):
        with pytest.raises(ValueError, match=rf"{words[0]} {words[1]}: the network was trained with .*--other-data"):
            run("search", tmp_path / "net", "--max-cost", 0.5, *words)
    run("search", tmp_path / "net", "--max-cost", 0.5, "--seed", 4, "--other-data")
    assert (seen[1].held_out, seen[1].seed, seen[1].other_data) == (None, 4, True)


def test_photographs_have_the_size_that_the_network_takes(seen, tmp_path):
    net = zoo.eenet("eenet20", 1, num_classes=2, input_shape=(3, 16, 16))
    net.record = TrainingRecord("eenet20", 2, (3, 16, 16), "folder", ("cat", "dog"), 16, 160, "0" * 16, 70, 3)
    net.classes = net.record.classes
    net.save(tmp_path / "net")
    run("search", tmp_path / "net", "--max-cost", 0.5)
    run("search", tmp_path / "net", "--max-cost", 0.5, "--image-size", 20)
    assert [(options.dataset, options.image_size) for options in seen] == [("folder", 16), ("folder", 20)]


def test_without_a_limit_nothing_starts(seen):
    with pytest.raises(ValueError, match="no limit is given; give max_cost"):
        run("search", "eenet20")
    assert seen == []
