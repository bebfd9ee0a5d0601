"""Times of stages and heads in the place of MACs."""

import torch
from candidate_cases import silent
from networks import images, lived_in

from eefast import zoo
from eefast.search import seconds
from eefast.search.seconds import time_costs
from eefast.search.supernet import of_network


def test_every_stage_and_head_is_timed_on_its_own_features(monkeypatch):
    """A clock that counts pixels and channels in the place of seconds."""
    net = of_network(lived_in(zoo.eenet("eenet20", 1, input_shape=(1, 9, 9)), 1), ["pool", "conv1"], ["2", "5"], 9).net
    monkeypatch.setattr(seconds, "_seconds", lambda run, x: (run(x), x[0].numel() * len(x) * 1e-9)[1])
    found = time_costs(net.eval(), images(70, (1, 9, 9)), silent)
    assert [(cost.stage_macs, cost.head_macs) for cost in found] == [
        (81, 16 * 81), (0, 16 * 81), (16 * 81, 32 * 25), (0, 32 * 25), (32 * 25, 64 * 9)
    ]  # fmt: skip
    assert [cost.num_features for cost in found] == [0] * 5


def test_times_are_above_zero():
    net = lived_in(zoo.eenet("eenet20", 1, input_shape=(1, 9, 9)), 1)
    found = time_costs(net, images(3, (1, 9, 9)), silent)
    assert all(cost.stage_macs > 0 and cost.head_macs > 0 for cost in found)
    assert torch.is_inference_mode_enabled() is False
