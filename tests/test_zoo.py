"""Exit positions, costs and sizes of the zoo against the published reference's, recomputed by running its code."""

import pytest
import torch
from networks import images

from eefast import zoo
from eefast.cost import macs

# ResNet depth → scheme → blocks before each of three exits: cost of each exit, 32×32 inputs, `pool` heads.
GOLDEN = """
20 | 1,2,3: .128 .245 .361 | 2,3,5: .245 .361 .566 | 3,5,7: .361 .566 .771 | 2,4,6: .245 .451 .681
32 | 1,2,3: .076 .145 .213 | 3,6,8: .213 .404 .540 | 4,8,12: .282 .540 .797 | 4,6,10: .282 .404 .676
44 | 1,2,3: .054 .103 .151 | 4,8,11: .200 .384 .529 | 6,11,16: .298 .529 .760 | 5,8,13: .249 .384 .626
56 | 2,3,4: .079 .117 .155 | 6,10,14: .231 .374 .523 | 7,14,21: .269 .523 .777 | 7,11,17: .269 .411 .636
110 | 3,6,8: .058 .115 .152 | 11,20,27: .209 .373 .504 | 14,27,41: .265 .504 .759 | 13,21,34: .246 .392 .634
18 | 1,2,3: .194 .322 .421 | 2,3,4: .322 .421 .548 | 2,4,6: .322 .548 .774 | 2,3,5: .322 .421 .647
34 | 1,2,3: .096 .159 .223 | 3,6,8: .223 .398 .510 | 4,8,12: .272 .510 .762 | 4,6,10: .272 .398 .636
50 | 1,2,3: .087 .141 .195 | 4,6,8: .286 .393 .537 | 4,8,13: .286 .537 .803 | 4,6,10: .286 .393 .643
"""
CELLS = [
    pytest.param(int(depth), scheme, *cell.split(":"), id=f"eenet{depth.strip()}-{scheme}")
    for depth, *cells in (line.split("|") for line in GOLDEN.strip().splitlines())
    for scheme, cell in zip(("fine", "pareto", "linear", "gold_ratio"), cells, strict=True)
]


@pytest.mark.parametrize(("depth", "scheme", "blocks", "costs"), CELLS)
def test_positions_and_costs_equal_the_golden_table(depth, scheme, blocks, costs):
    net = zoo.eenet(f"eenet{depth}", 3, scheme)
    assert net.config["placement"] == [int(b) for b in blocks.split(",")]
    expected = torch.tensor([*map(float, costs.split()), 1.0])
    torch.testing.assert_close(net.cost, expected, rtol=0, atol=0.001)


def test_the_readme_configuration_of_the_reference():
    net = zoo.eenet("eenet110", 8, "fine")
    assert net.config["placement"] == [3, 6, 8, 10, 12, 14, 16, 18]
    expected = torch.tensor([0.058, 0.115, 0.152, 0.190, 0.227, 0.265, 0.303, 0.340, 1.0])
    torch.testing.assert_close(net.cost, expected, rtol=0, atol=0.001)
    assert zoo.eenet("eenet110", 10, "fine").config["placement"][8:] == [20, 22]


@pytest.mark.parametrize(
    ("name", "shape", "classes", "mmacs"),
    [
        ("resnet20", (3, 32, 32), 10, 41.41), ("resnet32", (3, 32, 32), 10, 70.06),
        ("resnet44", (3, 32, 32), 10, 98.72), ("resnet56", (3, 32, 32), 10, 127.37),
        ("resnet110", (3, 32, 32), 10, 256.32), ("resnet18", (3, 32, 32), 10, 37.18),
        ("resnet34", (3, 32, 32), 10, 75.01), ("resnet50", (3, 32, 32), 10, 84.10),
        ("resnet101", (3, 64, 64), 200, 641.02), ("resnet152", (3, 64, 64), 200, 945.60),
        ("resnet20", (1, 28, 28), 10, 31.48), ("resnet50", (3, 224, 224), 1000, 4121.92),
    ],
)  # fmt: skip
def test_macs_of_the_plain_twins(name, shape, classes, mmacs):
    counted, out = macs(zoo.resnet(name, classes, shape), shape)
    assert round(counted / 1e6, 2) == mmacs
    assert out == (classes,)


@pytest.mark.parametrize(
    ("filters", "exact"),
    [(2, (86_262, 138_812, 188_240)), (4, (285_420, 478_328, 664_992))],
)
def test_eenet8_has_its_real_costs(filters, exact):
    net = zoo.eenet("eenet8", input_shape=(1, 28, 28), filters=filters)
    torch.testing.assert_close(net.cost, torch.tensor(exact) / exact[-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("head", ["pool", "conv2"])
def test_path_cost_counts_every_head_met(head):
    net = zoo.eenet("eenet20", 3, "fine", head)
    heads = [macs(h, c.feature_shape)[0] for h, c in zip(net.heads, net.stage_costs, strict=True)]
    stages = [c.stage_macs for c in net.stage_costs]
    plain = macs(zoo.resnet("resnet20"), (3, 32, 32))[0]
    expected = [(sum(stages[: i + 1]) + sum(heads[: i + 1])) / plain for i in range(4)]
    torch.testing.assert_close(net.path_cost, torch.tensor(expected))
    assert float(net.path_cost[-1]) == pytest.approx(1.35 if head == "conv2" else 1.001, abs=0.005)


@pytest.mark.parametrize(
    ("name", "num_exits", "placement", "fit"),
    [
        ("eenet20", 8, "pareto", 7),
        ("eenet18", 8, "pareto", 7),
        ("eenet20", 10, "fine", 9),
        ("eenet32", 10, "pareto", 9),
    ],
)
def test_infeasible_placements_say_how_many_exits_fit(name, num_exits, placement, fit):
    with pytest.raises(ValueError, match=r"does not fit: (\d+) exits fit") as error:
        zoo.eenet(name, num_exits, placement)
    said = int(str(error.value).split("fit: ")[1].split()[0])
    assert said <= fit
    assert len(zoo.eenet(name, said, placement).config["placement"]) == said
    with pytest.raises(ValueError, match="does not fit"):
        zoo.eenet(name, said + 1, placement)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "eenet21"}, "name='eenet21' is unknown.*eenet8, eenet18"),
        ({"name": "eenet20", "placement": "golden"}, "placement='golden' is unknown.*gold_ratio"),
        ({"name": "eenet20", "placement": (2, 1)}, "placement=.2, 1. must be ascending"),
        ({"name": "eenet20", "placement": (10,)}, "in 1 … 9"),
        ({"name": "eenet20", "num_exits": 0}, "num_exits=0 must be at least 1"),
        ({"name": "eenet20", "head": "avg"}, "head='avg' is unknown.*bnpool"),
        ({"name": "eenet20", "criterion": "patience"}, "criterion='patience' is unknown"),
        ({"name": "eenet8", "num_exits": 3}, "EENet-8 has exactly 2"),
        ({"name": "eenet20", "input_shape": (32, 32)}, "input_shape=.* must be .C, H, W."),
        ({"name": "eenet20", "thresholds": (0.5,)}, "thresholds=.* must be 2 float32 numbers"),
        ({"name": "eenet20", "thresholds": (0.5, float("nan"))}, "none of them NaN"),
        ({"name": "eenet20", "normalization": ((0.5,), (0.5,))}, "needs 3 means"),
        ({"name": "eenet18", "head": "plain"}, r"head='plain' flattens a map of the input's size .32, 32., but"),
        ({"name": "eenet20", "head": "plain", "placement": (1, 5)}, r"here the map is .16, 16."),
    ],
)
def test_impossible_networks_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        zoo.eenet(**arguments)


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 47)])
def test_every_network_takes_any_shape_and_class_count(name, shape):
    net = zoo.eenet(name, 2, "linear", num_classes=7, input_shape=shape)
    outs = net.train()(images(2, shape))
    assert [tuple(o.logits.shape) for o in outs] == [(2, 7)] * 3
    assert all(tuple(o.confidence.shape) == (2,) for o in outs)


def test_weights_are_shared_with_the_plain_network():
    net = zoo.eenet("eenet20", 2).eval()
    x = images(3, (3, 32, 32))
    torch.testing.assert_close(net.plain()(x), net.all_exits(x)[-1].logits, rtol=0, atol=0)
