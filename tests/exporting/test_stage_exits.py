"""A module per stage: chained, they are the network, with the confidence that is compared with thresholds."""

import pytest
import torch

from eefast import rules
from eefast.exporting.stage_exits import stages_with_examples


@pytest.mark.parametrize("criterion", ["learned", "entropy", "margin"])
def test_the_chain_is_the_network(net, x, criterion):
    made, features = net.with_criterion(criterion), x
    outputs = made.all_exits(x)
    for (module, _), wanted in zip(stages_with_examples(made), outputs, strict=True):
        logits, confidence, *more = module(features)
        assert torch.equal(logits, wanted.logits)
        assert torch.equal(confidence, made.criterion.confidence(wanted.logits, wanted.confidence_logit))
        assert module.inputs == ("x",)
        features = more[0] if more else None
    assert features is None


def test_a_rule_that_carries_reads_the_exit_before(net, x):
    made = net.with_criterion(rules.vote([1.0, 2.0, 4.0]))
    given, votes, before = (x,), torch.zeros(len(x)), None
    for i, ((module, _), wanted) in enumerate(zip(stages_with_examples(made), made.all_exits(x), strict=True)):
        assert len(module.inputs) == (1 if i == 0 else 3)
        logits, confidence, *features = module(*given)
        best = wanted.logits.softmax(1)
        said = best.argmax(1)
        votes = 2.0**i * best.amax(1) + (votes if before is None else votes * (said == before))
        torch.testing.assert_close(confidence, votes)
        before, given = said, (*features, logits, confidence)


def test_the_network_is_not_changed(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for module, _ in stages_with_examples(net):
        for parameter in module.parameters():
            parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
