"""Table of steps → answers: every step computed in turn for all samples, errors that name the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import criteria
from .checks import Named, check_fake, check_rule, check_stored


class Kind(IntEnum):
    """What a step does."""

    CONVOLUTION = 0
    AFFINE = 1
    MAX_POOL = 2
    EXIT = 3
    MEAN = 4
    SCALE = 5
    JOIN = 6
    LOAD = 7
    STORE = 8


class Activation(IntEnum):
    """What is applied to the numbers that a step computes."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    SILU = 3
    HARDSWISH = 4
    HARDSIGMOID = 5
    SIGMOID = 6
    GELU = 7


_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda x: x,
    Activation.RELU: torch.relu,
    Activation.RELU6: F.relu6,
    Activation.SILU: F.silu,
    Activation.HARDSWISH: F.hardswish,
    Activation.HARDSIGMOID: F.hardsigmoid,
    Activation.SIGMOID: torch.sigmoid,
    Activation.GELU: F.gelu,
}


def activated(x: Tensor, activation: int) -> Tensor:
    """What an `Activation` makes of x."""
    if activation not in _ACTIVATIONS:
        raise RuntimeError("there is no such activation")
    return _ACTIVATIONS[activation](x)


class Step(NamedTuple):
    """What a row of `steps` says, see `eefast.ops.resident_forward.run`."""

    kind: int
    source: int
    target: int
    residual: int
    activation: int
    kernel: int
    stride: int
    padding: int
    winograd: int
    weight: int
    packed: int
    section: int
    groups: int
    channel: int
    row: int


COLUMNS = Step._fields

MAX_KERNEL = 128
"""The largest window of a convolution or a pooling."""

Answers = tuple[Tensor, Tensor, Tensor]
"""Logits [N, K] float32, confidence [N] float32, exit index [N] int64."""


def answers(
    image: Tensor, steps: Tensor, maps: Tensor, thresholds: Tensor, criterion: str, num_classes: int,
    compute: Callable[[Step, Tensor, Tensor | None, int], Tensor], rule: Tensor | None = None,
    features: Tensor | None = None, before: Tensor | None = None,
) -> Answers:  # fmt: skip
    """What a network says of map 0, `image` [N, C, H, W]; every sample runs through all steps.

    compute: (step, source, residual or None, channels of the target) → the target map; for an exit the rows [N, K + 1]
        of logits and confidence. The residual of a JOIN is its target so far, None before the first.
    features, before: what a STORE writes and what a rule begins with, as of `resident_forward`.
    Raises `RuntimeError` that names the step which cannot be computed.
    """
    chosen, n = criteria.get(criterion), len(image)
    logits, confidence = (image.new_empty(n, *more, dtype=torch.float32) for more in ((num_classes,), ()))
    if before is not None:
        logits, confidence = before[:, :-1].clone(), before[:, -1].clone()
    results = logits, confidence, torch.full((n,), -1, device=image.device)
    channels, values, last = dict(enumerate(maps[:, 0].tolist())), {0: image}, Step(*steps[-1].tolist())

    def run(step: Step) -> None:
        x = values[step.source]
        if step.kind == Kind.STORE:
            if step != last:
                raise RuntimeError("a map is stored by the last step only")
            if features is None or x[:, : features.shape[1]].shape != features.shape:
                raise RuntimeError("there are no features of its shape to write to")
            goes_on = results[2] < 0
            if not features.is_floating_point():  # no integer stands for a NaN
                goes_on &= ~x.isnan().flatten(1).any(1)
            (rows,) = goes_on.nonzero(as_tuple=True)
            features[: len(rows)] = x[rows, : features.shape[1]].to(features.dtype)
            results[2][rows] = len(thresholds) + torch.arange(len(rows), device=image.device)
            return
        if step.kind == Kind.LOAD:
            if step.source != 0:
                raise RuntimeError("it loads something else than map 0")
            values[step.target] = joined(x, None, 0, channels[step.target])
            return
        outputs = num_classes + 1 if step.kind == Kind.EXIT else channels[step.target]
        if step.kind in (Kind.CONVOLUTION, Kind.MAX_POOL) and not (
            0 < step.kernel <= MAX_KERNEL and 0 < step.stride <= MAX_KERNEL and 0 <= step.padding <= step.kernel
        ):
            raise RuntimeError("there is no kernel for this window")
        if step.kind == Kind.JOIN:
            other = values.get(step.target)
        else:
            reads = step.kind == Kind.SCALE or (step.kind == Kind.CONVOLUTION and step.residual >= 0)
            other = values[step.residual] if reads else None
        if step.kind not in list(Kind) or (step.kind == Kind.EXIT and not 0 <= step.target <= len(thresholds)):
            raise RuntimeError("there is no such kind of step or exit")
        found = compute(step, x, other, outputs)
        if step.kind != Kind.EXIT:
            values[step.target] = found
            return
        answer, row, here = found[:, :-1], found[:, -1], results[2] < 0
        if rule is None:
            value = chosen.confidence(answer, row)
        else:
            answer, value = criteria.carry(answer, row, rule[step.target], results[0], results[1])
        results[0][here], results[1][here] = answer[here], value[here]
        if step.target < len(thresholds):
            here = here & criteria.exits_by(chosen, value, thresholds[step.target])
        results[2][here] = step.target

    with torch.autocast(image.device.type, enabled=False):
        for row, step in enumerate(steps.tolist()):
            try:
                run(Step(*step))
            except KeyError as error:
                raise RuntimeError(f"steps[{row}] = {step}: there is no map {error}, or not yet") from None
            except (RuntimeError, ValueError, ArithmeticError) as error:
                raise RuntimeError(f"steps[{row}] = {step}: {error}") from error
    return results


def windows(step: Step) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """Kernel, stride and padding of a convolution or a pooling, as functions of PyTorch take them."""
    rows, above = (1, 0) if step.row else (step.kernel, step.padding)
    return (rows, step.kernel), step.stride, (above, step.padding)


def joined(x: Tensor, target: Tensor | None, channel: int, channels: int) -> Tensor:
    """A map of `channels` channels, those of `target` or zeros, in which x [N, C, H, W] begins at `channel`."""
    found = x.new_zeros(len(x), channels, *x.shape[2:]) if target is None else target.clone()
    found[:, channel : channel + x.shape[1]] = x
    return found


def parts(weights: Tensor, place: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The parts of a step's weights, which are stored one after another from `place` on."""
    sizes = [math.prod(shape) for shape in shapes]
    if min(place, *sizes) < 0 or place + sum(sizes) > len(weights):
        raise RuntimeError("its weights are outside of weights")
    stored = weights[place : place + sum(sizes)].split(sizes)
    return tuple(part.view(shape) for part, shape in zip(stored, shapes, strict=True))


def check_tables(
    images: Tensor, steps: Tensor, maps: Tensor, weights: Tensor, thresholds: Tensor, num_classes: int,
    criterion: str, rule: Tensor | None, map_columns: int = 2, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """`RuntimeError` unless a reference can read the arguments; the C++ kernels check more. dtype: of `weights`."""
    given = (("images", images), ("steps", steps), ("maps", maps), ("weights", weights), ("thresholds", thresholds))
    check_stored(*given)
    for (name, tensor), fits, shape, wanted in zip(
        given,
        (
            images.dim() == 4,
            steps.dim() == 2 and steps.shape[1] == len(COLUMNS) and len(steps) > 0,
            maps.dim() == 2 and maps.shape[1] == map_columns and len(maps) > 0,
            weights.dim() == 1,
            thresholds.dim() == 1 or thresholds.shape[1:] == images.shape[:1],
        ),
        ("[N, C, H, W]", f"[S, {len(COLUMNS)}]", f"[M, {map_columns}]", "[numbers]", "[exits] or [exits, N]"),
        (images.dtype, torch.int64, torch.int64, dtype, torch.float32),
        strict=True,
    ):
        if not fits:
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}; expected {shape}")
        if tensor.dtype != wanted:
            raise RuntimeError(f"{name} is {tensor.dtype}; convert it with .to({wanted})")
        if name in ("steps", "maps") and not tensor.is_contiguous():
            raise RuntimeError(f"{name} is not contiguous; call .contiguous()")
    check_rule(criterion, rule, [len(thresholds) + 1, 9], images.device)
    if images.shape[1] != int(maps[0, 0]):
        raise RuntimeError(f"images has {images.shape[1]} channels; expected {int(maps[0, 0])}")
    if num_classes < 1:
        raise RuntimeError(f"num_classes = {num_classes}; expected 1 or more")
    last = steps[-1].tolist()
    if last[0] != Kind.STORE and (last[0] != Kind.EXIT or last[2] != len(thresholds)):
        raise RuntimeError("steps ends with no final exit")


def fake_answers(images: Tensor, num_classes: int, there: list[Named], anywhere: list[Named]) -> Answers:
    """Empty answers while a call is traced; there: arguments on the images' device, anywhere: those that may be on the
    CPU, wherever the images are.
    """
    check_fake(images, *there)
    check_fake(images, *((name, x) for name, x in anywhere if x is not None and x.device.type == "meta"))
    n = images.shape[0]  # which may be a symbol; len() would make a constant of it
    confidence = images.new_empty(n, dtype=torch.float32)
    return confidence.new_empty(n, num_classes), confidence, images.new_empty(n, dtype=torch.int64)
