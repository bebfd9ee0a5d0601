"""Weights that a backbone starts from: a file or a published name; only the last linear may be of other classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from eefast.train.initial_weights import initialise

NAME = "torchvision:resnet18"


def body(classes: int, seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width, width), nn.Linear(width, classes))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(body(5, 1).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def same(a: nn.Module, b: nn.Module) -> list[str]:
    return [name for name, value in a.state_dict().items() if torch.equal(value, b.state_dict()[name])]


def test_all_weights_are_taken_where_all_fit(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = body(5)
    initialise(made, NAME, weights, download=False, frozen=True)
    assert same(made, body(5, 1)) == list(made.state_dict())
    assert capsys.readouterr() == ("", "")


def test_for_other_classes_the_last_linear_stays_random(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = body(3)
    initialise(made, NAME, weights, download=False, frozen=False)
    assert same(made, body(3)) == ["3.weight", "3.bias"]
    assert set(made.state_dict()) == {*same(made, body(3)), *(n for n in body(5, 1).state_dict() if n[0] in "02")}
    assert torch.equal(made[2].weight, body(5, 1)[2].weight)
    assert "are for another number of classes: the last linear '3' starts from random weights, for 3" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("made", "frozen", "message"),
    [
        (body(3), True, "freeze_backbone=True keeps the last linear '3', but weights=.* than 3; leave it out, or give"),
        (body(3, width=7), False, "do not fit the network"),
        (nn.Sequential(body(3)[0], nn.Flatten(), nn.Linear(6, 6), nn.Linear(7, 3)), False, "do not fit the network"),
        (nn.Sequential(*body(5)[:3]), False, "do not fit the network"),
    ],
    ids=["frozen", "width", "features", "one layer less"],
)
def test_what_does_not_fit_is_refused(weights: Path, made: nn.Module, frozen: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initialise(made, NAME, weights, download=False, frozen=frozen)


def test_a_name_is_looked_for_where_there_is_no_file(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    weights.rename(cached)
    made = body(5)
    initialise(made, NAME, "IMAGENET1K_V1", download=False, frozen=True)
    assert torch.equal(made[0].weight, body(5, 1)[0].weight)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        initialise(made, NAME, tmp_path / "IMAGENET1K_V1", download=False, frozen=True)
