"""Recipes: the row is what the network answers on held-out images alone; the page shows the newest of each."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import recipes
import torch
from idx_files import write_mnist
from int8_accuracy import Images, held_out_of
from networks import lived_in
from rows import RecipeRow

import eefast
from eefast.data import datasets, loaders

SHAPE = (1, 28, 28)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, eefast.EarlyExitNet, Images, RecipeRow]:
    root = tmp_path_factory.mktemp("recipe")
    write_mnist(root, "train", 61)  # no test images: reading them would fail
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, normalization=((0.1,), (0.3,))), 5)
    net.record = datasets.record("eenet8", 10, SHAPE, "mnist", datasets.dataset("mnist", root, "train"), 31, 3)
    report = {"arguments": {"net": "eenet8", "epochs": 3, "loss": "v0", "weights": None, "placement": "fine"}}
    (root / "report.json").write_text(json.dumps({**report, "seconds_per_epoch": [60.0, 30.0]}))
    found = held_out_of(net, root, root)
    return root, net, found, recipes.measured(root, net, found)


def test_images_are_those_that_were_held_out(measured, tmp_path: Path) -> None:
    _, _, found, row = measured
    write_mnist(tmp_path, "train", 61)
    _, held_out = loaders.split(datasets.dataset("mnist", tmp_path, "train"), 31, 3)
    assert torch.equal(found.pixels, torch.stack([held_out[i][0] for i in range(31)]))
    assert row.images == len(found.labels) == 31


def test_exits_alone_and_options_that_differ(measured) -> None:
    _, net, found, row = measured
    for i, accuracy in enumerate(row.exit_accuracy):
        alone = net.all_exits(net.prepare(found.pixels))[i].logits.argmax(1)
        assert accuracy == pytest.approx(float((alone == found.labels).double().mean()))
    assert row.options == {"epochs": 3, "loss": "v0"}
    assert (row.seconds, row.trained_on, row.exit_costs) == (90.0, "mnist", tuple(net.cost.tolist()))


def test_at_high_and_low_costs_all_images_that_judge_exit_at_one_exit(measured, monkeypatch) -> None:
    root, net, found, _ = measured
    monkeypatch.setattr(recipes, "COSTS", (0.0, 1.0))
    row = recipes.measured(root, net, found)
    for i, exit_index in enumerate((0, 2)):
        answers = net.all_exits(net.prepare(found.pixels))[exit_index].logits.argmax(1)
        shares = []
        for split in range(10):
            judge = torch.randperm(31, generator=torch.Generator().manual_seed(split))[16:]
            shares.append(float((answers[judge] == found.labels[judge]).double().mean()))
        assert row.accuracy[i] == pytest.approx(sum(shares) / 10)


def test_page_shows_the_newest_row_of_each_recipe(measured, tmp_path: Path) -> None:
    row = measured[3]
    first, second = (asdict(replace(row, recipe=name, accuracy=(0.5,) * 7)) for name in ("gentle", "twin"))
    older = {**first, "accuracy": (0.25,) * 7}
    text = recipes.page([older, first, second, {"op": "other"}])
    assert "## eenet8 on mnist" in text
    assert text.count("| gentle | 50.00 |") == text.count("| twin | 50.00 |") == 1
    assert "25.00" not in text
    other = {**first, "model": "eenet14"}
    assert all(f"## {name} on mnist" in recipes.page([first, other]) for name in ("eenet8", "eenet14"))
    assert "- **gentle**: epochs 3, loss v0; exits at costs" in text
    assert recipes.write([], tmp_path) == []
    assert recipes.write([first], tmp_path)[0].read_text() == recipes.page([first])
