"""A whole early-exit network on a batch: every sample runs alone to its exit, its maps stay in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import Named, refuse_gradient
from .library import define, namespace
from .resident_steps import Answers, Kind, Step, activated, answers, check_tables, fake_answers, joined, parts, windows

define(
    "resident_forward(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor weights, Tensor packed,"
    " Tensor thresholds, str criterion, int num_classes, bool bfloat16=False, int threads=0,"
    " Tensor(a!)? seconds=None, Tensor? normalization=None, Tensor? rule=None, Tensor(b!)? features=None,"
    " Tensor? before=None) -> (Tensor, Tensor, Tensor)"
)
define(
    "resident_network(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor packed, Tensor thresholds,"
    " str criterion, int num_classes, bool bfloat16, Tensor? rule=None) -> (Tensor, int)"
)
define("instruction_set() -> str")


def reference(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, weights: Tensor, packed: Tensor, thresholds: Tensor,
    criterion: str, num_classes: int, bfloat16: bool = False, threads: int = 0, seconds: Tensor | None = None,
    normalization: Tensor | None = None, rule: Tensor | None = None, features: Tensor | None = None,
    before: Tensor | None = None,
) -> Answers:  # fmt: skip
    """`resident_forward` in plain PyTorch: its oracle and its documentation. Every sample runs through all layers."""
    check_tables(images, steps, maps, weights, thresholds, num_classes, criterion, rule)

    def compute(step: Step, x: Tensor, residual: Tensor | None, outputs: int) -> Tensor:
        window = windows(step)
        if step.kind == Kind.MAX_POOL:
            x = F.max_pool2d(x, *window)
        elif step.kind == Kind.CONVOLUTION:
            shape = (outputs, x.shape[1] // step.groups, *window[0])
            weight, bias = parts(weights, step.weight, shape, (outputs,))
            x = F.conv2d(x, weight, bias, *window[1:], groups=step.groups) + (0 if residual is None else residual)
        elif step.kind == Kind.AFFINE:
            scale, shift = parts(weights, step.weight, (outputs, 1, 1), (outputs, 1, 1))
            x = x[:, :outputs] * scale + shift
        elif step.kind == Kind.MEAN:
            x = x.mean((2, 3), keepdim=True)
        elif step.kind == Kind.SCALE:
            assert residual is not None
            x = x * residual
        elif step.kind == Kind.JOIN:
            return joined(x, residual, step.channel, outputs)
        else:
            x = x.flatten(1) if step.kernel else x.mean((2, 3))
            return F.linear(x, *parts(weights, step.weight, (outputs, x.shape[1]), (outputs,)))
        return activated(x, step.activation)

    image = _normalised(images.float(), normalization)
    return answers(image, steps, maps, thresholds, criterion, num_classes, compute, rule, features, before)


def _normalised(images: Tensor, normalization: Tensor | None) -> Tensor:
    if normalization is None:
        return images
    scale, shift = normalization[:, :, None, None]
    return images * scale + shift


namespace.impl("resident_forward", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("eefast::resident_forward")
def _fake(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, weights: Tensor, packed: Tensor, thresholds: Tensor,
    criterion: str, num_classes: int, bfloat16: bool = False, threads: int = 0, seconds: Tensor | None = None,
    normalization: Tensor | None = None, rule: Tensor | None = None, features: Tensor | None = None,
    before: Tensor | None = None,
) -> Answers:  # fmt: skip
    there: list[Named] = [("packed", packed), ("thresholds", thresholds), ("normalization", normalization)]
    there += [("rule", rule), ("features", features), ("before", before)]
    tables: list[Named] = [("steps", steps), ("maps", maps), ("groups", groups), ("weights", weights)]
    return fake_answers(images, num_classes, there, [*tables, ("seconds", seconds)])


def run(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, weights: Tensor, packed: Tensor, thresholds: Tensor,
    criterion: str, num_classes: int, bfloat16: bool = False, threads: int = 0, seconds: Tensor | None = None,
    normalization: Tensor | None = None, rule: Tensor | None = None, features: Tensor | None = None,
    before: Tensor | None = None,
) -> Answers:  # fmt: skip
    """Answer every image by the first exit whose rule it meets.

    images: [N, C, H, W], any strides: on the CPU float32, on CUDA also float16, bfloat16 or uint8.
    steps: [S, 15] int64, one row per step, see `eefast.ops.resident_steps.Step`. The source, target and residual of a
        step are maps (residual -1: none), the target of an exit is its number. CONVOLUTION, with `groups` as
        `nn.Conv2d` has them, adds its residual; AFFINE reads as many channels as its target has; MEAN makes a map of
        one pixel; SCALE multiplies by its residual, such a map; JOIN writes its source into the target from `channel`
        on. LOAD, the first step of a program, whose images are features, writes these into the first channels of its
        target, and nothing else reads map 0; STORE, the last step of a program without a final exit, whose target is
        -1, writes the first channels of its source to `features`, of samples that no exit has answered. row: 1 where a
        window is one row high and pads no rows, else 0. activation: an `Activation`, applied last, not to MAX_POOL,
        EXIT, JOIN, LOAD and STORE. kernel of an exit: 1 flattens the map, 0 takes its mean. winograd: 0 for direct
        convolution, else the side of the tiles. weight, packed: where the step's weights begin. Rows come in the order
        of their sections; those that read a map of the section before come first.
    maps: [M, 2] int64, channels and section of every map; map 0 holds the image, its section is -1.
    groups: [sections] int64, how many samples go through a section together.
    weights, packed: float32, all weights: for the reference back to back, each with its bias; `packed` in the
        order in which the kernels read them, see `eefast.planning.weight_order`.
    thresholds: [n] float32, or [n, N], those of each image, where NaN lets it exit, whatever its confidence.
    criterion: name of an exit rule in `eefast.criteria`.
    bfloat16: whether maps and packed weights are bfloat16 instead of, on the CPU, float32 and, on CUDA, float16; sums
        are float32 always.
    threads: how many work on the batch; 0: as many as `torch.get_num_threads()` says. 1 uses the calling thread alone.
    seconds: [sections] float64 or None; the processor time spent in each section is added, with threads=1 only.
    normalization: [2, C] float32 or None: scale and shift of the images' channels. On CUDA only.
    rule: [n + 1, 9] float32 with the criterion "carried", else None, see `eefast.criteria.carry`.
    features: [N, C, H, W] float32, channels-last, or None: where a STORE writes the features of the samples that reach
        it, from the front, in the order in which they do; other rows keep what they hold. On the CPU only.
    before: [N, K + 1] float32, logits and confidence of the exit before the first one here, which a rule reads, or
        None. On the CPU only.

    On CUDA images, packed, thresholds and rule are on the device, the tables on the CPU; winograd and groups are 0 and
    1, threads and seconds have no meaning. At most 64 channels, 32×32 pixels and 256 classes; no MEAN, SCALE, JOIN,
    LOAD and STORE, no grouped convolution, no activation but ReLU.

    Returns logits [N, K] float32, confidence [N] float32, exit index [N] int64. Samples that a STORE wrote have the
    answer of the last exit, and n + their row of `features` as exit index. The answer of an image is the same, bit
    for bit, in every batch, at every place, with every number of threads.

    Inference only. Raises `RuntimeError` where shapes, dtypes or steps do not fit. Plain PyTorch runs it where the C++
    kernels are missing, then steps["winograd"], groups, packed, bfloat16, threads and seconds have no effect.
    """
    refuse_gradient("images", images, "resident_forward")
    return torch.ops.eefast.resident_forward.default(
        images, steps, maps, groups, weights, packed, thresholds, criterion, num_classes, bfloat16, threads, seconds,
        normalization, rule, features, before,
    )  # fmt: skip


def resident_network(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, packed: Tensor, thresholds: Tensor, criterion: str,
    num_classes: int, bfloat16: bool, rule: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The network as the CUDA kernel takes it, in bytes; raises `RuntimeError` where that kernel lacks a step."""
    return torch.ops.eefast.resident_network.default(
        images, steps, maps, groups, packed, thresholds, criterion, num_classes, bfloat16, rule
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
