"""Exit rules by name: their numbers, and outputs on which thresholds let the same samples exit as in the network."""

from copy import deepcopy

import pytest
import torch
from made_outputs import make_outputs
from networks import images, lived_in

from eefast import criteria, rules, zoo
from eefast.thresholds import candidates
from eefast.thresholds.outputs import collect, exits_taken
from eefast.thresholds.scaling import fold_scaling


@pytest.fixture(scope="module")
def answered():
    """A network, images and its outputs for them, with the classes that it should have said."""
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 0)
    x = images(131, (1, 12, 12))
    outputs, _ = collect(net, [(x, torch.zeros(131))])
    random = torch.Generator().manual_seed(0)
    # Right in two of three cases, so that temperatures and biases pay.
    labels = outputs[-1].logits.argmax(1).where(torch.rand(131, generator=random) < 0.67, torch.arange(131) % 10)
    return net, x, outputs, labels


@pytest.mark.parametrize("name", candidates.ALL)
def test_thresholds_let_the_same_samples_exit_as_in_the_network(answered, name) -> None:
    plain, x, outputs, labels = answered
    candidate = candidates.make_candidate(name, outputs, labels)
    assert candidate.name == name
    seen = candidate.outputs(outputs)
    rule = criteria.get(name)
    confidence = [rule.confidence(out.logits, out.confidence_logit).sort().values for out in seen[:-1]]
    thresholds = [float(c[65:67].mean()) for c in confidence]
    made = deepcopy(plain)
    if candidate.scaling is not None:
        fold_scaling(made, candidate.scaling)
    made = made.with_criterion(candidate.criterion, thresholds).eval()
    expected, taken = made(x), exits_taken(seen, rule, thresholds)
    assert torch.equal(expected.exit_index, taken)
    logits = torch.stack([out.logits for out in seen])[taken, torch.arange(131)]
    torch.testing.assert_close(expected.logits, logits, rtol=1e-4, atol=1e-4)
    # As in a network that has these numbers.
    own = candidates.candidate_of(made, name).outputs(collect(made, [(x, labels)])[0])
    assert torch.equal(exits_taken(own, rule, thresholds), taken)


def test_votes_weigh_accuracy(answered) -> None:
    _, _, outputs, labels = answered
    outputs = [outputs[0]._replace(logits=torch.eye(10)[(labels + 1) % 10]), *outputs[1:]]  # never right
    rule = candidates.make_candidate("vote", outputs, labels).criterion
    assert isinstance(rule, rules.Rule)
    weights = [row[rules.COLUMNS.index("max_probability")] for row in rule.rows]
    accuracy = [(out.logits.argmax(1) == labels).float().mean().item() for out in outputs[1:]]
    assert weights == pytest.approx([1 / 131, *accuracy])


def test_nothing_to_fold_where_nothing_pays() -> None:
    outputs, _ = make_outputs(31, 2, 0)
    candidate = candidates.make_candidate("carried", [outputs[1], outputs[1]], outputs[1].logits.argmax(1))
    assert (candidate.scaling is None) == all(out.logits.equal(outputs[1].logits) for out in candidate.outputs(outputs))


@pytest.mark.parametrize("name", criteria.CARRYING)
def test_numbers_that_a_network_lacks_are_asked_for(answered, name) -> None:
    with pytest.raises(ValueError, match=f"criterion='{name}': this network has no numbers.*--criterion {name} --save"):
        candidates.candidate_of(answered[0], name)


def test_an_unknown_name_is_refused(answered) -> None:
    with pytest.raises(ValueError, match="criterion='best' is unknown"):
        candidates.make_candidate("best", answered[2], answered[3])
