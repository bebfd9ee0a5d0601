"""Rows that are not finite, or overflow in an engine's dtype: answered once, and no other row's answer changes."""

from __future__ import annotations

import math

import pytest
import torch
from resident_calls import network
from torch import nn

from eefast import Accelerated, ExitResult, accelerate, ops

ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "3e38": 3e38, "-3e38": -3e38, "denormal": 1e-42}
ENGINES = [("reference", torch.float32)]
ENGINES += [("compact", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
ENGINES += [("resident", torch.float32)] * (ops.CPP_MISSING is None)
ENGINES += [("resident", torch.bfloat16)] * (ops.instruction_set() == "avx512_bf16")
PLACES = (0, 5, 13, 30)


OTHERS = torch.ones(31, dtype=torch.bool).index_fill(0, torch.tensor(PLACES), False)


@pytest.fixture(scope="module", params=ENGINES, ids=[f"{e}-{str(d)[6:]}" for e, d in ENGINES])
def engine(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["", "positive"])
def positive(request: pytest.FixtureRequest) -> bool:
    """With positive weights infinities stay infinite on their way, else they soon are NaN."""
    return request.param


@pytest.fixture(scope="module", params=["learned", "entropy"])
def fast(
    request: pytest.FixtureRequest, engine: tuple[str, torch.dtype], positive: bool
) -> tuple[Accelerated, torch.Tensor, ExitResult]:
    """A network in an engine, images for it, and its answers."""
    net, x = network("eenet8", 3, 31, criterion=request.param, input_shape=(1, 9, 11), filters=3)
    if positive:
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.data.abs_()
    made = accelerate(net, engine=engine[0], dtype=engine[1])
    return made, x, made(x)


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.sampled(24)
def test_rows_that_are_not_finite(
    fast: tuple[Accelerated, torch.Tensor, ExitResult], engine: tuple[str, torch.dtype], value: float
) -> None:
    module, x, wanted = fast
    kind, dtype = engine
    y = x.clone()
    y[0], y[5, 0, 0, 0], y[13, 0, 4], y[30, 0, 8, 10] = value, value, value, value
    found = module(y)
    assert ((found.exit_index >= 0) & (found.exit_index <= module.num_exits)).all()
    assert torch.equal(found.exit_index[OTHERS], wanted.exit_index[OTHERS])
    for a, b in ((found.logits, wanted.logits), (found.confidence, wanted.confidence)):
        # Elsewhere sums depend on how many rows go on together.
        limit = 0 if kind == "resident" else 8 * torch.finfo(dtype).eps * float(wanted.logits.abs().max())
        torch.testing.assert_close(a[OTHERS].double(), b[OTHERS].double(), rtol=0, atol=limit)
    # NaN is no confidence.
    assert not found.confidence[found.exit_index < module.num_exits].isnan().any()
    # Alone, each is answered as in the batch.
    if kind == "resident":
        for place in PLACES:
            alone = module(y[place : place + 1])
            assert torch.equal(alone.exit_index, found.exit_index[place : place + 1])
            torch.testing.assert_close(alone.logits, found.logits[place : place + 1], rtol=0, atol=0, equal_nan=True)
