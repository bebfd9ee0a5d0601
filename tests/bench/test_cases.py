"""Thresholds give the cost that was asked for, and none where no image is to exit early."""

from dataclasses import replace

import pytest
import torch
from cases import check, make_case, mix_of_cost, thresholds

from eefast import criteria
from eefast.thresholds.outputs import exits_taken


@pytest.mark.parametrize("criterion", list(criteria.CRITERIA))
@pytest.mark.parametrize("wanted", [0.5, 0.3, 0.2])
def test_thresholds_give_the_cost_asked_for(subject, wanted, criterion):
    cost = subject.net.cost
    mix = mix_of_cost(cost.tolist(), wanted)
    assert sum(mix) == pytest.approx(1)
    taken = exits_taken(subject.outputs, criteria.get(criterion), thresholds(subject.outputs, mix, criterion))
    assert float(cost[taken].mean()) == pytest.approx(wanted, abs=1.5 / len(taken))


def test_cost_goes_from_the_first_exit_to_none(subject):
    cost = subject.net.cost.tolist()
    assert mix_of_cost(cost, 1) == (0, 0, 1)
    assert mix_of_cost(cost, 0.5 * cost[0]) == pytest.approx((1, 0, 0))


@pytest.mark.parametrize("criterion", list(criteria.CRITERIA))
def test_what_is_called_no_exits_has_none(subject, criterion):
    net = subject.net.with_criterion(criterion)
    case = make_case(replace(subject, net=net), 16, 1.0)
    taken = exits_taken(case.outputs, case.net.criterion, case.net.thresholds)
    assert (case.setting, case.mix, taken.unique().tolist()) == ("no exits", (0, 0, 1), [2])


@pytest.mark.parametrize("static", [False, True])
def test_answers_to_some_of_the_images_alone_are_wrong(subject, static):
    case = make_case(subject, 16, 1.0 if static else 0.5)
    with torch.no_grad():
        found = [case.net(x) for x in case.batches[:2]]
    logits = torch.cat([part.logits for part in found])
    exits = None if static else torch.cat([part.exit_index for part in found])
    assert check(case, logits, exits, torch.float32)[1] == ""
    for n in (0, 1, 31):
        problem = check(case, logits[:n], None if exits is None else exits[:n], torch.float32)[1]
        assert problem.startswith(f"WRONG: {n} answers for batches of [16, 16")
