"""Exit rules against plain Python, to the edges of float32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eefast import criteria

finite = st.floats(-50, 50, width=32)


def plain_python(name: str, logits: list[float], row: float) -> float:
    if name == "learned":
        return 1 / (1 + math.exp(-row))
    exps = [math.exp(v - max(logits)) for v in logits]
    probs = sorted((e / sum(exps) for e in exps), reverse=True)
    if name == "max_probability":
        return probs[0]
    if name == "margin":
        return probs[0] - probs[1] if len(probs) > 1 else probs[0]
    assert name == "entropy", f"plain_python has no formula for {name!r}"
    return -sum(p * math.log(p) for p in probs if p > 0)


@pytest.mark.parametrize("name", criteria.CRITERIA)
@settings(max_examples=60, deadline=None)
@given(logits=st.lists(finite, min_size=1, max_size=12), row=finite)
def test_confidence_equals_plain_python(name, logits, row):
    got = criteria.get(name).confidence(torch.tensor([logits]), torch.tensor([row]))
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(plain_python(name, logits, row), rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("name", criteria.CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_judged_in_float32(name, dtype):
    logits, row = torch.randn(31, 10).to(dtype), torch.randn(31).to(dtype)
    rule = criteria.get(name)
    expected = rule.confidence(logits.float(), row.float())
    assert torch.equal(rule.confidence(logits, row), expected)


def test_entropy_is_zero_where_one_class_has_everything():
    logits = torch.tensor([[0.0, -200.0, -300.0], [1e30, -1e30, 0.0], [0.0, -torch.inf, -torch.inf]])
    assert criteria.entropy(logits, logits[:, 0]).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("threshold", [-torch.inf, 0.5, torch.inf])
@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_nan_never_exits(name, threshold):
    rule = criteria.get(name)
    value = rule.confidence(torch.full((2, 3), torch.nan), torch.full((2,), torch.nan))
    assert value.isnan().all()
    assert not rule.leaves(value, torch.tensor(threshold)).any()


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_comparison_is_strict(name):
    rule = criteria.get(name)
    at = torch.tensor(0.3)
    above, below = torch.nextafter(at, torch.tensor(1.0)), torch.nextafter(at, torch.tensor(0.0))
    expected = [False, rule.comparison == ">", rule.comparison == "<"]
    assert rule.leaves(torch.stack([at, above, below]), at).tolist() == expected
