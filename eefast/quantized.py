"""The stages of a quantised network: features or images → features, in between maps of integers 0 … 255."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .heads import ExitHead, channels_read
from .modules import integer_maps

REFUSED = (
    "a quantised network is not trained and has no gradients: train the float network, then quantise that again with "
    "eefast.quantize; call .eval() or torch.no_grad() where only answers are wanted"
)

ALGORITHMS = ("direct", "F(2,3)", "F(2×2)")
"""Names of the ways to compute a convolution, by `QuantizedConvolution.winograd`."""


class KeepsDtypes(nn.Module):
    """A module whose buffers keep their dtypes, whatever `.half()` and the like ask; devices change as asked."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


class QuantizedConvolution(KeepsDtypes):
    """A convolution between maps, with a residual or without; ReLU is the limit at 0.

    source, residual: numbers of the values that it reads; residual -1: none.
    relu: whether the convolution had one; the output's zero point is 0 then.
    winograd: 0 for direct sums, 1 for F(2, 3) along x, 2 for F(2×2, 3×3).
    row: whether the window is one row high and pads no rows.

    Buffers: weight int8 [O, C, k, k], of one row [O, C, 1, k], or [O, C, 3, 4] or [O, C, 4, 4]; bias int32 [2, O] of
    even and odd columns, the same for direct sums, or [4, O] of these in even rows, then in odd rows; scale float32 [O]
    of the sums; ratio float32 [] of the residual. See `modules.integer_maps`.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    ratio: Tensor

    def __init__(
        self,
        source: int,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        *,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        relu: bool = False,
        residual: int = -1,
        ratio: Tensor | float = 0.0,
        winograd: int = 0,
        row: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.residual = source, residual
        self.kernel, self.stride, self.padding, self.row = kernel, stride, padding, row
        self.relu, self.winograd = relu, winograd
        self.register_buffer("weight", weight.to(torch.int8, memory_format=torch.contiguous_format))
        self.register_buffer("bias", bias.to(torch.int32))
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("ratio", torch.as_tensor(ratio, dtype=torch.float32))

    def forward(self, integers: Tensor, residual: Tensor | None = None, fill: Tensor | int = 0) -> Tensor:
        if self.winograd:
            sums = integer_maps.winograd_sums(integers, self.weight, self.bias, self.winograd)
        else:
            padding = 0 if self.row else self.padding, self.padding
            sums = integer_maps.convolution_sums(integers, self.weight, self.bias[0], self.stride, padding, fill)
        return integer_maps.requantized(sums, self.scale, residual, self.ratio)

    def extra_repr(self) -> str:
        shape = f"{self.weight.shape[1]}, {len(self.weight)}, kernel={self.kernel}"
        more = f", stride={self.stride}, padding={self.padding}, source={self.source}" + ", row" * self.row
        more += f", residual={self.residual}" if self.residual >= 0 else ""
        return shape + more + ", relu" * self.relu + (f", winograd={self.winograd}" if self.winograd else "")


class QuantizedAffine(KeepsDtypes):
    """Scale and shift float32 [C] per channel, of a BatchNorm or a ReLU that no convolution includes."""

    scale: Tensor
    shift: Tensor

    def __init__(self, source: int, scale: Tensor, shift: Tensor, *, relu: bool = False) -> None:
        super().__init__()
        self.source, self.residual, self.relu = source, -1, relu
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("shift", shift.to(torch.float32))

    def forward(self, integers: Tensor, residual: None = None, fill: Tensor | int = 0) -> Tensor:
        return integer_maps.affine(integers, self.scale, self.shift)

    def extra_repr(self) -> str:
        return f"{len(self.scale)}, source={self.source}" + ", relu" * self.relu


class QuantizedMaxPool(KeepsDtypes):
    """The largest integer of every window; scale and zero point of its source."""

    def __init__(self, source: int, kernel: int, stride: int, padding: int = 0, row: bool = False) -> None:
        super().__init__()
        self.source, self.residual = source, -1
        self.kernel, self.stride, self.padding, self.row = kernel, stride, padding, row

    def forward(self, integers: Tensor, residual: None = None, fill: Tensor | int = 0) -> Tensor:
        rows, above = (1, 0) if self.row else (self.kernel, self.padding)
        return integer_maps.max_pool(integers, (rows, self.kernel), self.stride, (above, self.padding))

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}, source={self.source}"


Step = QuantizedConvolution | QuantizedAffine | QuantizedMaxPool


class QuantizedStage(KeepsDtypes):
    """Float features, or images, → float features [N, C, H, W], or of rows [N, C, L], by steps on maps of integers.

    Values are numbered within the stage: 0 is its input, step i writes value i + 1.
    zeros: the zero point of every value, an integer; value 0 of images has one per channel instead.
    output: the value that it returns.
    A map stands for (integer - zero) · scale. That goes to the next stage, in the input's dtype. From float32, float64
    and float16 the next stage gets the integers back exactly; bfloat16 holds them to 1 of 255.

    Buffers: scales float64 [values]; image float32 [2, C], multiplier and shift of images, or None for features.
    """

    scales: Tensor
    image: Tensor | None

    def __init__(
        self,
        steps: Sequence[Step],
        scales: Sequence[float] | Tensor,
        zeros: Sequence[int],
        *,
        output: int,
        image: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.zeros = tuple(zeros)
        self.output = output
        self.register_buffer("scales", torch.as_tensor(scales, dtype=torch.float64))
        self.register_buffer("image", None if image is None else image.to(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise RuntimeError(REFUSED)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            maps = x.unsqueeze(2) if x.dim() == 3 else x
            found = self.features(self.integers(self.input_integers(maps), all_values=False)).to(x.dtype)
            return found.squeeze(2) if x.dim() == 3 else found

    def input_integers(self, x: Tensor) -> Tensor:
        """The integers of images or features [N, C, H, W]."""
        if self.image is not None:
            return integer_maps.image_integers(x, *self.image)
        return (x.float() / self.scales[0]).round() + self.zeros[0]

    def integers(self, q: Tensor, all_values: bool = True) -> dict[int, Tensor]:
        """Values by their numbers, of the input's integers float32 [N, C, H, W].

        all_values: False drops those that no later step reads, so that they take no memory.
        """
        values = {0: q}
        steps: list[Any] = list(self.steps)
        last_use = {value: i for i, step in enumerate(steps) for value in (step.source, step.residual)}
        for i, step in enumerate(steps):
            residual = values[step.residual] if step.residual >= 0 else None
            values[i + 1] = step(values[step.source], residual, self.fill(step.source))
            if not all_values:
                values = {v: q for v, q in values.items() if v == self.output or last_use.get(v, -1) > i}
        return values

    def features(self, values: dict[int, Tensor]) -> Tensor:
        """What the returned one of all values stands for, float32, contiguous: heads then sum in one order always."""
        return ((values[self.output] - self.zeros[self.output]) * self.scales[self.output]).contiguous()

    def fill(self, value: int) -> Tensor | int:
        """What pixels outside of a map hold: its zero point, or one number per channel [C] of images."""
        if value == 0 and self.image is not None:
            return integer_maps.image_fill(self.image[1])
        return self.zeros[value]

    def extra_repr(self) -> str:
        return f"values={len(self.zeros)}, output={self.output}" + ", images" * (self.image is not None)


def quantized_head(
    kind: str,
    feature_shape: Sequence[int],
    num_classes: int,
    input_shape: Sequence[int],
    *,
    convs: QuantizedStage | None,
    eps: float | None,
) -> ExitHead:
    """An `ExitHead` of `kind` with new float32 linears, whose convolutions are `convs`; in eval mode.

    eps: of the BatchNorm before its pooling, None where there is none.
    """
    made_of_features = kind != "plain" and channels_read(kind, feature_shape[0]) == feature_shape[0]
    head = ExitHead("pool" if made_of_features else kind, feature_shape, num_classes, input_shape)
    head.kind = kind
    head.convs = nn.Sequential() if convs is None else nn.Sequential(convs)
    if eps is not None:
        head.norm = (nn.BatchNorm1d if len(feature_shape) == 2 else nn.BatchNorm2d)(feature_shape[0], eps)
    return head.eval()
