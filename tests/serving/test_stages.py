"""Stages one by one give the answers of the engine, with limits of each row."""

import pytest
import torch

import eefast
from eefast.serving.stages import stage_calls


@pytest.mark.parametrize("criterion", ["learned", "entropy"])
@pytest.mark.parametrize("engine", ["compact", "reference"])
def test_stage_after_stage_answers_as_the_engine(small, engine, criterion):
    net, x = small
    net = net.with_criterion(criterion, net.thresholds.tolist() if criterion == "learned" else [1.55, 1.5])
    fast = eefast.accelerate(net, engine=engine)
    limits = net.thresholds[:, None].repeat(1, len(x))
    limits[1, ::3] = torch.nan
    expected = fast.engine.run(x, limits)
    rows, features = torch.arange(len(x)), x
    logits, exits = torch.full_like(expected.logits, torch.nan), torch.full((len(x),), -1)
    for i, call in enumerate(stage_calls(fast.engine)):
        given = limits[i, rows] if i < 2 else torch.zeros(len(rows))
        found = call(features, given)
        assert found.features.shape[0] == len(rows)
        left = torch.ones(len(rows), dtype=torch.bool)
        left[found.survivors] = False
        logits[rows[left]], exits[rows[left]] = found.logits[left], i
        rows, features = rows[~left], found.features[~left]
    assert len(rows) == 0
    assert torch.equal(exits, expected.exit_index)
    assert len(exits.unique()) > 1
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["compact", "reference", "resident"])
def test_a_rule_that_carries_is_served_by_whole_calls(small, serve, engine):
    net, x = small
    net = net.with_criterion("patience", [1.5] * net.num_exits)
    fast, expected = eefast.accelerate(net, engine=engine), net(x[:7])
    assert stage_calls(fast.engine) is None
    answers = [future.result() for future in serve(fast).submit_all(list(x[:7]))]
    assert [answer.exit for answer in answers] == expected.exit_index.tolist()
    assert [answer.label for answer in answers] == expected.labels.tolist()


def test_the_resident_engine_has_none(small):
    assert stage_calls(eefast.accelerate(small[0], engine="resident").engine) is None
