"""The figures in the shipped network's README, measured again."""

import json
import re
from importlib import resources

import pytest
import torch

from eefast import criteria
from eefast.checkpoint.loading import load
from eefast.data.mnist import mnist_test


@torch.no_grad()
def test_shipped_network() -> None:
    """The figures in the shipped network's README hold on the shipped test images."""
    folder = resources.files("eefast") / "assets" / "eenet-mnist"
    net = load(folder)
    images, labels = mnist_test()
    row = r"^\| (learned|max_probability) \|.*\| ([\d.]+) % \| ([\d.]+) % \|$"
    rows = re.findall(row, (folder / "README.md").read_text(), re.M)
    claims = {name: (float(accuracy) / 100, float(cost) / 100) for name, accuracy, cost in rows}
    assert list(claims) == ["learned", "max_probability"]

    thresholds = json.loads((folder / "thresholds.json").read_text())
    assert thresholds["learned"] == net.thresholds.tolist()
    measured = {}
    for name in claims:
        net.criterion = criteria.get(name)
        net.thresholds.copy_(torch.tensor(thresholds[name]))
        results = [net(batch) for batch in images.split(500)]
        right = torch.cat([r.labels for r in results]) == labels
        measured[name] = (right.double().mean().item(), torch.cat([r.cost for r in results]).double().mean().item())
        assert measured[name] == pytest.approx(claims[name], abs=1e-3)
    accuracy, cost = measured["learned"]
    assert accuracy >= 0.985
    assert cost <= 0.35
    assert (folder / "model.safetensors").stat().st_size <= 2 << 20
