"""Exit rules at equal cost: accuracies against loops over samples and NumPy's interpolation."""

import numpy as np
import pytest
import torch
from made_outputs import costs_of, looped, make_outputs

from eefast import ExitOutput, criteria
from eefast.thresholds import comparing
from eefast.thresholds.candidates import Candidate, make_candidate
from eefast.thresholds.outputs import some


@pytest.mark.parametrize("criterion", ["entropy", "learned"])
def test_accuracies_lie_between_those_of_the_rows_next_to_a_cost(criterion) -> None:
    outputs, labels = make_outputs(61, 3, 0)
    cost, never = costs_of(3), criteria.get(criterion).never
    thresholds = torch.tensor([[0.1, 0.9], [0.5, 0.4], [never, never], [never, 0.6], [0.3, 0.3]])
    points = [looped(outputs, labels, cost, criterion, row) for row in thresholds.tolist()]
    at = [0.0, 0.26, 0.4, 0.731, 1.0]
    x, y = np.array(sorted((spent, right) for right, spent in points)).T
    found = comparing.accuracies_at(Candidate(criterion), thresholds, outputs, labels, cost, at)
    assert found == pytest.approx(np.interp(at, x, y).tolist(), abs=1e-12)
    assert comparing.accuracies_at(Candidate(criterion), thresholds[:1], outputs, labels, cost, [0.5]) == [points[0][0]]


def test_halves_that_choose_do_not_judge() -> None:
    outputs, labels = make_outputs(38, 2, 1)
    names, steps = ["margin", "carried"], []
    found = comparing.compare(
        outputs, labels, costs_of(2), names, 0.7, splits=2, progress=lambda *step: steps.append(step)
    )
    assert list(found) == names
    assert steps[:2] == [("comparing exit rules", 0, 6), ("comparing exit rules", 1, 6)]
    assert steps[-1] == ("comparing exit rules", 6, 6)
    accuracy = {}
    for name in ("max_probability", *names):
        accuracy[name] = []
        for split in range(2):
            order = torch.randperm(38, generator=torch.Generator().manual_seed(split))
            chosen, judged = ((some(outputs, part), labels[part]) for part in (order[:19], order[19:]))
            candidate = make_candidate(name, *chosen)
            points = []
            for row in comparing.path_of(candidate, *chosen, costs_of(2)).tolist():
                points.append(looped(candidate.outputs(judged[0]), judged[1], costs_of(2), name, row))
            x, y = np.array(sorted((spent, right) for right, spent in points)).T
            accuracy[name].append(np.interp(0.7, x, y))
    for name, comparison in found.items():
        gains = np.subtract(accuracy[name], accuracy["max_probability"])
        assert comparison.accuracy == pytest.approx(np.mean(accuracy[name]))
        assert (comparison.gain, comparison.spread) == pytest.approx((gains.mean(), gains.std()))


def test_a_row_that_knows_what_is_right_wins() -> None:
    outputs, labels = make_outputs(300, 2, 2)
    right = (outputs[0].logits.argmax(1) == labels).float() * 8 - 4
    outputs[0] = ExitOutput(outputs[0].logits, torch.sigmoid(right), right)
    found = comparing.compare(outputs, labels, costs_of(2), ["max_probability", "learned"], 0.75, splits=2)
    assert (found["max_probability"].gain, found["max_probability"].spread) == (0, 0)
    assert found["learned"].gain > 0.05
