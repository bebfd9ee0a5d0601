"""A trained network and calibration images → the same network in integers: `eefast.quantize`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..modules.contexts import isolated
from ..modules.copies import working_copy
from ..planning.rows import network_on_maps
from ..qdq import QdqStage
from ..quantized import QuantizedStage
from ..thresholds.calibration import calibrate
from ..thresholds.evaluation import exit_quality
from ..thresholds.outputs import answered, collect, outcome
from .assembly import assembled, qdq_network
from .float_layers import FloatStage, NoIntegerStepError, float_stages
from .integer_steps import quantized_stage
from .qdq_ranges import qdq_stages
from .ranges import observe
from .winograd_choice import Choice, Size, chosen, coarsest, merged, winograd_layers

log = logging.getLogger("eefast")

LEAST_IMAGES = 16
TRIAL_IMAGES = 64
"""Images on which the choice of algorithms is tried."""
MOST_PIXELS = 2**21
"""Of all channels of a batch, whose maps must fit the memory."""


def quantize(
    net: EarlyExitNet,
    calibration_images: Tensor,
    labels: Tensor | None = None,
    *,
    percentile: float = 99.99,
    winograd: Literal["auto", 0, 1, 2] | bool = "auto",
    min_accuracy: float | None = None,
    max_accuracy_drop: float | None = None,
    max_cost: float | None = None,
) -> EarlyExitNet:
    """The network in integers of eight bits, by post-training static quantisation; `net` is not changed.

    calibration_images: [N, C, H, W] or, of a network on rows, [N, C, L], at least 16, better some hundreds, as the
        network takes them: held-out training images, never test images. The ranges of all maps are taken from them.
    labels: [N] int64, the classes of these images; with them the thresholds are chosen again. Without, they are those
        of `net`, of which the quantised network warns once.
    percentile: 90 … 100, of each map's values on these images, the largest that eight bits hold; beyond is cut off.
    winograd: how 3 × 3 convolutions of stride 1 are computed. 0 or False: directly; 1 or True: by F(2, 3) along x, in
        24 instead of 36 products, with one bit less; 2: by F(2×2, 3×3), in 16, with two bits less; "auto": at each map
        size by the last of these with which the logits keep a bound on their error, see `winograd_choice`.
    min_accuracy, max_accuracy_drop, max_cost: at most one of them, 0 … 1, with labels only: what the thresholds keep,
        as `eefast calibrate`. By default the mean cost that `net` has on these images.

    Weights are signed, symmetric, with one scale per output channel; maps unsigned, with one scale each and, where they
    may be negative, a zero point. Image integers are the pixels themselves where the network has a normalization. The
    heads' linears stay float32. The result is in eval mode, on the device of `net`; its forward pass computes in exact
    integers, and costs count as in `net`. It is not trained further.

    Where a stage has layers that the resident engine lacks in integers, all stages become `eefast.qdq.QdqStage`: their
    convolutions of maps read and return integers, but for those that lose too much, and other libraries run them, see
    `stages` of `eefast.accelerate`; everything else stays float32, and so do the heads. `winograd` is for the others.

    Raises `TypeError` or `ValueError` for too few images, images with NaN or infinities, constant ones, labels that do
    not fit, and for modules that cannot be quantised, with their path.
    """
    _check_options(net, labels, percentile, winograd, min_accuracy, max_accuracy_drop, max_cost)
    images = _checked_images(net, calibration_images)
    targets = None if labels is None else _checked_labels(net, labels, len(images))
    device = next(net.parameters()).device
    with isolated(torch.device("cpu")):
        net = working_copy(net).cpu().float().eval()
        images = net.prepare(images if images.dtype == torch.uint8 else images.float())
        batches = images.split(max(1, min(32, MOST_PIXELS // prod(net.input_shape))))
        rows = len(net.input_shape) == 2
        on_maps = network_on_maps(net) if rows else net
        try:
            layers = float_stages(on_maps)
        except NoIntegerStepError as reason:
            if rows:
                raise
            log.info("the stages in INT8 are for other libraries, since %s", reason.__cause__)
            made = qdq_network(net, qdq_stages(net, batches, percentile))
        else:
            maps = [batch.unsqueeze(2) for batch in batches] if rows else batches
            stages = _in_integers(on_maps, layers, maps, percentile, winograd)
            made = assembled(net, layers, stages)
        if targets is not None and made.num_exits:
            labelled = list(zip(batches, targets.split(len(batches[0])), strict=True))
            _recalibrate(made, net, labelled, min_accuracy, max_accuracy_drop, max_cost)
    return made.to(device)


def _in_integers(
    net: EarlyExitNet, layers: Sequence[FloatStage], batches: Sequence[Tensor], percentile: float, winograd: str | int
) -> list[QuantizedStage]:
    """The stages of a network in integers throughout; layers: of `net`; batches: of prepared images."""
    ranges, image = observe(net, layers, batches, percentile)

    def stages(choice: Choice) -> list[QuantizedStage]:
        excess = merged({size: found(used)[size] for size, used in choice.items() if used})
        return [
            quantized_stage(stage, r, image, excess.get(i, {}))
            for i, (stage, r) in enumerate(zip(layers, ranges, strict=True))
        ]

    @cache
    def found(allowed: int) -> dict[Size, dict[int, dict[int, Tensor]]]:
        return winograd_layers(layers, ranges, stages({}), batches, allowed) if allowed else {}

    allowed = 2 if winograd == "auto" else int(winograd)
    choice = {size: coarsest(size, allowed) for size in found(allowed)}
    if winograd == "auto":
        trial = torch.cat([*batches])[:TRIAL_IMAGES].split(len(batches[0]))
        choice = chosen(choice, lambda c: assembled(net, layers, stages(c)), net, trial)
    return stages(choice)


def _recalibrate(
    made: EarlyExitNet,
    net: EarlyExitNet,
    batches: Sequence[tuple[Tensor, Tensor]],
    min_accuracy: float | None,
    max_accuracy_drop: float | None,
    max_cost: float | None,
) -> None:
    """Give `made` the best thresholds within the bound on its outputs for batches of images and labels."""
    outputs, labels = collect(made, batches)
    outputs = answered(outputs, made)
    name = made.criterion.name
    if max_accuracy_drop is not None:
        min_accuracy = exit_quality(outputs[-1:], labels)[0].accuracy - max_accuracy_drop
    elif min_accuracy is None and max_cost is None:
        before, _ = collect(net, batches)
        max_cost = outcome(answered(before, net), labels, net.cost, name, net.thresholds.tolist())[1]
    found = calibrate(outputs, labels, made.cost, name, min_accuracy=min_accuracy, max_cost=max_cost)
    made.thresholds.copy_(torch.tensor(found.thresholds, dtype=torch.float32))
    if made.config is not None:
        made.config["float_thresholds"] = {}


def _check_options(
    net: EarlyExitNet, labels: Tensor | None, percentile: float, winograd: object, *bounds: float | None
) -> None:
    if not isinstance(net, EarlyExitNet):
        raise TypeError(f"net is a {type(net).__name__}; give an eefast.EarlyExitNet, see eefast.zoo and eefast.attach")
    if any(isinstance(module, QuantizedStage | QdqStage) for module in net.modules()):
        raise ValueError("net is quantised already; give the float network that it was made of")
    if not 90 <= percentile <= 100:
        raise ValueError(f"percentile={percentile} must be in 90 … 100; 99.99 is usual")
    if len(net.input_shape) == 2 and "carry" in (net.config or {}):
        raise ValueError(
            f"net carries features from its last early exit (carry={net.config['carry']!r}) on rows {net.input_shape}, "  # type: ignore[index]
            "for which there is no step in INT8; keep it in float32, or quantise the network without carry"
        )
    if winograd not in ("auto", 0, 1, 2):
        raise ValueError(f'winograd={winograd!r} must be "auto", 0, 1 or 2')
    names = ("min_accuracy", "max_accuracy_drop", "max_cost")
    given = {name: value for name, value in zip(names, bounds, strict=True) if value is not None}
    if len(given) > 1:
        raise ValueError(f"{', '.join(f'{k}={v}' for k, v in given.items())}: give one of them")
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be in 0 … 1")
        if labels is None:
            raise ValueError(f"{name}={value} needs labels, the classes of the calibration images")


def _checked_images(net: EarlyExitNet, images: Tensor) -> Tensor:
    """The images on the CPU, all of them finite numbers and not all of them constant."""
    if isinstance(images, Tensor) and images.is_floating_point():
        images = images.detach().to(next(net.parameters()))  # any device and float dtype is right
    elif isinstance(images, Tensor):
        images = images.detach().to(next(net.parameters()).device)
    net.check_images(images)
    if len(images) < LEAST_IMAGES:
        raise ValueError(
            f"calibration_images are {len(images)}; give at least {LEAST_IMAGES} held-out training images, some "
            "hundreds are better"
        )
    images = images.cpu()
    if images.is_floating_point() and not images.isfinite().all():
        broken = int((~images.isfinite()).flatten(1).any(1).sum())
        raise ValueError(f"{broken} of the calibration_images hold NaN or infinite numbers; leave these images out")
    if not (images.flatten(1) != images.flatten(1)[:, :1]).any():
        raise ValueError("calibration_images are constant, each of one number; give images like those to be classified")
    return images


def _checked_labels(net: EarlyExitNet, labels: Tensor, images: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels are {kind}; give a tensor of integers [N], the classes of the images")
    if labels.shape != (images,):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; {images} calibration_images need [{images}]")
    labels = labels.detach().cpu().long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= net.num_classes:
        raise ValueError(f"labels reach from {low} to {high}, but the network has {net.num_classes} classes")
    return labels
