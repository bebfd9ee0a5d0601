"""Random networks and images for tests, and the one-by-one loop that every engine must agree with."""

from collections.abc import Callable

import torch
from torch import nn

import eefast


class Stage(nn.Module):
    """A function of the layers."""

    def __init__(self, run: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def lived_in(net: nn.Module, seed: int) -> nn.Module:
    """`net` in eval mode with random weights, BatchNorm parameters and statistics that keep activations in range."""
    generator = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            fan_in = m.weight[0].numel()
            m.weight.data = torch.randn(m.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif isinstance(m, nn.BatchNorm2d):
            if m.affine:
                m.weight.data = 0.5 + 0.7 * torch.rand(m.weight.shape, generator=generator)
                m.bias.data = 0.2 * torch.randn(m.bias.shape, generator=generator)
            m.running_mean.copy_(0.3 * torch.randn(m.running_mean.shape, generator=generator))
            m.running_var.copy_(0.7 + 0.7 * torch.rand(m.running_var.shape, generator=generator))
        elif isinstance(m, nn.Linear):
            m.weight.data = torch.randn(m.weight.shape, generator=generator) * m.in_features**-0.5
            if m.bias is not None:
                m.bias.data = 0.1 * torch.randn(m.bias.shape, generator=generator)
    return net.eval()


def images(n: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """[n, *shape] random images of different brightness and contrast."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator)
    contrast = 0.3 + 1.5 * torch.rand(n, 1, 1, 1, generator=generator)
    return x * contrast + torch.randn(n, shape[0], 1, 1, generator=generator)


@torch.no_grad()
def one_by_one(net: eefast.EarlyExitNet, x: torch.Tensor) -> eefast.ExitResult:
    """Plain Python: each image alone through stage after stage until its exit."""
    rows = []
    for image in x.split(1):
        features = image
        for i, (stage, head) in enumerate(zip(net.stages, net.heads, strict=True)):
            features = stage(features)
            logits, _, row = head(features)
            value = float(net.criterion.confidence(logits, row))
            threshold = float(net.thresholds[i]) if i < net.num_exits else None
            above = net.criterion.comparison == ">"
            if threshold is None or (value > threshold if above else value < threshold):
                rows.append((logits[0].float(), i, value, float(net.cost[i])))
                break
    if not rows:
        return eefast.ExitResult(torch.empty(0, net.num_classes), *(torch.empty(0) for _ in range(3)))
    logits, exits, values, costs = zip(*rows, strict=True)
    return eefast.ExitResult(torch.stack(logits), torch.tensor(exits), torch.tensor(values), torch.tensor(costs))


@torch.no_grad()
def spread_thresholds(net: eefast.EarlyExitNet, x: torch.Tensor, share: float) -> None:
    """Set thresholds at which about `share` of the samples that arrive exit, half-way between two confidences."""
    for i, (stage, head) in enumerate(zip(net.stages, net.heads, strict=True)):
        if i == net.num_exits or len(x) == 0:
            break
        x = stage(x)
        logits, _, row = head(x)
        value = net.criterion.confidence(logits, row)
        ordered = value.sort(descending=net.criterion.comparison == ">").values
        # The widest gap near the wanted share, so that the last bit of a convolution decides nothing.
        k = round(share * len(ordered))
        low, high = max(k - len(ordered) // 10, 1), min(k + len(ordered) // 10 + 1, len(ordered) - 1)
        k = low + int(ordered.diff()[low - 1 : high].abs().argmax())
        net.thresholds[i] = (ordered[k - 1] + ordered[k]) / 2
        x = x[~net.criterion.leaves(value, net.thresholds[i])]


def assert_same_answers(
    got: eefast.ExitResult, expected: eefast.ExitResult, net: eefast.EarlyExitNet, tolerance: float = 1e-4
) -> None:
    """Same exit, class and cost for every row; logits and confidences equal up to `tolerance` of their largest."""
    assert torch.equal(got.exit_index, expected.exit_index)
    assert torch.equal(got.cost, expected.cost)
    scale = float(expected.logits.detach().abs().max()) if len(expected.logits) else 1.0
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=tolerance * max(scale, 1.0))
    torch.testing.assert_close(got.confidence, expected.confidence, rtol=0, atol=tolerance)
    clear = expected.logits.topk(min(2, net.num_classes)).values.diff().abs().flatten() > 2 * tolerance * max(
        scale, 1.0
    )
    if net.num_classes > 1:
        assert torch.equal(got.labels[clear], expected.labels[clear])
