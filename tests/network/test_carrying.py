"""Features of the last early exit at the final one: by hand, in every engine, saved, attached, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import Tensor, nn
from torch.nn import functional as F

import eefast
from eefast import ops, zoo
from eefast.carrying import JoinedStage
from eefast.cost import macs
from eefast.surgery.attachment import new_parameters

needs_cpp = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
NETWORKS: dict[str, dict[str, Any]] = {
    "three exits": {"name": "eenet20", "num_exits": 3, "placement": "linear", "input_shape": (3, 19, 17)},
    "first block": {"name": "resnet8", "placement": [1], "head": "depthwise", "input_shape": (3, 16, 16)},
    "BatchNorm": {"name": "eenet8", "head": "bnpool", "input_shape": (1, 13, 13)},
    "convolutions": {"name": "eenet20", "head": ["pool", "conv1"], "input_shape": (3, 9, 9), "num_classes": 3},
    "rows": {"name": "eenet20-1d", "input_shape": (6, 37)},
}


def network(name: str) -> eefast.EarlyExitNet:
    torch.manual_seed(0)
    return lived_in(zoo.eenet(**NETWORKS[name], carry="features"), 1)


def inputs(net: eefast.EarlyExitNet, n: int) -> Tensor:
    if len(net.input_shape) == 3:
        return images(n, net.input_shape)
    return torch.randn(n, *net.input_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_hand(net: eefast.EarlyExitNet, x: Tensor) -> Tensor:
    """[N, K] float64: the final logits, from means and products of matrices."""
    net = net.double()
    for stage in list(net.stages)[:-1]:
        x = stage(x.double())
    early, final = net.heads[-2:]
    found = early.norm(early.convs(x)).flatten(2).mean(2)
    last = net.stages[-1].stage(x).flatten(2).mean(2)
    weight = final.classifier.weight
    return last @ weight[:, : last.shape[1]].T + found @ weight[:, last.shape[1] :].T + final.classifier.bias


@pytest.mark.parametrize("name", NETWORKS)
def test_the_final_exit_reads_both_means(name: str) -> None:
    net = network(name)
    x = inputs(net, 3)
    with torch.no_grad():
        found = net.all_exits(x)[-1].logits
    wanted = by_hand(net, x)
    assert (found - wanted).abs().max() < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("engine", ["reference", "compact", pytest.param("resident", marks=needs_cpp)])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.sampled(8)
def test_every_engine_carries_through_compaction(name: str, engine: str) -> None:
    """And runs that stop before the final exit go on with it."""
    net = network(name)
    x = inputs(net, 17)
    spread_thresholds(net, x, 0.3)
    wanted = one_by_one(net, x)
    assert 2 < int((wanted.exit_index == net.num_exits).sum()) < 15
    fast = eefast.accelerate(net, engine=engine)
    assert_same_answers(fast(x), wanted, net)
    stopped = fast.until(net.num_exits - 1)(x)
    assert_same_answers(stopped.finished(fast.resume(stopped.survivors)), wanted, net)


def test_the_cost_counts_what_runs_again() -> None:
    net = network("first block")
    plain = zoo.eenet(**NETWORKS["first block"])
    early, shape = net.heads[0], net.stage_costs[0].feature_shape
    again = macs(nn.Sequential(early.convs, nn.AdaptiveAvgPool2d(1)), shape)[0]
    mean = macs(nn.AdaptiveAvgPool2d(1), plain.stage_costs[1].feature_shape)[0]
    assert net.stage_costs[1].stage_macs == plain.stage_costs[1].stage_macs + again + mean


@pytest.mark.parametrize("name", ["first block", "BatchNorm", "rows"])
def test_a_folder_holds_shared_weights_once(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    net = network(name)
    net.save(tmp_path)
    loaded = eefast.load(tmp_path)
    assert loaded.config == net.config
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == sum(  # noqa: SIM118
            value.numel() for value in {id(v): v for v in net.state_dict(keep_vars=True).values()}.values()
        )
    x = inputs(net, 5)
    with torch.no_grad():
        for got, wanted in zip(loaded.all_exits(x), net.all_exits(x), strict=True):
            assert torch.equal(got.logits, wanted.logits)
    head, stage = loaded.heads[-2], loaded.stages[-1]
    assert isinstance(stage, JoinedStage)
    assert stage.early_convs is head.convs
    assert stage.early_norm is head.norm


def test_attached_answers_as_the_backbone_until_it_is_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = lived_in(eefast.surgery.backbone("torchvision:resnet18", 7), 1)
    x = images(2, (3, 64, 64))
    with torch.no_grad():
        wanted = body(x)
    net = eefast.attach(
        body, ["layer1", "layer2"], head=["pool", "conv1"], input_shape=(3, 64, 64), carry="features"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(net.all_exits(x)[-1].logits, wanted, rtol=1e-5, atol=1e-5)
    names = [name for name, _ in new_parameters(net)]
    assert "heads.1.convs.0.0.weight" in names
    assert {"heads.2.classifier.weight", "heads.2.classifier.bias", "heads.2.confidence.weight"} <= set(names)
    with torch.no_grad():
        net.heads[-1].classifier.weight.normal_()
    net.save(tmp_path)
    loaded = eefast.load(tmp_path)
    with torch.no_grad():
        for got, expected in zip(loaded.all_exits(x), net.all_exits(x), strict=True):
            assert torch.equal(got.logits, expected.logits)


def test_the_final_loss_trains_both_exits() -> None:
    net = network("convolutions").train()
    F.cross_entropy(net(inputs(net, 4))[-1].logits, torch.tensor([0, 1, 2, 0])).backward()
    assert net.heads[1].convs[0][0].weight.grad.abs().max() > 0
    assert net.heads[0].classifier.weight.grad is None


def test_without_its_exit_the_features_still_join() -> None:
    """The answer of the final exit stays; there is no config for such a network, and it cannot be saved."""
    net = network("three exits")
    x = inputs(net, 3)
    with torch.no_grad():
        wanted = net.all_exits(x)[-1].logits
        assert torch.equal(net.without_exits([0]).all_exits(x)[-1].logits, wanted)
        assert torch.equal(net.without_exits([2]).all_exits(x)[-1].logits, wanted)
    assert net.without_exits([0]).config["carry"] == "features"
    assert net.without_exits([2]).config is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "flattened": ({"head": "plain", "num_exits": 1, "placement": [1]}, r"exit 0 is 'plain' and flattens its map"),
    "unknown": ({"carry": "logits"}, r"carry='logits' is unknown; choose 'features' or None"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong: str) -> None:
    change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        zoo.eenet("eenet20", **{"carry": "features", **change})


def test_a_search_is_refused() -> None:
    from eefast.search.supernet import of_network

    with pytest.raises(ValueError, match="carries features from its last early exit; search with the network"):
        of_network(network("three exits"), ("pool",), None, 3)
