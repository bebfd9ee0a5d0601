"""`export` refuses before it works, replaces a folder only when all new files are right, does not change the net."""

import json
import shutil

import pytest
import torch

import eefast
from eefast.exporting import formats, stage_programs
from eefast.exporting.exported import load_exported
from eefast.exporting.manifest import MANIFEST
from eefast.system.files import WriteError


@pytest.mark.parametrize(
    ("change", "chosen", "words"),
    [
        (lambda net: net, "torchscript", "format='torchscript' is unknown; choose one of stages, aoti, onnx"),
        (
            lambda net: net.with_criterion(eefast.rules.PythonRule("mine", lambda i, y, z, *_: (y, z))),
            "stages",
            "criterion='mine' is a rule in Python, which no file holds",
        ),
        (lambda net: eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)).half(), "onnx", "give net.float()"),
        (lambda net: eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)).to("meta"), "stages", "give net.cpu()"),
    ],
    ids=["format", "rule", "dtype", "device"],
)
def test_what_cannot_be_exported_is_named(net, tmp_path, change, chosen, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        eefast.export(change(net), tmp_path / "out", format=chosen)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chosen", ["stages", "onnx"])
def test_integers_are_refused_where_no_file_has_them(net, tmp_path, chosen):
    made = eefast.quantize(net, torch.randn(16, 3, 12, 12))
    with pytest.raises(ValueError, match="use format='aoti', or export the float32 network"):
        eefast.export(made, tmp_path / "out", format=chosen)


def test_a_missing_package_is_named(net, tmp_path, monkeypatch):
    monkeypatch.setattr("eefast.runtimes.onnx_models.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"eefast\[onnx\] installs: onnx and onnxruntime not installed: pip install"):
        eefast.export(net, tmp_path / "out", format="onnx")


def test_other_files_stay(net, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files; name a new folder"):
        eefast.export(net, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        eefast.export(net, tmp_path / "file")


@pytest.mark.parametrize("manifest", ['{"format": 1, "digest": "0"}', "[]", "no JSON", '{"name": "a site"}'])
def test_folders_of_other_programs_stay(net, tmp_path, manifest):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text(manifest)
    (tmp_path / "out" / "part-00000.parquet").write_text("rows")
    with pytest.raises(ValueError, match="holds other files; name a new folder"):
        eefast.export(net, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_an_export_with_notes_beside_it_stays(net, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "out")
    (folder / "NOTES.md").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        eefast.export(net, folder)
    assert (folder / "NOTES.md").read_text() == "mine"


def test_a_link_stays_a_link(net, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    eefast.export(net.with_criterion("entropy"), tmp_path / "current")
    assert (tmp_path / "current").is_symlink()
    assert '"entropy"' in (tmp_path / "v1" / MANIFEST).read_text()


def test_infinite_thresholds_are_json(net, tmp_path):
    always = net.with_criterion("max_probability", [float("-inf"), float("inf")])
    text = (eefast.export(always, tmp_path / "out") / MANIFEST).read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0)["thresholds"] == ["-inf", "inf"]
    exported = load_exported(tmp_path / "out")
    assert exported(torch.zeros(3, 3, 12, 12)).exit_index.tolist() == [0, 0, 0]


def test_a_failed_export_leaves_the_one_before(net, folder, tmp_path, monkeypatch):
    folder = shutil.copytree(folder, tmp_path / "out")
    before = (folder / MANIFEST).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(stage_programs, "write_programs", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(WriteError, match="cannot be written: full"):
            eefast.export(net, folder)
    assert (folder / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    eefast.export(net.with_criterion("entropy"), folder)
    assert (folder / MANIFEST).read_bytes() != before


def test_other_answers_are_an_error(net, tmp_path, monkeypatch):
    """What is exported is another network, which the comparison must notice."""
    from networks import lived_in

    other = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)), 2)
    write = formats.write
    monkeypatch.setattr(formats, "write", lambda net, *rest: write(other, *rest))
    with pytest.raises(RuntimeError, match=r"answers differ by .* at exit 0"):
        eefast.export(net, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_network_stays_in_training_mode(net, tmp_path):
    made = eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)).train()
    state = {name: value.clone() for name, value in made.state_dict().items()}
    eefast.export(made, tmp_path / "out")
    assert made.training
    assert made.heads[0].training
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
