"""Networks through a Hub on loopback: what is pushed comes back bit for bit, and nothing but it is fetched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import hub
from networks import lived_in

import eefast
from eefast.checkpoint.loading import CheckpointError
from eefast.hub import repository

SHAPE = (3, 12, 12)


def made(seed):
    torch.manual_seed(seed)
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, normalization=((0.5,) * 3, (0.3,) * 3)), seed)
    net.thresholds.copy_(torch.tensor([0.7, 0.6]))
    return net


@pytest.fixture
def server(monkeypatch):
    """Its constants are changed, since huggingface_hub reads HF_ENDPOINT when it is imported, which timm does, too."""
    pytest.importorskip("huggingface_hub", reason="needs eefast[hub]")
    from huggingface_hub import constants

    with hub() as (address, store):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield store


def test_what_is_pushed_comes_back(server, tmp_path):
    net = made(1)
    address = net.push_to_hub("me/small", token="hf_none")
    assert address.split("/")[-2] == "commit"
    (server.repositories["me/small"]["main"][-1][1])["train.py"] = b"raise SystemExit"
    found = eefast.EarlyExitNet.from_pretrained("me/small", cache_dir=tmp_path / "cache")
    x = torch.randn(9, *SHAPE)
    assert torch.equal(found(x).logits, net(x).logits)
    assert found.thresholds.tolist() == net.thresholds.tolist()
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink()}
    assert fetched == {"config.json", "model.safetensors"}


def test_revisions_are_told_apart(server, tmp_path):
    made(1).push_to_hub("me/small", token="hf_none")
    made(2).push_to_hub("me/small", token="hf_none", revision="second")
    first, second = (
        eefast.EarlyExitNet.from_pretrained("me/small", revision=revision, cache_dir=tmp_path)
        for revision in (None, "second")
    )
    x = torch.randn(3, *SHAPE)
    assert torch.equal(first(x).logits, made(1)(x).logits)
    assert torch.equal(second(x).logits, made(2)(x).logits)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("me/none", None, "the Hub has no such repository that you may read"),
        ("me/small", "none", "the Hub has no such repository at revision 'none'"),
        ("no-owner", None, "'no-owner' is no folder and no name of a repository; give a folder or owner/name"),
        ("../me", None, "is no folder and no name of a repository"),
    ],
)
def test_what_is_not_there_is_named(server, tmp_path, name, revision, words):
    made(1).push_to_hub("me/small", token="hf_none")
    with pytest.raises(ValueError, match=words):
        eefast.EarlyExitNet.from_pretrained(name, revision=revision, cache_dir=tmp_path)


def test_a_folder_is_read_without_the_hub(tmp_path, monkeypatch):
    net = made(1)
    net.save(tmp_path / "net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = eefast.EarlyExitNet.from_pretrained(tmp_path / "net")
    assert torch.equal(found.stages[0].state_dict()[next(iter(found.stages[0].state_dict()))],
                       net.stages[0].state_dict()[next(iter(net.stages[0].state_dict()))])  # fmt: skip
    with pytest.raises(ValueError, match="revision='main' is for repositories"):
        eefast.EarlyExitNet.from_pretrained(tmp_path / "net", revision="main")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "eefast\[hub\]"'):
        eefast.EarlyExitNet.from_pretrained("me/small")


def test_a_network_that_cannot_be_saved_is_not_pushed(server):
    net = made(1)
    net.config = None
    with pytest.raises(ValueError, match="could not build it again"):
        net.push_to_hub("me/small", token="hf_none")
    assert not server.asked


def test_load_says_how_the_hub_is_read():
    with pytest.raises(CheckpointError, match=r'eefast\.EarlyExitNet\.from_pretrained\("me/small"\)'):
        eefast.load("me/small")
    with pytest.raises(CheckpointError, match="No such file"):
        eefast.load("../no-network-has-this-name")


@pytest.mark.slow
def test_with_the_variable_of_huggingface_hub(tmp_path):
    """As a user sets it, in a process of its own."""
    pytest.importorskip("huggingface_hub", reason="needs eefast[hub]")
    made(1).save(tmp_path / "net")
    code = (
        "import eefast, sys; eefast.load(sys.argv[1]).push_to_hub('me/small', token='hf_none');"
        "print(eefast.EarlyExitNet.from_pretrained('me/small', cache_dir=sys.argv[2]).thresholds.tolist())"
    )
    with hub() as (address, store):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "net", tmp_path / "cache"],
            env={"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin",
                 "PYTHONPATH": str(Path(eefast.__file__).parents[1])},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == pytest.approx([0.7, 0.6])
        assert set(store.repositories["me/small"]["main"][-1][1]) == {
            "config.json",
            "model.safetensors",
            "README.md",
            ".gitattributes",
        }


def test_only_data_is_fetched():
    assert all(name.endswith((".json", ".safetensors")) for name in repository.FILES)
