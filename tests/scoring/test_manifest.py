"""What belongs to one run: anything that changes rows changes the hash, and the error says what."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eefast
from eefast import Preprocessing
from eefast.scoring.arrays import Arrays
from eefast.scoring.manifest import describe_network, write_manifest

HOW = Preprocessing(20)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.zeros((10, 3, 17, 17), np.uint8))
    (tmp_path / "out").mkdir()
    return tmp_path


def write(place: Path, net: eefast.EarlyExitNet, how=HOW, size=4, options=None, overwrite=False):
    source = Arrays([place / "x.npy"], (3, 17, 17))
    return write_manifest(place / "out", describe_network(net, how), source, options or {}, size, overwrite)


def test_the_same_again_is_the_same(place: Path, network: Path) -> None:
    first = write(place, eefast.load(network))
    assert [shard.count for shard in first.shards] == [4, 4, 2]
    assert write(place, eefast.load(network)) == first
    told = json.loads((place / "out" / "manifest.json").read_text())
    assert told["digest"] == first.digest
    assert told["network"]["classes"] == ["ant", "bee", "cat", "dog", "Ente"]
    assert told["input"]["images"] == 10
    assert sorted(path.name for path in (place / "out").iterdir()) == ["inputs.jsonl", "manifest.json"]


def change_weight(net):
    with torch.no_grad():
        next(net.parameters())[0, 0, 0, 0] += 1e-3


CHANGES = {
    r"another network \(weights\)": (change_weight, {}),
    r"another network \(thresholds\)": (lambda net: net.thresholds.mul_(1.0001), {}),
    r"another network \(preprocessing\)": (lambda net: None, {"how": Preprocessing(21)}),
    r"other options \(shard_size\)": (lambda net: None, {"size": 5}),
    r"other options \(logits\)": (lambda net: None, {"options": {"logits": True}}),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_changes_rows_is_named(place: Path, network: Path, message: str) -> None:
    first = write(place, eefast.load(network))
    before = (place / "out" / "manifest.json").read_bytes()
    net = eefast.load(network)
    change, more = CHANGES[message]
    change(net)
    with pytest.raises(ValueError, match=rf"out holds the rows of {message}; take another folder, .* --overwrite"):
        write(place, net, **more)
    assert (place / "out" / "manifest.json").read_bytes() == before
    (place / "out" / "part-00000.parquet").touch()
    assert write(place, net, **more, overwrite=True).digest != first.digest
    assert not (place / "out" / "part-00000.parquet").exists()


def test_another_rule(place: Path, network: Path) -> None:
    net = eefast.load(network).with_criterion("vote")
    write(place, net)
    net.rule[1, 1] = 2.0
    with pytest.raises(ValueError, match=r"another network \(rule"):
        write(place, net)


def test_another_input(place: Path, network: Path) -> None:
    net = eefast.load(network)
    write(place, net)
    np.save(place / "x.npy", np.ones((10, 3, 17, 17), np.uint8))
    with pytest.raises(ValueError, match=r"another input \(listing\)"):
        write(place, net)
    np.save(place / "x.npy", np.ones((0, 3, 17, 17), np.uint8))
    with pytest.raises(ValueError, match="the input has no images"):
        write(place, net)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"network": 3}'])
def test_rows_without_a_manifest(place: Path, network: Path, content: bytes | None) -> None:
    (place / "out" / "part-00000.parquet").touch()
    if content is not None:
        (place / "out" / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"whose manifest\.json is missing or damaged"):
        write(place, eefast.load(network))
