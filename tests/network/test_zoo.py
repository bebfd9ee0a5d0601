"""Exit positions, costs and sizes of the zoo against the published reference's, recomputed by running its code."""

import time

import numpy as np
import pytest
import torch
from networks import images

from eefast import zoo
from eefast.cost import macs
from eefast.zoo.placement import SCHEMES, place

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
    net = zoo.eenet(f"eenet{depth}", 3, scheme, device="meta")
    assert net.config["placement"] == [int(b) for b in blocks.split(",")]
    expected = torch.tensor([*map(float, costs.split()), 1.0])
    torch.testing.assert_close(net.cost, expected, rtol=0, atol=0.001)


def test_the_readme_configuration_of_the_reference():
    net = zoo.eenet("eenet110", 8, "fine", device="meta")
    assert net.config["placement"] == [3, 6, 8, 10, 12, 14, 16, 18]
    expected = torch.tensor([0.058, 0.115, 0.152, 0.190, 0.227, 0.265, 0.303, 0.340, 1.0])
    torch.testing.assert_close(net.cost, expected, rtol=0, atol=0.001)
    assert zoo.eenet("eenet110", 10, "fine", device="meta").config["placement"][8:] == [20, 22]


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
def test_macs_of_the_plain_networks(name, shape, classes, mmacs):
    with torch.device("meta"):
        net = zoo.resnet(name, classes, shape)
    counted, out = macs(net, shape)
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
    assert len(zoo.eenet(name, said, placement, device="meta").config["placement"]) == said
    with pytest.raises(ValueError, match="does not fit"):
        zoo.eenet(name, said + 1, placement)


def longest(costs, placement):
    """The most exits that the scheme fits into the blocks, by trying every number with the definition itself."""
    found = 0
    for n in range(1, len(costs) + 1):
        exits = 0
        for cost in costs:
            exits += exits < n and cost >= SCHEMES[placement](exits, n)
        found = n if exits == n else found
    return found


@pytest.mark.parametrize("placement", SCHEMES)
@pytest.mark.parametrize("blocks", [0, 1, 3, 9, 54, 257])
def test_the_number_of_exits_that_fit_is_counted_at_once(blocks, placement):
    """Asking for thousands of exits takes no longer than for one too many."""
    random = torch.Generator().manual_seed(blocks)
    costs = torch.rand(blocks, generator=random).cumsum(0).div(blocks / 2 + 1).tolist()
    fit = longest(costs, placement)
    assert fit == 0 or len(place(costs, fit, placement)) == fit
    begin = time.process_time()
    for num_exits in (blocks + 1, 99 + blocks, 10**9, 10**400):
        with pytest.raises(ValueError, match=rf"num_exits={num_exits} .* fit: {fit} exits fit into {blocks} blocks"):
            place(costs, num_exits, placement)
    # Each try costs about as much as n placements; calling itself for each it took twice as long per exit.
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("name", ["eenet18", "eenet20", "eenet110"])
def test_more_exits_than_any_network_has_blocks(name):
    with pytest.raises(ValueError, match=r"num_exits=99 with placement='linear' does not fit: \d+ exits fit into"):
        zoo.eenet(name, 99, "linear")


@pytest.mark.parametrize("whole", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_other_libraries(whole):
    assert place([0.2, 0.5, 0.7, 1.0], whole, "linear") == place([0.2, 0.5, 0.7, 1.0], 3, "linear") == (2, 3, 4)
    assert place([0.2, 0.5, 0.7, 1.0], 1, [whole]) == (3,)


@pytest.mark.parametrize("wild", [True, 2.0, 2.5, float("nan"), float("inf"), "2", None, [2]])
def test_what_is_no_whole_number_is_refused(wild):
    with pytest.raises(ValueError, match=r"num_exits=.*: give whole numbers"):
        zoo.eenet("eenet20", wild)
    with pytest.raises(ValueError, match=r"placement=.*: give whole numbers"):
        zoo.eenet("eenet20", placement=[1, wild])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "eenet20", "placement": 3}, "placement=3 must be one of fine, .*, or numbers"),
        ({"name": "eenet20", "placement": None}, "placement=None must be one of"),
        ({"name": "eenet20", "placement": (1, 10**30)}, "must be ascending numbers of blocks in 1 … 9"),
        ({"name": "eenet20", "placement": (-1, 2)}, "must be ascending numbers of blocks in 1 … 9"),
        ({"name": "eenet20", "placement": (2, 2)}, "must be ascending numbers of blocks in 1 … 9"),
        ({"name": "eenet20", "placement": ()}, "must be ascending numbers of blocks in 1 … 9"),
        ({"name": "eenet20", "num_exits": -5}, "num_exits=-5 must be at least 1"),
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


# One of each kind of block and stem.
KINDS = ("eenet8", "eenet18", "eenet20", "eenet50")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in KINDS)) for name in zoo.names()]
)
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


@pytest.mark.parametrize("name", ["resnet21", "resnet²", "resnet" + "9" * 5000, "eenet20", ""])
def test_unknown_plain_networks(name):
    with pytest.raises(ValueError, match="is unknown; choose one of resnet18, resnet20"):
        zoo.resnet(name)
