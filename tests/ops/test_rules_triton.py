"""Rules that carry in the Triton exit heads: by definition, one column bit for bit, in any order of programs."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton here, so no kernels to test")
import torch
from concurrent_programs import run_concurrently
from eefast.kernels import exit_conv_head, exit_head
from exit_cases import on_gpu
from exit_chains import chain, spread
from rule_cases import RuleCase, agreeing_outputs, cases, check, check_random, random_rule
from torch import Tensor
from where import GPU, interpreted, runs_triton

from eefast import criteria, ops, rules

pytestmark = runs_triton
run = on_gpu(torch.ops.eefast.exit_head.default) if GPU else exit_head.run
run_conv = on_gpu(torch.ops.eefast.exit_conv_head.default) if GPU else exit_conv_head.run
MANY = 70
"""Classes, for which there is another kernel."""


@pytest.mark.parametrize(
    ("case", "classes"),
    [*((case, 10) for case in cases(4)), *((case, MANY) for case in cases(4) if case.name in ("patience", "carried"))],
    ids=lambda value: getattr(value, "name", value),
)
def test_by_the_rule_s_definition(case: RuleCase, classes: int) -> None:
    outputs = agreeing_outputs(17, 4, classes)
    _, confidence, exits = chain(run, outputs, case.thresholds, case.rule.table())
    assert check(case, outputs, exits, confidence) <= 1
    assert len(exits.unique()) > 1


@pytest.mark.parametrize(("seed", "classes"), [(8, 1), (6, 10), (9, 10), (11, MANY)])
def test_any_table_is_its_formula_in_float64(seed: int, classes: int) -> None:
    rule, outputs = random_rule(3, seed), agreeing_outputs(17, 3, classes, seed)
    thresholds = spread(outputs, rule)
    answer = chain(run, outputs, thresholds, rule.table())
    assert check_random(outputs, rule, thresholds, *answer) <= 2
    assert len(answer[2].unique()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(4), ids=lambda found: found.name)
def test_a_thousand_rows_of_each_rule(case: RuleCase) -> None:
    outputs = agreeing_outputs(1009, 4, 10, 1)
    _, confidence, exits = chain(run, outputs, case.thresholds, case.rule.table())
    assert check(case, outputs, exits, confidence) <= 10


@pytest.mark.slow
def test_a_thousand_rows_of_random_tables() -> None:
    rows = doubtful = 0
    for seed in range(100, 110):
        rule, outputs = random_rule(4, seed), agreeing_outputs(101, 4, 10, seed)
        answer = chain(run, outputs, [0.3] * 3, rule.table())
        doubtful += check_random(outputs, rule, [0.3] * 3, *answer)
        rows += 101
    assert doubtful < 0.02 * rows


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_one_column_is_the_criterion_of_that_name(criterion: str) -> None:
    outputs, sign = agreeing_outputs(9, 3, 10), -1 if criterion == "entropy" else 1
    outputs[4, 1, 2], outputs[7, 0, 10] = torch.nan, torch.inf
    logits, confidence, exits = chain(run, outputs, [0.6, 0.5], None, criterion)
    table = rules.stateless(criterion, 2).table()
    found = chain(run, outputs, [sign * 0.6, sign * 0.5], table)
    for a, b in zip(found, (logits, sign * confidence, exits), strict=True):
        assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))


def test_nan_and_thresholds_of_each_sample() -> None:
    """NaN in the logits stays to the end, unless the sample's threshold is NaN; the samples beside it do not matter."""
    case, outputs = cases(4)[1], agreeing_outputs(12, 4, 10)
    thresholds = torch.tensor(case.thresholds)[:, None].repeat(1, 12)
    alone = chain(run, outputs, thresholds, case.rule.table(), poison=0.0)
    outputs[3, 0, 5], outputs[6, 1, 0], outputs[8, 0, 1] = torch.nan, torch.nan, torch.nan
    thresholds[2, 8] = torch.nan
    logits, confidence, exits = chain(run, outputs, thresholds, case.rule.table())
    assert exits[[3, 8]].tolist() == [3, 2]
    assert confidence[[3, 8]].isnan().all()
    others = [0, 1, 2, 4, 5, 7, 9, 10, 11]
    for a, b in zip((logits, confidence, exits), alone, strict=True):
        assert torch.equal(a[others], b[others])


@interpreted
def test_programs_in_any_order() -> None:
    def run_in_threads(*arguments: Any) -> tuple[Tensor, ...]:
        lists = torch.empty_like(arguments[4]), torch.empty_like(arguments[4]), torch.empty_like(arguments[6])
        (launch,) = exit_head.launches(*arguments[:12], *lists, arguments[12])
        run_concurrently(launch, threads=5)
        return lists

    case, outputs = cases(3)[1], agreeing_outputs(33, 3, 3)
    _, confidence, exits = chain(run_in_threads, outputs, case.thresholds, case.rule.table())
    assert check(case, outputs, exits, confidence) <= 1


def test_head_with_a_convolution() -> None:
    g = torch.Generator().manual_seed(0)
    conv_weight, conv_bias = torch.randn(7, 7, 3, 3, generator=g) / 8, torch.randn(7, generator=g)
    rule = rules.vote([1.0, 0.8, 1.2])

    def answers(kernel: Any) -> tuple[Tensor, ...]:
        def of_one_pixel(features: Tensor, weight: Tensor, *more: Any) -> Any:
            return kernel(features, conv_weight, conv_bias, weight, *more)

        return chain(of_one_pixel, outputs, [0.35, 0.5], rule.table())

    outputs = agreeing_outputs(19, 3, 6)
    (logits, confidence, exits), want = answers(run_conv), answers(ops.exit_conv_head.reference)
    torch.testing.assert_close(logits, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(confidence, want[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(exits, want[2])
    assert len(exits.unique()) > 1
