"""Copies for inference: the module's answers, nothing shared, and computed weights as plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import Stage, images
from odd_networks import COMPUTED_WEIGHTS, ENGINES, SHAPE, assert_answers_or_refusal, conv, layers, network
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm

import eefast
from eefast.planning.inference_copies import channels_last, inference_copy, is_computing_hook, plain_norms

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", COMPUTED_WEIGHTS)
def test_computed_weights_become_plain_ones(name: str) -> None:
    module, x = COMPUTED_WEIGHTS[name](), images(2, (8, 5, 4))
    kind, trainable = type(module[0]), sorted(module.state_dict())
    copied = inference_copy(module)
    torch.testing.assert_close(copied(x), module.eval()(x))
    assert type(copied[0]) is nn.Conv2d
    assert "weight" in dict(copied[0].named_parameters(recurse=False))
    assert not copied[0]._forward_pre_hooks
    # The original computes its weights as before.
    assert (type(module[0]), sorted(module.state_dict())) == (kind, trainable)


def test_norms_with_activations_become_plain_ones_and_the_activation() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    module = nn.Sequential(nn.Conv2d(3, 5, 3), timm.layers.BatchNormAct2d(5, act_layer=nn.SiLU)).eval()
    module[1].running_mean.uniform_(-1, 1)
    module[1].running_var.uniform_(0.5, 2)
    x, kinds = images(2, (3, 5, 4)), [type(part) for part in module.modules()]
    copied = plain_norms(module)
    torch.testing.assert_close(copied(x), module(x))
    assert [type(part) for part in copied[1]] == [nn.BatchNorm2d, nn.Identity, nn.SiLU]
    assert [type(part) for part in module.modules()] == kinds


@pytest.mark.parametrize("name", [*COMPUTED_WEIGHTS, "conv and norm twice"])
def test_after_a_step_of_training_the_weights_are_the_current_ones(name: str) -> None:
    """Their weights are no leaves of autograd then, which `copy.deepcopy` refuses."""
    twice = lambda: Stage(lambda s, x: s.norm(s.conv(s.norm(s.conv(x)).relu())), **layers())  # noqa: E731
    make = COMPUTED_WEIGHTS.get(name, twice)
    net, x = network(make(), make()), images(5, SHAPE)
    fast = eefast.accelerate(net)
    optimiser = torch.optim.SGD(net.parameters(), 0.05)
    sum(out.logits.square().sum() for out in net.train()(x)).backward()
    optimiser.step()
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(x).logits, net(x).logits, rtol=1e-4, atol=1e-4)
    sum(out.logits.square().sum() for out in net.all_exits(x)).backward()
    for engine in ENGINES:
        assert assert_answers_or_refusal(net, x, engine) == ""


@pytest.mark.parametrize("evaluating", [True, False])
def test_modes(evaluating: bool) -> None:
    module = nn.Sequential(conv(), nn.Dropout(), nn.BatchNorm2d(8).eval())
    modes = [part.training for part in module.modules()]
    copied = inference_copy(module, evaluating)
    assert [part.training for part in copied.modules()] == ([False] * 4 if evaluating else modes)
    assert [part.training for part in module.modules()] == modes


def test_nothing_is_shared_and_nothing_needs_a_gradient() -> None:
    module = nn.Sequential(conv(), nn.BatchNorm2d(8))
    with torch.inference_mode():
        copied = inference_copy(module)
    theirs = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    tensors = [*copied.parameters(), *copied.buffers()]
    assert not any(t.data_ptr() in theirs or t.requires_grad or t.is_inference() for t in tensors)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("hook_of", "computing"),
    [
        (lambda: weight_norm(conv()), True),
        (lambda: spectral_norm(conv()), True),
        (lambda: COMPUTED_WEIGHTS["pruned"]()[0], True),
        (lambda: hooked(lambda module, args: None), False),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "another"],
)
def test_hooks_that_compute_weights(hook_of: Callable[[], nn.Module], computing: bool) -> None:
    (hook,) = hook_of()._forward_pre_hooks.values()
    assert is_computing_hook(hook) == computing


def hooked(hook: Callable[..., None]) -> nn.Module:
    layer = conv()
    layer.register_forward_pre_hook(hook)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_channels_last(dtype: torch.dtype) -> None:
    module = channels_last(nn.Sequential(conv(), nn.Conv1d(8, 8, 3), nn.Linear(2, 3)), dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not module[0].weight.is_contiguous()
    assert module[1].weight.is_contiguous()
