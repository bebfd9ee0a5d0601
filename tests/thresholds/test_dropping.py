"""Exits that do not pay for their heads, and networks without them."""

import itertools

import pytest
import torch
from made_outputs import make_outputs
from networks import images, lived_in, one_by_one, spread_thresholds
from torch import nn

import eefast
from eefast import EarlyExitNet, Preprocessing, Profile, criteria, zoo
from eefast.cost import StageCost, merged, path_costs
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.dropping import find_thresholds_and_exits

COSTS = [StageCost(100, head, (8, 1, 1), 4) for head in (5, 400, 5, 300, 20)]


@pytest.mark.parametrize("bounds", [{"max_accuracy_drop": 0.1}, {"max_cost": 1.2}], ids=["drop", "cost"])
def test_no_single_exit_pays_any_longer(bounds) -> None:
    outputs, labels = make_outputs(301, 5, 0)

    def without(left_out):
        cost = path_costs(merged(COSTS, left_out))[1]
        kept = [out for i, out in enumerate(outputs) if i not in left_out]
        found = calibrate(kept, labels, cost, **bounds)
        return (found.accuracy, -found.cost) if "max_cost" in bounds else (-found.cost, found.accuracy)

    left_out, found = find_thresholds_and_exits(outputs, labels, COSTS, **bounds)
    assert {1} <= set(left_out) < set(range(4))
    got = without(left_out)
    assert got == pytest.approx(
        (found.accuracy, -found.cost) if "max_cost" in bounds else (-found.cost, found.accuracy)
    )
    assert got > without(())
    others = [set(left_out) | {i} for i in range(4) if i not in left_out and len(left_out) < 3]
    assert all(without(sorted(other)) <= got for other in others)


def test_with_an_assurance_the_judges_choose_no_exit() -> None:
    outputs, labels = make_outputs(1001, 5, 1)
    left_out, found = find_thresholds_and_exits(outputs, labels, COSTS, max_accuracy_drop=0.1, assurance=0.9)
    assert (found.assurance, found.judged_by) == (0.9, 701)
    order = torch.randperm(1001, generator=torch.Generator().manual_seed(0))
    changed = labels.clone()
    changed[order[300:]] = (labels[order[300:]] + torch.arange(701) % 2) % 4
    again, _ = find_thresholds_and_exits(outputs, changed, COSTS, max_accuracy_drop=0.1, assurance=0.5)
    assert left_out == again != ()


@pytest.mark.parametrize("criterion", criteria.CARRYING)
def test_rules_that_read_the_exits_before_lose_none(criterion) -> None:
    outputs, labels = make_outputs(31, 5, 0)
    with pytest.raises(ValueError, match=f"criterion='{criterion}' reads the exits before; leave exits out by another"):
        find_thresholds_and_exits(outputs, labels, COSTS, criterion, max_cost=1.2)


def made(exits: int = 4) -> EarlyExitNet:
    net = lived_in(zoo.eenet("eenet20", exits, "linear", input_shape=(3, 8, 8)), 0).eval()
    spread_thresholds(net, images(64, (3, 8, 8)), 0.4)
    return net


@pytest.mark.parametrize("gone", [g for n in range(5) for g in itertools.combinations(range(4), n)], ids=str)
@pytest.mark.sampled(8)
def test_a_network_without_exits_answers_as_if_they_let_nothing_exit(gone) -> None:
    net, x = made(), images(31, (3, 8, 8))
    net.profiles = {"eco": Profile(tuple(net.thresholds.tolist()), 2)}
    short = net.without_exits(gone)
    kept = [i for i in range(5) if i not in gone]
    never = net.with_criterion("learned", [1e9 if i in gone else float(net.thresholds[i]) for i in range(4)]).eval()
    expected = one_by_one(never, x)
    got = short(x)
    assert torch.tensor(kept)[got.exit_index].tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(short.cost, net.cost[kept])
    counted = EarlyExitNet(list(short.stages), list(short.heads), input_shape=(3, 8, 8))
    torch.testing.assert_close(short.path_cost, counted.path_cost)
    assert short.profiles["eco"].last_exit == next(k for k, i in enumerate(kept) if i >= 2)
    for engine in ("resident", "compact") if gone == (1, 2) else ():
        assert torch.equal(eefast.accelerate(short, engine=engine)(x).exit_index, got.exit_index)
    assert {id(p) for p in short.parameters()} <= {id(p) for p in net.parameters()}


@pytest.mark.parametrize("gone", [(), (0,), (1, 2), (0, 2, 3)], ids=str)
def test_it_can_be_saved(tmp_path, gone) -> None:
    net, x = made(), images(7, (3, 8, 8))
    net.preprocessing, net.classes = Preprocessing(8), tuple("abcdefghij")
    short = net.without_exits(gone)
    short.save(tmp_path)
    loaded = eefast.load(tmp_path)
    assert loaded.num_exits == 4 - len(gone)
    assert (loaded.preprocessing, loaded.classes) == (net.preprocessing, net.classes)
    assert torch.equal(loaded(x).logits, short(x).logits)


def test_modules_that_are_frozen_stay_so() -> None:
    net = made().train()
    net.stages.eval()
    short = net.without_exits([1])
    assert short.training
    assert short.heads[0].training
    for one in (net, short):
        assert not any(m.training for stage in one.stages for m in stage.modules() if not isinstance(m, nn.Sequential))


def test_hooks_of_joined_stages_stay() -> None:
    net, x = made(), images(7, (3, 8, 8))
    net.stages[1].register_forward_hook(lambda module, received, returned: returned * 2)
    for exits in ([1], [0, 2]):
        expected = net.all_exits(x)[-1].logits
        torch.testing.assert_close(net.without_exits(exits).all_exits(x)[-1].logits, expected)


def test_what_cannot_be_left_out_is_refused() -> None:
    net = made()
    for exits in ([4], [-1], [1, 1]):
        with pytest.raises(ValueError, match=r"must be different early exits, of 0 … 3"):
            net.without_exits(exits)
    with pytest.raises(ValueError, match=r"built from eenet20 without its exits \[0, 1, 2, 3\]"):
        net.without_exits(range(4)).save("nowhere")
    made_of = eefast.quantize(net, images(64, (3, 8, 8)))
    with pytest.raises(ValueError, match="a quantised network keeps its exits"):
        made_of.without_exits([0])
