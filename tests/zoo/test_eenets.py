"""Exit positions, costs and sizes of the zoo against the published reference's, recomputed by running its code."""

import pytest
import torch
from networks import images

from eefast import zoo

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
@pytest.mark.sampled(8)
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


@pytest.mark.parametrize("name", ["eenet18", "eenet20", "eenet110"])
def test_more_exits_than_any_network_has_blocks(name):
    with pytest.raises(ValueError, match=r"num_exits=99 with placement='linear' does not fit: \d+ exits fit into"):
        zoo.eenet(name, 99, "linear")


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
        ({"name": "eenet20", "placement": (1, 10**30)}, "must be ascending numbers of blocks in 0 … 9"),
        ({"name": "eenet20", "placement": (-1, 2)}, "must be ascending numbers of blocks in 0 … 9"),
        ({"name": "eenet20", "placement": (2, 2)}, "must be ascending numbers of blocks in 0 … 9"),
        ({"name": "eenet20", "placement": ()}, "must be ascending numbers of blocks in 0 … 9"),
        ({"name": "eenet20", "num_exits": -5}, "num_exits=-5 must be at least 1"),
        ({"name": "eenet21"}, "name='eenet21' is unknown.*eenet8, eenet18"),
        ({"name": "eenet20", "placement": "golden"}, "placement='golden' is unknown.*gold_ratio"),
        ({"name": "eenet20", "placement": (2, 1)}, "placement=.2, 1. must be ascending"),
        ({"name": "eenet20", "placement": (10,)}, "in 0 … 9"),
        ({"name": "eenet20", "num_exits": 0}, "num_exits=0 must be at least 1"),
        ({"name": "eenet20", "head": "avg"}, "head='avg' is unknown.*bnpool"),
        ({"name": "eenet20", "criterion": "hope"}, "criterion='hope' is unknown"),
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
@pytest.mark.sampled(4)
def test_every_network_takes_any_shape_and_class_count(name, shape):
    net = zoo.eenet(name, 2, "linear", num_classes=7, input_shape=shape)
    outs = net.train()(images(2, shape))
    assert [tuple(o.logits.shape) for o in outs] == [(2, 7)] * 3
    assert all(tuple(o.confidence.shape) == (2,) for o in outs)


@torch.no_grad()
def test_an_exit_after_the_stem_leaves_the_network_as_it_is():
    net, plain = zoo.eenet("eenet20", placement=(0, 4)).eval(), zoo.resnet("resnet20").eval()
    assert [len(stage) for stage in net.stages] == [1, 4, 5]
    values = (*net.stages.state_dict().values(), *net.heads[-1].classifier.state_dict().values())
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    x = images(3, (3, 32, 32))
    assert torch.equal(net.all_exits(x)[-1].logits, plain(x))
    # The stem is a convolution of 3×3×3, BatchNorm, ReLU, 16 channels of 32×32.
    assert net.stage_costs[0].stage_macs == 16 * 32 * 32 * (27 + 2 + 1)
    assert torch.equal(net.cost[1:], zoo.eenet("eenet20", placement=(4,)).cost)


def test_weights_are_shared_with_the_plain_network():
    net = zoo.eenet("eenet20", 2).eval()
    x = images(3, (3, 32, 32))
    torch.testing.assert_close(net.plain()(x), net.all_exits(x)[-1].logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["eenet8", "eenet18", "eenet34", "eenet50", "eenet101", "eenet152"])
def test_plain_heads_need_maps_of_the_size_of_the_images(name):
    with pytest.raises(ValueError, match="head='plain' flattens"):
        zoo.eenet(name, 2, "fine", "plain", 10, (3, 16, 16), device="meta")
