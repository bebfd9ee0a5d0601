"""Random calls of `eefast::indexed_conv` and their answers in float64, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from exit_cases import UNITS
from torch import Tensor
from torch.nn import functional as F

NHWC = torch.channels_last
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class ConvCase:
    """The arguments of one call."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    rows: Tensor | None
    through_rows: bool
    live: Tensor
    stride: int
    relu: bool
    in_order: bool = False

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def to(self, device: str) -> ConvCase:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    @property
    def size(self) -> int:
        return len(self.features if self.rows is None else self.rows)

    @property
    def count(self) -> int:
        return min(int(self.live), self.size)

    def read(self, i: int) -> tuple[int, int]:
        """The rows of features and residual that entry i reads."""
        row = i if self.rows is None else int(self.rows[i])
        return i if self.in_order else row, row if self.through_rows else i


def make_case(
    r: int, c_in: int, c: int, h: int, w: int, *, kernel: int = 3, stride: int = 1, rows: bool = True,
    residual: str = "none", relu: bool = True, live: str = "part", dtype: torch.dtype = torch.float32, seed: int = 0,
    in_order: bool = False,
) -> ConvCase:  # fmt: skip
    """residual: "none", "in order" or "through" (read through the rows).

    Rows in any order, some twice, garbage beyond `live`; NaN in every row of features and residual that no live entry
    names.
    """
    g = torch.Generator().manual_seed(seed)
    count = {"all": r, "part": r * 2 // 3, "none": 0}[live]
    m = r + 3 if rows else r
    indices = torch.randint(m, (r,), generator=g).int() if rows else None
    features = torch.randn(m, c_in, h, w, generator=g).to(dtype)
    weight = (torch.randn(c, c_in, kernel, kernel, generator=g) * (2 / (kernel**2 * c_in)) ** 0.5).to(dtype)
    other = torch.randn(m, c, -(-h // stride), -(-w // stride), generator=g).to(dtype)
    named = torch.arange(count) if indices is None else indices[:count].long()
    for tensor, kept in (
        (features, torch.arange(count) if in_order else named),
        (other, named if residual == "through" else torch.arange(count)),
    ):
        unnamed = torch.ones(m, dtype=torch.bool)
        unnamed[kept] = False
        tensor[unnamed] = torch.nan
    if indices is not None:
        indices[count:] = 2**31 - 1
    return ConvCase(
        features.contiguous(memory_format=NHWC), weight.contiguous(memory_format=NHWC),
        torch.randn(c, generator=g), None if residual == "none" else other.contiguous(memory_format=NHWC), indices,
        residual == "through", torch.tensor([count], dtype=torch.int32), stride, relu,
        in_order,
    )  # fmt: skip


def computed(case: ConvCase, dtype: torch.dtype) -> Tensor:
    """The live rows as a user would compute them in `dtype`, [live, C, H', W']."""
    found = []
    for i in range(case.count):
        row, other = case.read(i)
        sample = case.features[row : row + 1].to(dtype)
        out = F.conv2d(sample, case.weight.to(dtype), case.bias.to(dtype), case.stride, case.weight.shape[-1] // 2)
        out = out if case.residual is None else out + case.residual[other : other + 1].to(dtype)
        found.append(F.relu(out) if case.relu else out)
    shape = (-(-n // case.stride) for n in case.features.shape[2:])
    return torch.cat(found) if found else case.features.new_zeros(0, len(case.weight), *shape, dtype=dtype)


def check(run: Any, case: ConvCase) -> Tensor:
    """Run and compare: at most twice the error of eager PyTorch, or some units where that is exact by luck."""
    out = run(*case.arguments())
    exact, dtype = computed(case, torch.float64), case.features.dtype
    assert out.dtype == dtype
    assert list(out.shape) == [case.size, *exact.shape[1:]]
    assert out.is_contiguous(memory_format=NHWC)
    actual = out[: case.count].double()
    assert torch.equal(actual.isnan(), exact.isnan())
    # What is added up for a value, of which every addition in float32 rounds some 2^-23 away.
    added = replace(case, features=case.features.abs(), weight=case.weight.abs(), bias=case.bias.abs(), relu=False)
    added = added if case.residual is None else replace(added, residual=case.residual.abs())
    unit = UNITS * 2**-23 * computed(added, torch.float64) + torch.finfo(dtype).eps * exact.abs()
    error = (computed(case, dtype).double() - exact).abs().nan_to_num().amax() if exact.numel() else 0
    beyond = (actual - exact).abs() - torch.maximum(unit, torch.as_tensor(2 * error))
    assert (beyond.nan_to_num() <= 0).all(), f"{beyond.nan_to_num().max()} beyond twice the error of eager, {error}"
    return out
