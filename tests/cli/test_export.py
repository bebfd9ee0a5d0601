"""`eefast export`: the files are there, what is printed says which, and what cannot be exported ends it early."""

import json

import pytest
from command_line import run
from networks import lived_in

import eefast


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)), 1).save(folder)
    return folder


def test_files_and_figures(network, tmp_path):
    done = run("export", network, tmp_path / "out", "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["kind"] == "stages"
    assert figures["output"] == str(tmp_path / "out")
    for file in figures["files"]:
        assert (tmp_path / "out" / file["name"]).exists()
        assert file["name"] in done.stdout
    assert "next: run it with PyTorch alone, as examples/run_stages.py does" in done.stderr


def test_a_wrong_format_ends_it(network, tmp_path):
    with pytest.raises(ValueError, match="format='else' is unknown"):
        run("export", network, tmp_path / "out", "--format", "else")
    assert not list(tmp_path.iterdir())
