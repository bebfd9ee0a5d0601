"""Rules that carry in the Triton exit heads: by definition, one-hot rows bit for bit, whatever was in the results."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="no Triton here, so no kernels to test")
import torch
from eefast.kernels import exit_head as kernel
from rule_cases import ONE_HOT, chain, check_by_definition, one_hot, planted, rule_cases
from where import interpreted

pytestmark = interpreted
K = {"few classes": 10, "one class": 1, "many classes": 100}


@pytest.mark.parametrize("k", K.values(), ids=K)
@pytest.mark.parametrize("name", rule_cases(1))
def test_by_definition(name: str, k: int) -> None:
    case, outputs = rule_cases(3)[name], planted(3, 17, k)
    check_by_definition(case, outputs, chain(kernel.run, outputs, case.thresholds, case.table))


@pytest.mark.parametrize("criterion", ONE_HOT)
def test_one_hot(criterion: str) -> None:
    outputs, sign = planted(2, 21, 10, seed=3), -1 if criterion == "entropy" else 1
    outputs[1, 4, 2], outputs[0, 7, 10] = torch.nan, torch.inf
    thresholds = torch.tensor([0.6, 0.5])
    logits, confidence, exits = chain(kernel.run, outputs, thresholds, None, criterion)
    named = logits, sign * confidence, exits
    for a, b in zip(chain(kernel.run, outputs, sign * thresholds, one_hot(2, criterion)), named, strict=True):
        assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))
