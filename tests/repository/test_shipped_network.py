"""The figures in the shipped network's README, measured again."""

import json
import re
from importlib import resources

import pytest
import torch

from eefast import criteria
from eefast.checkpoint.loading import load
from eefast.data.mnist import mnist_test

FOLDER = resources.files("eefast") / "assets" / "eenet-mnist"
ROW = r"^\| (learned|max_probability) \|.*\| ([\d.]+) % \| ([\d.]+) % \|$"
CLAIMS = {
    name: (float(accuracy) / 100, float(cost) / 100)
    for name, accuracy, cost in re.findall(ROW, (FOLDER / "README.md").read_text(), re.M)
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["learned", pytest.param("max_probability", marks=pytest.mark.slow)])
def test_the_figures_hold_on_the_shipped_test_images(name: str) -> None:
    net = load(FOLDER)
    images, labels = mnist_test()
    net.criterion = criteria.get(name)
    net.thresholds.copy_(torch.tensor(json.loads((FOLDER / "thresholds.json").read_text())[name]))
    results = [net(batch) for batch in images.split(500)]
    right = torch.cat([r.labels for r in results]) == labels
    measured = right.double().mean().item(), torch.cat([r.cost for r in results]).double().mean().item()
    assert measured == pytest.approx(CLAIMS[name], abs=1e-3)


def test_it_is_accurate_cheap_and_small() -> None:
    accuracy, cost = CLAIMS["learned"]
    assert accuracy >= 0.985
    assert cost <= 0.35
    assert json.loads((FOLDER / "thresholds.json").read_text())["learned"] == load(FOLDER).thresholds.tolist()
    assert (FOLDER / "model.safetensors").stat().st_size <= 2 << 20
