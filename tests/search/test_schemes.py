"""The placements of EENets among the candidates."""

import pytest
import torch
from candidate_cases import silent
from networks import images, lived_in

import eefast
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


def test_backbones_have_no_schemes():
    body = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 6, 3), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(6, 3),
    )  # fmt: skip
    supernet = of_backbone(body, SHAPE, None, ["pool"], None, 3)
    assert scheme_exits(supernet, searched(supernet), "learned", 0.9, silent) == {}
    assert eefast.attach(body, ["1"], input_shape=SHAPE).num_exits == 1
