"""The state_dict in a checkpoint is found wherever training scripts keep it; modules without end are refused."""

import argparse
import datetime
import pathlib
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from networks import lived_in
from reference_nets import (
    CustomEENet,
    EENet,
    save,
)
from torch import nn

from eefast import zoo
from eefast.checkpoint.loading import CheckpointError, load
from eefast.checkpoint.weights import load_weights


class Settings:
    """What users keep beside the weights: an object of their class."""


def around(state):
    """`state` as training scripts save it, by the library that they use."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(value.float().clone()) for value in state.values()])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def named(prefix):
        return {prefix + name: value for name, value in state.items()}

    return {
        "plain": state,
        "DataParallel": named("module."),
        "torch.compile": named("_orig_mod."),
        "compiled, then parallel": named("module._orig_mod."),
        "parallel, then compiled": named("_orig_mod.module."),
        "Lightning": {
            "state_dict": {**named("model."), "loss.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 0.1, "path": pathlib.PurePosixPath("data"), "settings": Settings()},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
            "loops": {"fit_loop": {"state_dict": {}}},
        },
        "net": {"net": state, "acc": 93.1, "epoch": 3},
        "model_state_dict": {"epoch": 1, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict()},
        "nested": {"checkpoint": {"model": state}},
        "timm": {
            "arch": "resnet18",
            "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"), dtype=torch.float16, size=torch.Size([3])),
            "state_dict": state,
            "state_dict_ema": named("module."),
            "optimizer": optimizer.state_dict(),
            "metric": np.float64(0.9),
        },
        "averaged": {"model_ema": {**named("module."), "n_averaged": torch.tensor(3)}},
        "odd": {
            "model": state,
            "when": datetime.datetime(2026, 1, 1),
            "counts": Counter("abc"),
            "lists": defaultdict(list, a=[1]),
            "random": np.random.default_rng(0),
            "array": np.zeros(3),
            "sets": {1, 2, frozenset({3})},
            "complex": [1j, b"bytes", bytearray(b"x"), 2**200, slice(1, 2)],
            "sizes": {(3, 32, 32): 1},
        },
    }


AROUND = sorted(around(CustomEENet((1, 8, 8), 3, 2).state_dict()))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", AROUND)
@pytest.mark.sampled(12)
def test_weights_are_found_where_people_keep_them(tmp_path, name, protocol):
    state = lived_in(CustomEENet((1, 8, 8), 3, 2), seed=8).state_dict()
    expected = load(save(state, tmp_path / "plain.pt"), input_shape=(1, 8, 8)).state_dict()
    torch.save(around(state)[name], tmp_path / "model.pt", pickle_protocol=protocol)
    got = load(tmp_path / "model.pt", input_shape=(1, 8, 8)).state_dict()
    assert all(torch.equal(got[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", AROUND)
def test_weights_of_a_backbone_are_found_where_people_keep_them(tmp_path, name):
    made, other = (lived_in(CustomEENet((1, 8, 8), 3, 2), seed) for seed in (8, 9))
    torch.save(around(made.state_dict())[name], tmp_path / "model.pt")
    load_weights(other, tmp_path / "model.pt")
    assert all(torch.equal(other.state_dict()[key], value) for key, value in made.state_dict().items())


def test_of_several_networks_the_usual_one_is_taken_and_said(tmp_path, caplog):
    states = [lived_in(CustomEENet((1, 8, 8), 3, 2), seed).state_dict() for seed in (8, 9)]
    first = load(save(states[0], tmp_path / "plain.pt"), input_shape=(1, 8, 8)).state_dict()
    path = save({"model_ema": states[1], "model": states[0]}, tmp_path / "model.pt")
    got = load(path, input_shape=(1, 8, 8)).state_dict()
    assert all(torch.equal(got[key], value) for key, value in first.items())
    assert "those under 'model' are used" in caplog.text
    two = {f"{prefix}.{key}": value for prefix in ("teacher", "student") for key, value in states[0].items()}
    with pytest.raises(CheckpointError, match=r"holds 2 networks, under 'student.', 'teacher.'"):
        load(save(two, tmp_path / "model.pt"), input_shape=(1, 8, 8))


@pytest.mark.parametrize("prefix", ["", "net.", "module."])
def test_weights_of_eefast_without_their_folder_say_the_way_out(tmp_path, prefix):
    state = {prefix + key: value for key, value in zoo.eenet("eenet8").state_dict().items()}
    with pytest.raises(CheckpointError, match=r"do not say its exit rule; give the folder that net.save\(folder\)"):
        load(save({"state_dict": state}, tmp_path / "last.ckpt"), input_shape=(3, 32, 32))


def loop(model):
    model.exits[0]._modules["itself"] = model
    return model


def doubling(model):
    for _ in range(64):
        model = nn.Sequential(model, model)
    return model


@pytest.mark.parametrize("change", [loop, doubling])
def test_modules_without_end_are_refused(tmp_path, change):
    model = change(EENet(20, (2, 4), input_shape=(1, 8, 8)))
    with pytest.raises(CheckpointError, match="its modules hold over"):
        load(save(model, tmp_path / "model.pt"))


@pytest.mark.parametrize("table", [None, [], {"a" * 1000: None}, {1: torch.zeros(1)}, torch.zeros(1)])
def test_modules_without_tables_are_refused(tmp_path, table):
    model = EENet(20, (2, 4), input_shape=(1, 8, 8))
    model.exits[0].__dict__["_parameters"] = table
    with pytest.raises(CheckpointError, match="_parameters"):
        load(save(model, tmp_path / "model.pt"))
