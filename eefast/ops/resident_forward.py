"""A whole early-exit network on a batch: every sample runs alone to its exit, its maps stay in the cache."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import criteria
from .checks import check_fake, check_stored, refuse_gradient
from .library import define, namespace

COLUMNS = (
    *("kind", "source", "target", "residual", "relu", "kernel", "stride", "padding"),
    *("winograd", "weight", "packed", "section"),
)
"""What a row of `steps` says, see `resident_forward`."""

MAX_KERNEL = 128
"""The largest window of a convolution or a pooling."""


class Kind(IntEnum):
    """What a step does."""

    CONVOLUTION = 0
    AFFINE = 1
    MAX_POOL = 2
    EXIT = 3


define(
    "resident_forward(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor weights, Tensor packed,"
    " Tensor thresholds, str criterion, int num_classes, bool bfloat16=False, int threads=0,"
    " Tensor(a!)? seconds=None, Tensor? normalization=None) -> (Tensor, Tensor, Tensor)"
)
define(
    "resident_network(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor packed, Tensor thresholds,"
    " str criterion, int num_classes, bool bfloat16) -> (Tensor, int)"
)
define("instruction_set() -> str")


def reference(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, weights: Tensor, packed: Tensor, thresholds: Tensor,
    criterion: str, num_classes: int, bfloat16: bool = False, threads: int = 0, seconds: Tensor | None = None,
    normalization: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`resident_forward` in plain PyTorch: its oracle and its documentation. Every sample runs through all layers."""
    rule = criteria.get(criterion)
    _check(images, steps, maps, weights, thresholds, num_classes)
    n, images = len(images), _normalised(images.float(), normalization)
    results = images.new_empty(n, num_classes), images.new_empty(n), torch.full((n,), -1, device=images.device)
    channels, values = dict(enumerate(maps[:, 0].tolist())), {0: images}

    def run(
        kind: int, source: int, target: int, residual: int, relu: int, kernel: int, stride: int, padding: int,
        winograd: int, place: int, packed: int, section: int,
    ) -> None:  # fmt: skip
        x, inputs, outputs = (
            values[source],
            channels[source],
            num_classes + 1 if kind == Kind.EXIT else channels[target],
        )
        if kind in (Kind.CONVOLUTION, Kind.MAX_POOL) and not (
            0 < kernel <= MAX_KERNEL and 0 < stride <= MAX_KERNEL and 0 <= padding <= kernel
        ):
            raise RuntimeError("there is no kernel for this window")
        if kind == Kind.CONVOLUTION:
            weight, bias = _parts(weights, place, (outputs, inputs, kernel, kernel))
            x = F.conv2d(x, weight, bias, stride, padding) + (values[residual] if residual >= 0 else 0)
        elif kind == Kind.AFFINE:
            scale, shift = _parts(weights, place, (outputs,))
            x = x * scale[:, None, None] + shift[:, None, None]
        elif kind == Kind.MAX_POOL:
            x = F.max_pool2d(x, kernel, stride, padding)
        elif kind == Kind.EXIT and 0 <= target <= len(thresholds):
            x = x.flatten(1) if kernel else x.mean((2, 3))
            out = F.linear(x, *_parts(weights, place, (outputs, x.shape[1])))
            confidence, here = rule.confidence(out[:, :-1], out[:, -1]), results[2] < 0
            if target < len(thresholds):
                here = here & rule.leaves(confidence, thresholds[target])
            results[0][here], results[1][here], results[2][here] = out[here, :-1], confidence[here], target
            return
        else:
            raise RuntimeError("there is no such kind of step or exit")
        values[target] = x.relu() if relu else x

    with torch.autocast(images.device.type, enabled=False):
        for row, step in enumerate(steps.tolist()):
            try:
                run(*step)
            except KeyError as error:
                raise RuntimeError(f"steps[{row}] = {step}: there is no map {error}, or not yet") from None
            except (RuntimeError, ValueError, ArithmeticError) as error:
                raise RuntimeError(f"steps[{row}] = {step}: {error}") from error
    return results


def _check(images: Tensor, steps: Tensor, maps: Tensor, weights: Tensor, thresholds: Tensor, num_classes: int) -> None:
    """`RuntimeError` unless the reference can read the arguments; the C++ kernel checks more."""
    given = (("images", images), ("steps", steps), ("maps", maps), ("weights", weights), ("thresholds", thresholds))
    check_stored(*given)
    for (name, tensor), fits, shape, dtype in zip(
        given,
        (
            images.dim() == 4,
            steps.dim() == 2 and steps.shape[1] == len(COLUMNS) and len(steps) > 0,
            maps.dim() == 2 and maps.shape[1] == 2 and len(maps) > 0,
            weights.dim() == 1,
            thresholds.dim() == 1,
        ),
        ("[N, C, H, W]", f"[S, {len(COLUMNS)}]", "[M, 2]", "[numbers]", "[exits]"),
        (images.dtype, torch.int64, torch.int64, torch.float32, torch.float32),
        strict=True,
    ):
        if not fits:
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}; expected {shape}")
        if tensor.dtype != dtype:
            raise RuntimeError(f"{name} is {tensor.dtype}; convert it with .to({dtype})")
    if images.shape[1] != int(maps[0, 0]):
        raise RuntimeError(f"images has {images.shape[1]} channels; expected {int(maps[0, 0])}")
    if num_classes < 1:
        raise RuntimeError(f"num_classes = {num_classes}; expected 1 or more")
    last = steps[-1].tolist()
    if last[0] != Kind.EXIT or last[2] != len(thresholds):
        raise RuntimeError("steps ends with no final exit")


def _normalised(images: Tensor, normalization: Tensor | None) -> Tensor:
    if normalization is None:
        return images
    scale, shift = normalization[:, :, None, None]
    return images * scale + shift


def _parts(weights: Tensor, place: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A weight and the bias stored after it."""
    size = math.prod(shape)
    if place < 0 or place + size + shape[0] > len(weights):
        raise RuntimeError("its weights are outside of weights")
    return weights[place : place + size].view(shape), weights[place + size : place + size + shape[0]]


namespace.impl("resident_forward", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("eefast::resident_forward")
def _fake(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, weights: Tensor, packed: Tensor, thresholds: Tensor,
    criterion: str, num_classes: int, bfloat16: bool = False, threads: int = 0, seconds: Tensor | None = None,
    normalization: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_fake(images, ("packed", packed), ("thresholds", thresholds), ("normalization", normalization))
    # These may be on the CPU, wherever the images are.
    others = (("steps", steps), ("maps", maps), ("groups", groups), ("weights", weights), ("seconds", seconds))
    check_fake(images, *((name, x) for name, x in others if x is not None and x.device.type == "meta"))
    n = images.shape[0]  # which may be a symbol; len() would make a constant of it
    confidence = images.new_empty(n, dtype=torch.float32)
    return confidence.new_empty(n, num_classes), confidence, images.new_empty(n, dtype=torch.int64)


def run(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, weights: Tensor, packed: Tensor, thresholds: Tensor,
    criterion: str, num_classes: int, bfloat16: bool = False, threads: int = 0, seconds: Tensor | None = None,
    normalization: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Answer every image by the first exit whose rule it meets.

    images: [N, C, H, W], any strides: on the CPU float32, on CUDA also float16, bfloat16 or uint8.
    steps: [S, 12] int64, one row per step, see `COLUMNS`. The source, target and residual of a step are maps (residual
        -1: none), the target of an exit is its number. kernel of an exit: 1 flattens the map, 0 takes its mean.
        winograd: 0 for direct convolution, else the side of the tiles. weight, packed: where the step's weights begin.
        Rows come in the order of their sections; those that read a map of the section before come first.
    maps: [M, 2] int64, channels and section of every map; map 0 holds the image, its section is -1.
    groups: [sections] int64, how many samples go through a section together.
    weights, packed: float32, all weights: for the reference back to back, each with its bias; `packed` in the
        order in which the kernels read them, see `eefast.planning.weight_order`.
    thresholds: [n] float32; criterion: name of an exit rule in `eefast.criteria`.
    bfloat16: whether maps and packed weights are bfloat16 instead of, on the CPU, float32 and, on CUDA, float16; sums
        are float32 always.
    threads: how many work on the batch; 0: as many as `torch.get_num_threads()` says. 1 uses the calling thread alone.
    seconds: [sections] float64 or None; the processor time spent in each section is added, with threads=1 only.
    normalization: [2, C] float32 or None: scale and shift of the images' channels. On CUDA only.

    On CUDA images, packed and thresholds are on the device, the tables on the CPU; winograd and groups are 0 and 1,
    threads and seconds have no meaning. At most 64 channels, 32×32 pixels and 256 classes.

    Returns logits [N, K] float32, confidence [N] float32, exit index [N] int64. The answer of an image is the same, bit
    for bit, in every batch, at every place, with every number of threads.

    Inference only. Raises `RuntimeError` where shapes, dtypes or steps do not fit. Plain PyTorch runs it where the C++
    kernels are missing, then steps["winograd"], groups, packed, bfloat16, threads and seconds have no effect.
    """
    refuse_gradient("images", images, "resident_forward")
    return torch.ops.eefast.resident_forward.default(
        images, steps, maps, groups, weights, packed, thresholds, criterion, num_classes, bfloat16, threads, seconds,
        normalization,
    )  # fmt: skip


def resident_network(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, packed: Tensor, thresholds: Tensor, criterion: str,
    num_classes: int, bfloat16: bool,
) -> Tensor:  # fmt: skip
    """The network as the CUDA kernel takes it, in bytes; raises `RuntimeError` where that kernel lacks a step."""
    return torch.ops.eefast.resident_network.default(
        images, steps, maps, groups, packed, thresholds, criterion, num_classes, bfloat16
    )[0]


def resident_shared_memory(*arguments: Any) -> int:
    """Bytes of shared memory that a block of the CUDA kernel needs; arguments and errors as `resident_network`."""
    return torch.ops.eefast.resident_network.default(*arguments)[1]  # type: ignore[no-any-return]


def cuda_missing() -> str | None:
    """None where the C++ library has CUDA kernels, else why it has none."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("eefast::resident_forward", "CUDA"):
        return None
    return "not built; install with a CUDA toolkit (nvcc)"


def instruction_set() -> str:
    """The vector instructions of the C++ kernels here: "portable", "avx2", "avx512" or "avx512_bf16"; else "none".

    Raises `RuntimeError` where the variable EEFAST_ISA holds no such name.
    """
    loaded = torch._C._dispatch_has_kernel_for_dispatch_key("eefast::instruction_set", "CompositeExplicitAutograd")
    return torch.ops.eefast.instruction_set.default() if loaded else "none"
