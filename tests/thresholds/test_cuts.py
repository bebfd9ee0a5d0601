"""Cuts of exits: which samples each lets exit, and totals beside a loop over the samples."""

import itertools

import numpy as np
import pytest
import torch
from made_outputs import costs_of, looped, make_outputs

from eefast import ExitOutput, criteria
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.cuts import Cuts
from eefast.thresholds.outputs import exits_taken

COST = torch.tensor([0.2, 0.5, 1.0])


def by_loop(outputs, labels, criterion, cuts, picks):
    """Right answers and cost of all samples together."""
    return np.array(looped(outputs, labels, costs_of(len(outputs)), criterion, cuts.thresholds_of(picks))) * len(labels)


@pytest.fixture(params=itertools.product(criteria.CRITERIA, [False, True]), ids=lambda p: p[0] + "-ties" * p[1])
def case(request):
    """Outputs of four exits for 23 samples, their labels, the criterion and the cuts; rounded outputs tie often."""
    criterion, rounded = request.param
    outputs, labels = make_outputs(23, 4, 1, rounded)
    return outputs, labels, criterion, Cuts(outputs, labels, costs_of(4), criterion)


def test_cuts_let_the_most_confident_exit_and_split_no_tie(case):
    outputs, _, criterion, cuts = case
    rule = criteria.get(criterion)
    for i, out in enumerate(outputs[:-1]):
        value = rule.confidence(out.logits, out.confidence_logit)
        # One beyond each end, and one between each two confidences that have a float32 number between them.
        between = [np.nextafter(a, b) < b for a, b in itertools.pairwise(value.unique().numpy())]
        assert len(cuts.sizes[i]) == sum(between) + 2
        assert (int(cuts.sizes[i][0]), int(cuts.sizes[i][-1])) == (0, 23)
        for pick, (size, threshold) in enumerate(zip(cuts.sizes[i], cuts.thresholds[i].float(), strict=True)):
            exits = value > threshold if rule.comparison == ">" else value < threshold
            assert not (value == threshold).any()
            assert int(exits.sum()) == size
            picks = [pick if k == i else 0 for k in range(3)]
            assert torch.equal(cuts.selected(picks, i), exits)


@pytest.mark.parametrize("share", [0, 1 / 3, 1 / 2, 1])
def test_totals_are_those_of_a_loop(case, share):
    outputs, labels, criterion, cuts = case
    picks = [int(share * (len(sizes) - 1)) for sizes in cuts.sizes]
    assert cuts.totals(picks).tolist() == pytest.approx(by_loop(outputs, labels, criterion, cuts, picks))


@pytest.mark.parametrize("i", range(3))
def test_a_sweep_has_the_totals_of_every_cut(case, i):
    """Of the samples that reach the exit; those that exited before it are added."""
    outputs, labels, criterion, cuts = case
    picks = [len(sizes) // 3 for sizes in cuts.sizes]
    arrives = torch.ones(23, dtype=torch.bool)
    for k in range(i):
        arrives &= ~cuts.selected(picks, k)
    before = (cuts.outcome_from(picks, 0) * ~arrives).sum(dim=1, keepdim=True)
    totals = before + cuts.sweep(i, arrives, cuts.outcome_from(picks, i + 1))
    for pick in range(len(cuts.sizes[i])):
        changed = [pick if k == i else picks[k] for k in range(3)]
        assert totals[:, pick].tolist() == pytest.approx(by_loop(outputs, labels, criterion, cuts, changed))


@pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 2), (1, 2)])
def test_a_sweep_of_two_exits_has_the_totals_of_every_pair(case, i, j):
    outputs, labels, criterion, cuts = case
    picks = [len(sizes) // 3 for sizes in cuts.sizes]
    columns = tuple(torch.arange(0, len(cuts.sizes[k]), 2) for k in (i, j))
    totals = cuts.sweep_pair(picks, i, j, columns)
    assert totals.shape == (2, *map(len, columns))
    for (a, x), (b, y) in itertools.product(enumerate(columns[0].tolist()), enumerate(columns[1].tolist())):
        changed = [{i: x, j: y}.get(k, picks[k]) for k in range(3)]
        assert totals[:, a, b].tolist() == pytest.approx(by_loop(outputs, labels, criterion, cuts, changed))


@pytest.mark.parametrize("size", [1.0, 2.0**24, 3e7, -3e7, 1e30])
@pytest.mark.parametrize("spread", [0.0, 1e-6])
def test_confidences_of_any_size_can_all_exit_or_none(size, spread) -> None:
    outputs, labels = make_outputs(31, 3, 0)
    rows = size * (1 + spread * torch.linspace(-1, 1, 31))
    outputs = [ExitOutput(out.logits, out.confidence, rows) for out in outputs]
    cuts = Cuts(outputs, labels, COST, "fitted")
    for end, exits in ((0, 2), (-1, 0)):
        thresholds = cuts.thresholds_of([len(sizes) + end if end else 0 for sizes in cuts.sizes])
        assert exits_taken(outputs, criteria.get("fitted"), thresholds).unique().tolist() == [exits]
    found = calibrate(outputs, labels, COST, "fitted", max_cost=0.200001)
    assert (
        found.cost == pytest.approx(looped(outputs, labels, COST, "fitted", found.thresholds)[1]) == pytest.approx(0.2)
    )


def test_nan_confidence_never_exits() -> None:
    outputs, labels = make_outputs(31, 2, 0)
    outputs[0].confidence_logit[:5] = float("nan")
    found = calibrate(outputs, labels, COST[:2], max_cost=0.2 + 0.3 * 5 / 31 + 1e-6)
    assert found.cost == pytest.approx(0.2 + 0.3 * 5 / 31)
    expected = looped(outputs, labels, COST[:2], "learned", found.thresholds)
    assert (found.accuracy, found.cost) == pytest.approx(expected)
    with pytest.raises(ValueError, match="cannot be kept"):
        calibrate(outputs, labels, COST[:2], max_cost=0.2 + 0.3 * 4 / 31)


@pytest.mark.parametrize(
    ("samples", "exits", "criterion", "message"),
    [
        (0, 3, "learned", "0 samples, 2 early exits: thresholds need at least one of both"),
        (3, 1, "learned", "3 samples, 0 early exits"),
        (3, 3, "best", "criterion='best' is unknown"),
    ],
)
def test_outputs_without_cuts_are_refused(samples, exits, criterion, message):
    outputs, labels = make_outputs(3, 3, 0)
    outputs = [ExitOutput(*(part[:samples] for part in out)) for out in outputs[-exits:]]
    with pytest.raises(ValueError, match=message):
        Cuts(outputs, labels[:samples], COST[-exits:], criterion)


def test_an_exit_without_any_confidence_is_refused():
    outputs, labels = make_outputs(3, 3, 0)
    outputs[0].confidence_logit[:] = float("nan")
    with pytest.raises(ValueError, match="no confidence that is a number"):
        Cuts(outputs, labels, COST, "learned")
