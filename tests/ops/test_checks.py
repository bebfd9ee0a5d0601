"""What the ops refuse already while a call is traced, when no tensor has data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eefast import ops


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


def exit_head(features: Tensor, weight: Tensor) -> Any:
    lists = integers(5), integers(5), integers(1)
    results = torch.empty(5, 10), torch.empty(5), torch.empty(5, dtype=torch.int64)
    return ops.exit_head.run(features, weight, torch.empty(11), None, *lists, "learned", 0, *results)


def indexed_conv(features: Tensor, weight: Tensor) -> Any:
    return ops.indexed_conv.run(features, weight, torch.empty(4), None, integers(5), False, integers(1), 1, True)


def gather_survivors(features: Tensor, out: Tensor) -> Any:
    return ops.gather_survivors.run(features, integers(5), integers(1), out)


@pytest.mark.parametrize(
    ("call", "features", "other", "message"),
    [
        (exit_head, (5, 4, 3), (11, 4), r"features has shape \[5, 4, 3\]; expected 4 dimensions"),
        (exit_head, (5, 4, 3, 3), (11,), r"weight has shape \[11\]; expected 2 dimensions"),
        (indexed_conv, (5, 4, 3, 3), (4, 3, 1, 1), r"weight has shape \[4, 3, 1, 1\]; expected 4 inputs, as features"),
        (gather_survivors, (5, 4, 3, 3), (5, 4, 9), r"out has shape \[5, 4, 9\]; expected 4 dimensions"),
    ],
)
def test_wrong_shapes_are_refused_while_a_call_is_traced(
    call: Any, features: tuple[int, ...], other: tuple[int, ...], message: str
) -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match=message):
        call(torch.empty(features), torch.empty(other))
