"""The compact engine with the Triton exits: whole networks against the one-by-one loop, on a GPU or interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import images, lived_in, one_by_one, spread_thresholds
from where import GPU, run_by_triton, runs_triton

import eefast
from eefast.data.sensors import sensor_windows
from eefast.planning import planner
from eefast.planning.compact_steps import build_compact

pytestmark = runs_triton


@pytest.fixture
def triton_everywhere():
    """Without a GPU: the Triton kernels, interpreted, run the ops on the CPU, and plans as if for a GPU."""
    if GPU:
        yield
        return
    with run_by_triton("exit_head", "exit_conv_head", "gather_survivors"):
        yield


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("head", ["pool", pytest.param("conv1", marks=pytest.mark.slow)])
def test_networks_on_rows(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = lived_in(eefast.zoo.eenet("eenet20-1d", 2, head=head, num_classes=7, input_shape=(6, 37)), seed=1)
    x = sensor_windows(257 if GPU else 9, 37)[0]
    for i, out in enumerate(net.all_exits(x)[:-1]):
        net.thresholds[i] = out.confidence.quantile(0.55)
    expected = one_by_one(net, x)
    assert len(expected.exit_index.unique()) > 1
    if GPU:
        net, x = net.cuda(), x.cuda()
    else:
        monkeypatch.setenv("EEFAST_GRAPHS", "0")
        cuda = torch.device("cuda")
        monkeypatch.setattr(planner, "build_compact", lambda subject: build_compact(replace(subject, device=cuda)))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        fast = eefast.accelerate(net, engine="compact")
        result = fast(x)
    assert "Triton" in str(fast.plan)
    torch.testing.assert_close(result.exit_index.cpu(), expected.exit_index)
    torch.testing.assert_close(result.logits.cpu(), expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("head", ["pool", "bnpool", "plain", "conv1", "conv3"])
@pytest.mark.parametrize("criterion", ["learned", "entropy"])
@pytest.mark.sampled(5)
def test_whole_networks(head: str, criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (3, 32, 32) if GPU else (3, 16, 16)
    net = eefast.zoo.eenet("eenet20", num_exits=2, placement=[1, 3], head=head, num_classes=10, input_shape=shape)
    net = lived_in(net, seed=1).with_criterion(criterion).eval()
    x = images(257 if GPU else 9, shape)
    spread_thresholds(net, x, 0.4)
    expected = one_by_one(net, x)
    assert len(expected.exit_index.unique()) > 1
    if GPU:
        net, x = net.cuda(), x.cuda()
    else:
        monkeypatch.setenv("EEFAST_GRAPHS", "0")
        cuda = torch.device("cuda")
        monkeypatch.setattr(planner, "build_compact", lambda subject: build_compact(replace(subject, device=cuda)))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        fast = eefast.accelerate(net, engine="compact")
        result = fast(x)
    assert ("Triton with conv" if "conv" in head else "Triton") in str(fast.plan)
    torch.testing.assert_close(result.exit_index.cpu(), expected.exit_index)
    torch.testing.assert_close(result.logits.cpu(), expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.cost.cpu(), expected.cost)
