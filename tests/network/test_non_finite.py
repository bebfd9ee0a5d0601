"""Rows that are not finite, or overflow in an engine's dtype: answered once, and no other row's answer changes."""

from __future__ import annotations

import math

import pytest
import torch
from resident_calls import network
from torch import nn

from eefast import accelerate, ops

ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "3e38": 3e38, "-3e38": -3e38, "denormal": 1e-42}
ENGINES = [("reference", torch.float32)]
ENGINES += [("compact", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
ENGINES += [("resident", torch.float32)] * (ops.CPP_MISSING is None)
ENGINES += [("resident", torch.bfloat16)] * (ops.instruction_set() == "avx512_bf16")
PLACES = (0, 5, 13, 30)


@pytest.mark.parametrize("positive", [False, True], ids=["", "positive"])
@pytest.mark.parametrize(("engine", "dtype"), ENGINES, ids=[f"{e}-{str(d)[6:]}" for e, d in ENGINES])
def test_rows_that_are_not_finite(engine: str, dtype: torch.dtype, positive: bool) -> None:
    """With positive weights infinities stay infinite on their way, else they soon are NaN."""
    for criterion in ("learned", "entropy"):
        net, x = network("eenet8", 3, 31, criterion=criterion, input_shape=(1, 9, 11), filters=3)
        if positive:
            for module in net.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.weight.data.abs_()
        fast = accelerate(net, engine=engine, dtype=dtype)
        wanted = fast(x)
        others = torch.ones(31, dtype=torch.bool).index_fill(0, torch.tensor(PLACES), False)
        for value in ODD.values():
            y = x.clone()
            y[0], y[5, 0, 0, 0], y[13, 0, 4], y[30, 0, 8, 10] = value, value, value, value
            found = fast(y)
            assert ((found.exit_index >= 0) & (found.exit_index <= net.num_exits)).all()
            assert torch.equal(found.exit_index[others], wanted.exit_index[others])
            for a, b in ((found.logits, wanted.logits), (found.confidence, wanted.confidence)):
                # Elsewhere sums depend on how many rows go on together.
                limit = 0 if engine == "resident" else 8 * torch.finfo(dtype).eps * float(wanted.logits.abs().max())
                torch.testing.assert_close(a[others].double(), b[others].double(), rtol=0, atol=limit)
            # NaN is no confidence.
            assert not found.confidence[found.exit_index < net.num_exits].isnan().any()
            # Alone, each is answered as in the batch.
            if engine == "resident":
                for place in PLACES:
                    alone = fast(y[place : place + 1])
                    assert torch.equal(alone.exit_index, found.exit_index[place : place + 1])
                    torch.testing.assert_close(
                        alone.logits, found.logits[place : place + 1], rtol=0, atol=0, equal_nan=True
                    )
