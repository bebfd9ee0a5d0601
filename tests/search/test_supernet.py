"""Networks with all candidates, and those of subsets of them: the answers of the parts that they were made of."""

import pytest
import torch
from networks import images, lived_in
from torch import nn

import eefast
from eefast import zoo
from eefast.search.candidates import Candidates
from eefast.search.supernet import of_backbone, of_network
from eefast.surgery import backbone

SHAPE, ONES = (2, 13, 11), ((0.5, 0.5), (0.5, 0.5))


@pytest.fixture(scope="module")
def trained():
    return lived_in(zoo.eenet("eenet20", 2, (2, 5), "conv1", 3, SHAPE, normalization=ONES), 1)


@pytest.fixture(scope="module")
def supernet(trained):
    made = of_network(trained, ["pool", "plain", "depthwise"], None, 4)
    # Heads are new; their statistics must be taken along, too.
    lived_in(made.net.heads[:-1], 2)
    made.net.eval()
    return made


@torch.no_grad()
def test_all_candidates_read_the_features_of_their_place(trained, supernet):
    assert supernet.places == (1, 1, 1, 4, 4, 6, 6, 8, 8)
    assert supernet.kinds == ("pool", "plain", *("depthwise", "pool") * 3, "depthwise")
    assert supernet.place_numbers == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    x = images(3, SHAPE)
    blocks = [layer for stage in trained.stages for layer in stage]
    features = {0: blocks[0](x)}
    for i, block in enumerate(blocks[1:], start=1):
        features[i] = block(features[i - 1])
    outputs = supernet.net.all_exits(x)
    for place, head, out in zip(supernet.places, supernet.net.heads, outputs, strict=False):
        torch.testing.assert_close(out, head(features[place]))
    assert torch.equal(outputs[-1].logits, trained.all_exits(x)[-1].logits)


@torch.no_grad()
def test_the_stem_is_a_place(trained, tmp_path):
    made = of_network(trained, ["strided1"], ["0", "3"], 1)
    assert made.places == (0, 3)
    x, outputs = images(3, SHAPE), made.net.eval().all_exits(images(3, SHAPE))
    assert torch.equal(outputs[-1].logits, trained.all_exits(x)[-1].logits)
    made.network((0,), "entropy", [0.25]).save(tmp_path)
    found = eefast.load(tmp_path)
    assert found.config["placement"] == [0]
    for ours, theirs in zip(found.all_exits(x), (outputs[0], outputs[-1]), strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("subset", [(1,), (0, 5, 8), (2, 3)], ids=str)
def test_a_network_of_the_zoo_with_some_of_them(supernet, subset, tmp_path):
    x, net = images(3, SHAPE), supernet.network(subset, "entropy", [0.25] * len(subset))
    net.save(tmp_path)
    for found in (net, eefast.load(tmp_path)):
        assert (found.config["placement"], found.criterion.name) == ([supernet.places[e] for e in subset], "entropy")
        assert [head.kind for head in found.heads] == [*(supernet.kinds[e] for e in subset), "pool"]
        assert (found.thresholds.tolist(), found.normalization) == (
            [0.25] * len(subset),
            [[0.5] * 2] * 2,
        ) or found is net
        every = supernet.net.all_exits(x)
        for e, out in zip((*subset, 9), found.all_exits(x), strict=True):
            torch.testing.assert_close(out, every[e])
    candidates = Candidates(
        every, torch.zeros(3), supernet.net.stage_costs, supernet.place_numbers, supernet.parameters()
    )
    torch.testing.assert_close(candidates.cost_of(subset), net.path_cost)
    assert candidates.parameters_of(subset) == sum(p.numel() for p in net.parameters())


@torch.no_grad()
def test_an_attached_network_gets_other_exits(tmp_path):
    shape, x = (3, 33, 31), images(3, (3, 33, 31))
    given = eefast.attach(backbone("timm:resnet10t", 5).eval(), ["layer2"], input_shape=shape)
    lived_in(given, 3).save(tmp_path / "before")
    given = eefast.load(tmp_path / "before")
    made = of_network(given, ["depthwise"], None, 3)
    assert made.places == ("conv1.2", "layer1", "layer3")
    net = made.network((0, 1), "max_probability", [0.5, 0.75])
    net.save(tmp_path / "after")
    found = eefast.load(tmp_path / "after").all_exits(x)
    for e, out in zip((0, 1, 3), found, strict=True):
        torch.testing.assert_close(out, made.net.eval().all_exits(x)[e])
    torch.testing.assert_close(found[-1], given.all_exits(x)[-1])


def test_a_quantised_network_is_refused():
    net = lived_in(zoo.eenet("eenet20", 1, input_shape=(1, 9, 9)), 1)
    made = eefast.quantize(net, images(16, (1, 9, 9)), winograd=False)
    with pytest.raises(ValueError, match="eenet20 is quantised; search with the float network that it was made of"):
        of_network(made, ["pool"], None, 12)


def test_places_may_be_named(trained):
    made = of_network(trained, ["pool"], ["2", "7"], 1)
    assert made.places == (2, 7)
    body = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    assert of_backbone(body, SHAPE, None, ["pool", "conv1"], ["1"], 1).places == ("1", "1")


@pytest.mark.parametrize(
    ("net", "kinds", "places", "message"),
    [
        (zoo.eenet("eenet8"), ["pool"], None, "eenet8 has its two exits; search needs another network of eefast.zoo"),
        (eefast.EarlyExitNet(*([m] for m in (nn.Conv2d(2, 4, 3), eefast.heads.ExitHead("pool", (4, 11, 9), 3, SHAPE))),
                             input_shape=SHAPE), ["pool"], None, "network was built from modules"),
        (zoo.eenet("eenet20", 1, input_shape=(1, 9, 9)), ["plain"], ["8"], "no kind of head of plain fits at any "),
        (zoo.eenet("eenet20", 1, input_shape=(1, 9, 9)), ["pool"], ["layer1"], "give numbers of residual blocks"),
    ],
    ids=["EENet-8", "modules", "kinds", "names"],
)  # fmt: skip
def test_what_cannot_be_searched_is_said(net, kinds, places, message):
    with pytest.raises(ValueError, match=message):
        of_network(net, kinds, places, 12)
