"""Which changes of a network its hashes show."""

from __future__ import annotations

import copy

import torch
from networks import lived_in
from torch import nn

import eefast
from eefast import fingerprints, zoo


def net(**more: object) -> eefast.EarlyExitNet:
    return lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12), **more), 0)


def test_weights_and_not_thresholds() -> None:
    made = net()
    before = fingerprints.weights(made)
    made.thresholds.fill_(0.1)
    assert fingerprints.weights(made) == before
    next(made.parameters()).data[0] += 1e-6
    assert fingerprints.weights(made) != before


def test_structure_and_not_weights(tmp_path) -> None:
    made = net()
    made.save(tmp_path)
    loaded = eefast.load(tmp_path)
    assert fingerprints.structure(loaded) == fingerprints.structure(made)
    next(made.parameters()).data[0] += 1
    assert fingerprints.structure(made) == fingerprints.structure(loaded)
    hashes = {fingerprints.structure(other) for other in (made, net(filters=3), net(num_classes=9), net(head="bnpool"))}
    assert len(hashes) == 4


def test_layers_and_not_what_changes_no_answer() -> None:
    made = net()
    before, structure = made.layers(), fingerprints.structure(made)
    for module in made.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = not module.inplace
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(made)
    assert synchronised.layers() == made.half().layers() == before
    assert not made.changed
    made.stages[0].add_module("more", nn.Tanh())
    assert made.changed
    assert fingerprints.structure(made) != structure


def test_structure_of_a_network_without_config() -> None:
    made = net()
    made.config = None
    other = copy.deepcopy(made)
    assert fingerprints.structure(made) == fingerprints.structure(other)
    other.stages[1].append(torch.nn.ReLU())
    assert fingerprints.structure(made) != fingerprints.structure(other)
