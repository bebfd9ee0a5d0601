"""The words of `eefast serve` → options of the server; wrong ones are refused before the network is planned."""

import socket

import pytest
from command_line import run
from networks import lived_in

import eefast
from eefast.serving import lifetime


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12), normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    net.profiles = {"normal": [0.5, 0.5], "eco": [0.0, 0.0]}
    net.save(tmp_path_factory.mktemp("serve"))
    return tmp_path_factory.getbasetemp() / "serve0"


def test_options_reach_the_server(folder, monkeypatch):
    given = []
    monkeypatch.setattr(lifetime, "run", lambda net, options, say: given.append((net.name, options)))
    run("serve", folder)
    run(
        "serve", folder, "--host", "0.0.0.0", "--port", 0, "--engine", "compact", "--stages", "compile",
        "--workers", 3, "--max-queue", 7,
        "--levels", "normal,eco", "--deadline-ms", 30, "--max-body", 0.5, "--drain", 4, "--lame-duck", 1,
        "--crop-fraction", 0.5,
    )  # fmt: skip
    assert given[0] == ("eenet8", lifetime.Options())
    assert given[1][1] == lifetime.Options(
        "0.0.0.0", 0, "compact", "compile", 0.5, 7, 3, ("normal", "eco"), 30.0, 2**19, 4.0, 1.0
    )  # fmt: skip


def test_what_is_wrong_is_said_before_any_work(folder):
    with pytest.raises(ValueError, match="no profile cheap, it has normal, eco"):
        run("serve", folder, "--levels", "normal,cheap")
    with pytest.raises(ValueError, match="stages='compile' is for engine='compact'"):
        run("serve", folder, "--engine", "resident", "--stages", "compile")
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="take another --port"):
        run("serve", folder, "--port", other.getsockname()[1])
