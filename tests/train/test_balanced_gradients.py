"""Averaged gradients against a backward pass for every exit alone."""

import pytest
import torch
from torch.nn import functional

from eefast import zoo
from eefast.train import balanced_gradients
from eefast.train.module import EarlyExitModule


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return zoo.eenet("eenet20", 3, (1, 2, 4), "conv1", 7, (3, 9, 11)).double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 9, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def losses_of(outputs):
    labels = torch.tensor([0, 3, 6, 1, 3])
    return [(i + 1) * functional.cross_entropy(out.logits, labels) for i, out in enumerate(outputs)]


def gradients(net, losses):
    """Of the parameters of every stage, then of every head."""
    parts = [list(part.parameters()) for part in (*net.stages, *net.heads)]
    flat = torch.autograd.grad(sum(losses), [p for part in parts for p in part], allow_unused=True)
    found = iter(flat)
    return [[next(found) for _ in part] for part in parts]


def test_outputs_are_those_of_all_exits(net, images) -> None:
    for mine, plain in zip(balanced_gradients.compute_exits(net, images), net.all_exits(images), strict=True):
        assert torch.equal(mine.logits, plain.logits)
        assert torch.equal(mine.confidence_logit, plain.confidence_logit)


def test_a_stage_gets_the_mean_of_later_exits_and_a_head_its_own_gradient(net, images) -> None:
    exits = len(net.heads)
    found = gradients(net, losses_of(balanced_gradients.compute_exits(net, images)))
    alone = [gradients(net, [losses_of(net.all_exits(images))[i]]) for i in range(exits)]
    for i in range(exits):
        for k, gradient in enumerate(found[i]):
            expected = sum(alone[j][i][k] for j in range(i, exits)) / (exits - i)
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
        for k, gradient in enumerate(found[exits + i]):
            if gradient is not None:  # confidences are not part of these losses
                torch.testing.assert_close(gradient, alone[i][exits + i][k], rtol=1e-9, atol=1e-12)


def losses_sum(net, images):
    labels = torch.tensor([0, 3, 6, 1, 3])
    return sum(functional.cross_entropy(out.logits, labels) for out in net.all_exits(images))


@pytest.mark.parametrize("balanced", [False, True])
def test_training_steps_balance_on_request(monkeypatch: pytest.MonkeyPatch, net, images, balanced: bool) -> None:
    module = EarlyExitModule(net, "v0", balanced=balanced)
    monkeypatch.setattr(EarlyExitModule, "current_epoch", 0)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "_check", lambda *_: None)
    module.eval()
    loss = module.training_step((images, torch.tensor([0, 3, 6, 1, 3]), torch.arange(5)), 0)
    first = next(net.stages[0].parameters())
    (found,) = torch.autograd.grad(loss, first)
    (whole,) = torch.autograd.grad(losses_sum(net, images), first)
    assert torch.allclose(found * (4 if balanced else 1), whole)
