"""Paths → the reader of what is there, and one kind of error for everything that cannot be read."""

from pathlib import Path

import pytest
import torch

from eefast.checkpoint import loading
from eefast.checkpoint.loading import CheckpointError, load


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: No such file"):
        load(tmp_path / "nowhere")


def test_what_is_loaded_in_inference_mode_can_be_changed_outside(folder):
    with torch.inference_mode():
        net = load(folder)
    net.thresholds.fill_(0.5)
    assert not any(value.is_inference() for value in net.state_dict().values())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_folder_points_to_the_folder(folder, name):
    with pytest.raises(CheckpointError, match="give the folder"):
        load(folder / name)


@pytest.mark.parametrize("argument", [{"input_shape": (1, 8, 8)}, {"head": "pool"}, {"normalization": ((0,), (1,))}])
def test_arguments_for_reference_files_are_refused_for_folders(folder, argument):
    with pytest.raises(CheckpointError, match="leave them out, the folder has them"):
        load(folder, **argument)


@pytest.mark.parametrize("error", [RecursionError("deep\nand more"), MemoryError(), KeyError("a"), RuntimeError("x")])
def test_whatever_a_file_makes_python_raise_is_the_files_fault(folder, monkeypatch, error):
    def raising(path):
        raise error

    monkeypatch.setattr(loading, "read_folder", raising)
    name = type(error).__name__
    with pytest.raises(CheckpointError, match=rf"^{folder}: it cannot be loaded \({name}: [^\n]*\)$") as raised:
        load(folder)
    assert raised.value.__cause__ is error


def test_an_interrupt_is_no_fault_of_the_file(folder, monkeypatch):
    def raising(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "read_folder", raising)
    with pytest.raises(KeyboardInterrupt):
        load(folder)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_may_be_texts(folder, kind):
    assert load(kind(folder)).num_classes == 3
