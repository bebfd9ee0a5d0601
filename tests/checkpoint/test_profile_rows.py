"""Profiles in a folder: written with the network, read and checked, absent from folders of networks without."""

import copy
import json

import pytest
import torch
from networks import images, lived_in

import eefast
from eefast import Profile, zoo

SHAPE = (1, 12, 12)


def made() -> eefast.EarlyExitNet:
    return lived_in(zoo.eenet("eenet8", input_shape=SHAPE, criterion="entropy"), 0).eval()


def test_saved_with_the_network(tmp_path):
    net = made()
    net.save(tmp_path / "without")
    assert "profiles" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert not eefast.load(tmp_path / "without").profiles
    net.profiles = {"full": [-float("inf")] * 2, "eco": Profile((0.1, 2.0), 1), "first": Profile((0.25, 0.5), 0)}
    net.save(tmp_path / "with")
    loaded = eefast.load(tmp_path / "with")
    assert dict(loaded.profiles) == dict(net.profiles)
    assert list(loaded.profiles) == list(net.profiles)
    x, ids = images(7, SHAPE), torch.arange(7) % 3
    assert torch.equal(loaded(x, profile=ids).exit_index, net(x, profile=ids).exit_index)
    assert "Infinity" not in (tmp_path / "with" / "config.json").read_text()
    assert dict(copy.deepcopy(net).profiles) == dict(net.profiles)


@pytest.mark.parametrize(
    "damage",
    [
        {"eco": {"thresholds": [0.5, 0.5]}},
        {"eco": {"thresholds": [0.5, "nan"], "last_exit": None}},
        {"eco": {"thresholds": [0.5, 0.5], "last_exit": True}},
        {"eco": {"thresholds": [0.5, 0.5], "last_exit": 3}},
        {"eco": {"thresholds": [0.5], "last_exit": None}},
        {"": {"thresholds": [0.5, 0.5], "last_exit": None}},
        [],
    ],
    ids=str,
)
def test_damaged_profiles_are_refused(tmp_path, damage):
    made().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "profiles": damage}))
    with pytest.raises(ValueError, match="profile"):
        eefast.load(tmp_path)
