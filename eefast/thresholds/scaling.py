"""Outputs of all exits on held-out data → temperatures and Platt scaling per exit, folded into the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model import EarlyExitNet
from ..result import ExitOutput
from .outputs import check_labels


@dataclass(frozen=True)
class Scaling:
    """One temperature per exit for its logits, one line per exit for its confidence row; n + 1 numbers each.

    Logits become logits / temperature (Guo et al. 2017), the confidence row z becomes slope · z + offset (Platt 1999).
    bias: K numbers per exit that are added to the divided logits, see `fitting.fit_rule`; none of `fit_scaling`.

    Without a bias no exit's label changes. What changes for the criteria:
    max_probability, margin, entropy: their values, and with three or more classes the order of the samples, so other
        samples exit at an equal cost.
    learned: its values only; while the slope is positive the order stays, and with calibrated thresholds the same
        samples exit. A negative slope says that the row was large for wrong answers.
    """

    temperature: tuple[float, ...]
    slope: tuple[float, ...]
    offset: tuple[float, ...]
    bias: tuple[tuple[float, ...], ...] = ()


def fit_scaling(outputs: Sequence[ExitOutput], labels: Tensor) -> Scaling:
    """The scaling with the least negative log-likelihood on held-out data, exit by exit, by LBFGS in float64.

    The learned confidence is fitted to "this exit is right", with Platt's targets (n + 1) / (n + 2) instead of 1 and
    1 / (n + 2) instead of 0, which keep the line finite where the row separates right from wrong without a mistake.
    Temperatures are held within 0.05 … 20. Raises `ValueError` without samples, and for outputs that are not finite.
    """
    check_labels(labels, len(outputs[0].logits))
    temperature, lines = [], []
    for i, out in enumerate(outputs):
        logits, row = out.logits.double(), out.confidence_logit.double()
        if len(labels) == 0 or not (logits.isfinite().all() and row.isfinite().all()):
            raise ValueError(f"exit {i} has {len(labels)} samples, or outputs that are not finite: no fit is possible")
        right = logits.argmax(dim=1) == labels
        target = torch.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2)).double()

        def nll(p: Tensor, logits: Tensor = logits) -> Tensor:
            return nn.functional.cross_entropy(logits / temperature_of(p), labels)

        def line_nll(p: Tensor, row: Tensor = row, target: Tensor = target) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(p[0] * row + p[1], target)

        temperature.append(float(temperature_of(minimize(nll, [0.0]))))
        lines.append(minimize(line_nll, [1.0, 0.0]).tolist())
    slope, offset = zip(*lines, strict=True)
    return Scaling(tuple(temperature), slope, offset)


def scaled(outputs: Sequence[ExitOutput], scaling: Scaling) -> list[ExitOutput]:
    """The outputs that the network would give with `scaling` folded into its heads."""
    parts = zip(outputs, scaling.temperature, scaling.slope, scaling.offset, _biases(scaling), strict=True)
    return [
        ExitOutput(
            _shifted(out.logits / t, bias), torch.sigmoid(a * out.confidence_logit + b), a * out.confidence_logit + b
        )
        for out, t, a, b, bias in parts
    ]


@torch.no_grad()
def fold_scaling(net: EarlyExitNet, scaling: Scaling) -> None:
    """Change the linear layers of the network's heads in place, so that it answers as `scaled` says, at no cost.

    Raises `ValueError` before anything is changed for heads without linear layers `classifier` and `confidence`.
    """
    for (classifier, confidence), t, a, b, bias in zip(
        scalable_layers(net), scaling.temperature, scaling.slope, scaling.offset, _biases(scaling), strict=True
    ):
        for parameter in (classifier.weight, classifier.bias):
            parameter.div_(t)
        classifier.bias.copy_(_shifted(classifier.bias, bias))
        confidence.weight.mul_(a)
        confidence.bias.mul_(a).add_(b)


def scalable_layers(net: EarlyExitNet) -> list[list[Any]]:
    """Classifier and confidence of every head; `ValueError` unless all are linear layers with biases."""
    layers: list[list[Any]] = [
        [getattr(head, name, None) for name in ("classifier", "confidence")] for head in net.heads
    ]
    for i, pair in enumerate(layers):
        if not all(isinstance(layer, nn.Linear) and layer.bias is not None for layer in pair):
            raise ValueError(f"head {i} has no linear layers classifier and confidence with biases to fold into")
    return layers


def temperature_of(p: Tensor) -> Tensor:
    """1 at 0, within 0.05 … 20 everywhere: what is minimised has no bounds."""
    return (3 * torch.tanh(p / 3)).exp()


def minimize(loss: Callable[[Tensor], Tensor], start: Sequence[float]) -> Tensor:
    """Where a smooth `loss` has its minimum, float64, by LBFGS."""
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([point], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(point)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return point.detach()


def _biases(scaling: Scaling) -> Sequence[Sequence[float]]:
    return scaling.bias or [()] * len(scaling.temperature)


def _shifted(logits: Tensor, bias: Sequence[float]) -> Tensor:
    return logits + torch.tensor(bias, dtype=logits.dtype, device=logits.device) if bias else logits
