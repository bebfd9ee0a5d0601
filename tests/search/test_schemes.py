"""The placements of EENets among the candidates."""

import pytest
import torch
from candidate_cases import silent
from networks import images, lived_in

from eefast import zoo
from eefast.search import schemes
from eefast.search.candidates import Candidates
from eefast.search.schemes import scheme_exits
from eefast.search.supernet import of_backbone, of_network
from eefast.thresholds.calibration import calibrate
from eefast.zoo.placement import SCHEMES

SHAPE = (1, 9, 9)


def searched(supernet):
    lived_in(supernet.net, 2)
    with torch.no_grad():
        outputs = supernet.net.all_exits(images(31, SHAPE))
    labels = outputs[-1].logits.argmax(1)
    return Candidates(outputs, labels, supernet.net.stage_costs, supernet.place_numbers, supernet.parameters())


def test_each_scheme_has_its_best_number_of_exits(monkeypatch):
    monkeypatch.setattr(schemes, "MOST_EXITS", 2)
    supernet = of_network(lived_in(zoo.eenet("eenet20", 1, input_shape=SHAPE), 1), ["pool", "conv1"], None, 12)
    candidates = searched(supernet)
    found = scheme_exits(supernet, candidates, "max_probability", 0.6, silent)
    assert {*found} <= {*SCHEMES}
    assert "fine" in found
    for scheme, kept in found.items():
        assert kept.thresholds.cost <= 0.6 + 1e-6
        assert {supernet.kinds[e] for e in kept.subset} == {"pool"}
        accuracies = []
        for count in range(1, 3):
            try:
                places = zoo.eenet("eenet20", count, scheme, input_shape=SHAPE).config["placement"]
                subset = tuple(supernet.places.index(place) for place in places)
                seen = candidates.outputs_of(subset), candidates.labels, candidates.cost_of(subset)
                accuracies.append(calibrate(*seen, "max_probability", max_cost=0.6).accuracy)
            except ValueError:  # it does not fit, or has a place that is none of the candidates, or costs too much
                continue
        assert kept.thresholds.accuracy == pytest.approx(max(accuracies))


def test_places_that_are_not_searched_become_the_nearest_in_cost(monkeypatch):
    monkeypatch.setattr(schemes, "MOST_EXITS", 1)
    net = lived_in(zoo.eenet("eenet20", 1, input_shape=SHAPE), 1)
    supernet = of_network(net, ["pool"], [2, 5, 7], 12)
    found = scheme_exits(supernet, searched(supernet), "max_probability", 1.1, silent)
    assert {*found} == {*SCHEMES}
    every = of_network(net, ["pool"], [*range(1, 9)], 12).net.stage_costs
    upto = {block: sum(cost.stage_macs for cost in every[:block]) for block in range(1, 9)}
    for scheme, kept in found.items():
        (wanted,) = zoo.eenet("eenet20", 1, scheme, input_shape=SHAPE).config["placement"]
        distance = {block: abs(upto[block] - upto[wanted]) for block in (2, 5, 7)}
        assert distance[supernet.places[kept.subset[0]]] == min(distance.values())


def test_the_blocks_of_a_backbone_are_those_between_its_places(monkeypatch):
    monkeypatch.setattr(schemes, "MOST_EXITS", 1)
    layers = [layer for c in (1, 4, 4, 4) for layer in (torch.nn.Conv2d(c, 4, 3, padding=1), torch.nn.ReLU())]
    body = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    supernet = of_backbone(body, SHAPE, None, ["pool", "conv1"], None, 4)
    found = scheme_exits(supernet, searched(supernet), "max_probability", 0.9, silent)
    assert {*found} <= {*SCHEMES}
    macs = [cost.stage_macs for cost in supernet.net.stage_costs]
    firsts = [supernet.place_numbers.index(number) for number in sorted({*supernet.place_numbers})]
    reached = [sum(macs[: e + 1]) / sum(macs) for e in firsts]
    # One exit comes after the first place that reaches the share of the scheme.
    for scheme, share in {"fine": 0.05, "pareto": 0.2, "linear": 0.5, "gold_ratio": 0.618}.items():
        place = next(i for i, cost in enumerate(reached) if cost >= share)
        assert found[scheme].subset == (firsts[place],)
        assert supernet.kinds[firsts[place]] == "pool"
