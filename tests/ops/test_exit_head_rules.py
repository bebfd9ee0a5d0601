"""The exit heads with a rule that carries, exit after exit: each op beside the definitions; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_cases import agreeing_outputs, cases, check, check_random, random_rule
from torch import Tensor

from eefast import rules
from eefast.ops import exit_conv_head, exit_head
from eefast.ops.exit_head import reference

RUNS = [pytest.param(exit_head.run, id="op"), pytest.param(reference, id="reference")]
Run = Callable[..., tuple[Tensor, Tensor, Tensor]]
SENTINEL = -7.0


def answers(run: Run, outputs: Tensor, rule: rules.Rule, thresholds: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, confidence and exits of images that stand in the results in another order, among others that do not.

    outputs: [N, exits, K + 1]; every weight is 1 or 0, so that logits are these numbers.
    """
    n, exits, outs = outputs.shape
    place = torch.randperm(n + 5, generator=torch.Generator().manual_seed(1))[:n]
    # Poisoned, and columns of a larger table.
    logits = torch.full((outs - 1, n + 5), torch.nan).T
    confidence, taken = torch.full((n + 5, 2), torch.nan)[:, 0], torch.full((n + 5,), -7)
    untouched = ~torch.isin(torch.arange(n + 5), place)
    entries = torch.arange(n).int(), place.int(), torch.tensor([n]).int()
    for i, row in enumerate(rule.table()):
        features = outputs[:, i, :, None, None].contiguous()
        threshold = torch.tensor(thresholds[i]) if i + 1 < exits else None
        results = logits, confidence, taken
        entries = run(features, torch.eye(outs), torch.zeros(outs), threshold, *entries, "carried", i, *results, row)
    assert int(entries[2]) == 0
    assert logits[untouched].isnan().all()
    assert taken[untouched].tolist() == [-7] * 5
    return logits[place], confidence[place], taken[place]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("exits", "classes", "n"), [(4, 1, 31), (9, 10, 257), (2, 1000, 3)])
@pytest.mark.parametrize("place", range(5), ids=[case.name for case in cases(2)])
def test_exit_after_exit_is_the_rule_s_definition(place: int, exits: int, classes: int, n: int, run: Run) -> None:
    case, outputs = cases(exits)[place], agreeing_outputs(n, exits, classes)
    _, confidence, taken = answers(run, outputs, case.rule, case.thresholds)
    assert check(case, outputs, taken, confidence) <= 3


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("classes", [1, 3, 16, 37])
def test_random_tables(classes: int, run: Run) -> None:
    rows = doubtful = 0
    for seed in range(12):
        rule, outputs = random_rule(4, seed), agreeing_outputs(67, 4, classes, seed)
        logits, confidence, taken = answers(run, outputs, rule, [0.3] * 3)
        doubtful += check_random(outputs, rule, [0.3] * 3, logits, confidence, taken)
        rows += 67
    assert doubtful <= 0.03 * rows


def call(**changed: Any) -> dict[str, Any]:
    """Arguments of one call with a rule, some of them changed."""
    given = {
        "features": torch.randn(5, 3, 2, 2), "weight": torch.randn(4, 3), "bias": torch.randn(4),
        "threshold": torch.tensor(0.5), "rows": torch.arange(5).int(), "positions": torch.arange(5).int(),
        "live": torch.tensor([5]).int(), "criterion": "carried", "exit_index": 0, "logits": torch.zeros(5, 3),
        "confidence": torch.zeros(5), "exits": torch.zeros(5).long(), "rule": torch.rand(9),
    }  # fmt: skip
    return given | changed


SHARED = torch.zeros(24)
REFUSED = [
    ({"rule": None}, "rule is None with criterion 'carried'; give it with 'carried', and only then"),
    ({"criterion": "margin"}, "rule is given with criterion 'margin'; give it with 'carried', and only then"),
    ({"rule": torch.rand(8)}, r"rule has shape \[8\]; expected .*\[9\]"),
    ({"rule": torch.rand(1, 9)}, r"rule has shape \[1, 9\]; expected .*\[9\]"),
    ({"rule": torch.rand(9).double()}, r"rule is .*; convert it with .to\(torch.float32\)"),
    ({"positions": torch.tensor([0, 1, 2, 1, 4]).int()}, "positions has a place twice; with a rule every sample needs"),
    ({"logits": SHARED[:15].view(5, 3), "rule": SHARED[12:21]}, "logits shares memory with rule"),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("changed", "text"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused_before_work_starts(changed: dict[str, Any], text: str, run: Run) -> None:
    given = call(**changed)
    with pytest.raises(RuntimeError, match=text):
        run(*given.values())
    assert not given["logits"].any()


def test_places_of_dead_entries_may_be_anything() -> None:
    positions = torch.tensor([0, 1, 1, 1, -3]).int()
    exit_head.run(*call(positions=positions, live=torch.tensor([2]).int()).values())


def test_the_op_is_what_its_schema_says() -> None:
    torch.library.opcheck(torch.ops.eefast.exit_head.default, tuple(call().values()))


def test_the_head_with_a_convolution_carries_as_the_one_without() -> None:
    given = call(rule=torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.1, 0.5, 0.5, 0.7]), threshold=None)
    given["features"] = given["features"].relu()
    given["logits"], given["confidence"] = torch.randn(5, 3), torch.randn(5)
    conv = torch.zeros(3, 3, 3, 3)
    conv[range(3), range(3), 1, 1] = 1
    results = [{name: given[name].clone() for name in ("logits", "confidence", "exits")} for _ in range(2)]
    exit_head.run(*(given | results[0]).values())
    features, *others = (given | results[1]).values()
    exit_conv_head.run(features, conv, torch.zeros(3), *others)
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected)
