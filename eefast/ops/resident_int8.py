"""A whole quantised network on a batch: every sample runs alone to its exit on maps of integers 0 … 255."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modules import integer_maps
from .checks import Named, check_stored, refuse_gradient
from .library import define, namespace
from .resident_steps import Activation, Answers, Kind, Step, answers, check_tables, fake_answers, parts, windows

define(
    "resident_int8(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor weights, Tensor packed,"
    " Tensor thresholds, Tensor image, str criterion, int num_classes, int threads=0, Tensor(a!)? seconds=None,"
    " Tensor? rule=None, Tensor(b!)? features=None, Tensor? before=None) -> (Tensor, Tensor, Tensor)"
)
define("int8_instruction_set() -> str")


def reference(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, weights: Tensor, packed: Tensor, thresholds: Tensor,
    image: Tensor, criterion: str, num_classes: int, threads: int = 0, seconds: Tensor | None = None,
    rule: Tensor | None = None, features: Tensor | None = None, before: Tensor | None = None,
) -> Answers:  # fmt: skip
    """`resident_int8` in plain PyTorch: its oracle and its documentation. Every sample runs through all layers."""
    _check(images, steps, maps, weights, thresholds, image, num_classes, criterion, rule)
    fills: list[Tensor | int] = [integer_maps.image_fill(image[1]), *maps[1:, 2].tolist()]

    def compute(step: Step, q: Tensor, residual: Tensor | None, outputs: int) -> Tensor:
        window = windows(step)
        if not in_integers(step):
            raise RuntimeError(NOT_IN_INTEGERS)
        if step.kind == Kind.MAX_POOL:
            return integer_maps.max_pool(q, *window)
        if step.kind == Kind.AFFINE:
            return integer_maps.affine(q, *parts(weights, step.weight, (outputs,), (outputs,)))
        if step.kind == Kind.EXIT:
            pooled = q.flatten(1) if step.kernel else q.mean((2, 3))
            return F.linear(
                pooled, *(p.float() for p in parts(weights, step.weight, (outputs, pooled.shape[1]), (outputs,)))
            )
        sides = {1: (3, 4), 2: (4, 4)}.get(step.winograd, window[0])
        shapes = (outputs, q.shape[1], *sides), (4 if step.winograd == 2 else 2, outputs), (outputs,), (1,)
        weight, bias, scale, ratio = parts(weights, step.weight, *shapes)
        if step.winograd:
            _check_winograd(step, fills[step.source])
            sums = integer_maps.winograd_sums(q, weight, bias, step.winograd)
        else:
            sums = integer_maps.convolution_sums(q, weight, bias[0], *window[1:], fills[step.source])
        return integer_maps.requantized(sums, scale, residual, ratio.float())

    integers = images.float() if images.dtype == torch.uint8 else integer_maps.image_integers(images, *image)
    return answers(integers, steps, maps, thresholds, criterion, num_classes, compute, rule, features, before)


IN_INTEGERS = (Kind.CONVOLUTION, Kind.AFFINE, Kind.MAX_POOL, Kind.EXIT, Kind.LOAD, Kind.STORE)
NOT_IN_INTEGERS = "INT8 has no such step"


def in_integers(step: Step) -> bool:
    """Whether INT8 has a step of this kind, with this activation and these groups."""
    plain = step.activation in (Activation.NONE, Activation.RELU) and step.groups == 1
    return plain and step.kind in IN_INTEGERS


def _check(
    images: Tensor, steps: Tensor, maps: Tensor, weights: Tensor, thresholds: Tensor, image: Tensor, num_classes: int,
    criterion: str, rule: Tensor | None,
) -> None:  # fmt: skip
    """`RuntimeError` unless the reference can read the arguments; the C++ kernel checks more."""
    more = num_classes, criterion, rule
    check_tables(images, steps, maps, weights, thresholds, *more, map_columns=3, dtype=torch.float64)
    check_stored(("image", image))
    if images.dtype not in (torch.float32, torch.uint8):
        raise RuntimeError(f"images is {images.dtype}; convert it with .to(torch.float32)")
    if image.shape != (2, images.shape[1]):
        raise RuntimeError(f"image has shape {list(image.shape)}; expected [2, {images.shape[1]}]")
    if image.dtype != torch.float32:
        raise RuntimeError(f"image is {image.dtype}; convert it with .to(torch.float32)")


def _check_winograd(step: Step, fill: Tensor | int) -> None:
    window = step.kernel, step.stride, step.padding
    if step.winograd not in (1, 2) or window != (3, 1, 1) or step.row or step.source == 0 or fill != 0:
        raise RuntimeError("there is no Winograd convolution for this window and this source")


namespace.impl("resident_int8", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("eefast::resident_int8")
def _fake(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, weights: Tensor, packed: Tensor, thresholds: Tensor,
    image: Tensor, criterion: str, num_classes: int, threads: int = 0, seconds: Tensor | None = None,
    rule: Tensor | None = None, features: Tensor | None = None, before: Tensor | None = None,
) -> Answers:  # fmt: skip
    tables: list[Named] = [("steps", steps), ("maps", maps), ("groups", groups), ("weights", weights)]
    there: list[Named] = [("packed", packed), ("thresholds", thresholds), ("image", image), ("rule", rule)]
    there.append(("before", before))
    return fake_answers(images, num_classes, there, [*tables, ("seconds", seconds), ("features", features)])


def run(
    images: Tensor, steps: Tensor, maps: Tensor, groups: Tensor, weights: Tensor, packed: Tensor, thresholds: Tensor,
    image: Tensor, criterion: str, num_classes: int, threads: int = 0, seconds: Tensor | None = None,
    rule: Tensor | None = None, features: Tensor | None = None, before: Tensor | None = None,
) -> Answers:  # fmt: skip
    """Answer every image by the first exit whose rule it meets, in integer arithmetic on the CPU.

    images: [N, C, H, W], any strides: float32, or uint8, whose pixels are the integers of map 0.
    steps: [S, 15] int64, one row per step, as of `resident_forward`, but no MEAN, SCALE and JOIN, groups 1 and no
        activation but ReLU, which says what the network had; every map is limited to 0 … 255. winograd: 0 for direct
        sums, 1 for F(2, 3) along x, 2 for F(2×2, 3×3), which take kernel 3, stride 1, padding 1 and a source of zero
        point 0 other than the image.
    maps: [M, 3] int64, channels, section and zero point of every map; map 0 holds the image, its section is -1, its
        zero point has no meaning.
    groups: [sections] int64, how many samples go through a section together.
    weights: float64, for the reference, back to back. Convolution: weight [O, C, k, k] or, with winograd 1,
        [O, C, 3, 4], with 2, [O, C, 4, 4], in windows of one row [O, C, 1, k]; bias [2, O] of even and odd columns or,
        with 2, [4, O] of these in even rows, then in odd rows; scale [O], ratio [1] of the residual. Affine: scale and
        shift [C]. Exit: rows [K + 1, F] and bias [K + 1] of the logits and of the confidence, in which the scale and
        the zero point of its map are included. Max pooling: nothing.
    packed: float32, the same in the order in which the kernels read it, see `eefast.planning.weight_order`.
    thresholds: [n] float32, or [n, N], those of each image, where NaN lets it exit, whatever its confidence.
    criterion: name of an exit rule in `eefast.criteria`.
    image: [2, C] float32, multiplier and shift that make integers of float pixels; of no meaning where a LOAD reads
        features, which are uint8.
    features: as of `resident_forward`, uint8, the integers of the map; before: as there.
    threads: how many work on the batch; 0: as many as `torch.get_num_threads()` says. 1 uses the calling thread alone.
    seconds: [sections] float64 or None; the processor time spent in each section is added, with threads=1 only.
    rule: [n + 1, 9] float32 with the criterion "carried", else None, see `eefast.criteria.carry`.

    Returns logits [N, K] float32, confidence [N] float32, exit index [N] int64. The maps are the same, bit for bit, on
    every machine, the answer of an image in every batch, at every place, with every number of threads. An image with a
    NaN has NaN as logits and confidence and exits last; where there is a STORE, its exit index is -1.

    Inference only. Raises `RuntimeError` where shapes, dtypes or steps do not fit. Plain PyTorch runs it where the C++
    kernels are missing, then groups, packed, threads and seconds have no effect. The arithmetic: `integer_maps`.
    """
    refuse_gradient("images", images, "resident_int8")
    return torch.ops.eefast.resident_int8.default(
        images, steps, maps, groups, weights, packed, thresholds, image, criterion, num_classes, threads, seconds,
        rule, features, before,
    )  # fmt: skip


def int8_instruction_set() -> str:
    """What the INT8 kernels run on here: "avx512_vnni", "avx_vnni", "avx2" or "portable"; "none" without C++ kernels.

    Raises `RuntimeError` where the variable EEFAST_ISA holds an unknown name.
    """
    loaded = torch._C._dispatch_has_kernel_for_dispatch_key("eefast::int8_instruction_set", "CompositeExplicitAutograd")
    return torch.ops.eefast.int8_instruction_set.default() if loaded else "none"
