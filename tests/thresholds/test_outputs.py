"""Cached outputs of all exits: written, read, and what they answer under thresholds."""

import pytest
import torch
from made_outputs import make_outputs
from networks import images, lived_in, spread_thresholds

from eefast import criteria, fingerprints, rules, zoo
from eefast.cost import StageCost
from eefast.online import BudgetController
from eefast.thresholds import outputs as cached
from eefast.thresholds.benefit import benefit_curve
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.candidates import make_candidate
from eefast.thresholds.comparing import compare
from eefast.thresholds.cuts import Cuts
from eefast.thresholds.dropping import find_thresholds_and_exits
from eefast.thresholds.evaluation import exit_quality
from eefast.thresholds.scaling import fit_scaling


def test_cached_outputs_come_back_bit_by_bit(tmp_path) -> None:
    outputs, labels = make_outputs(31, 3, 0)
    outputs[1].confidence_logit[3] = float("nan")
    path, made_of = tmp_path / "held.safetensors", {"network": "abc", "images": "31 of some"}
    cached.save_outputs(path, outputs, labels, made_of)
    again, same = cached.load_outputs(path, made_of)
    assert torch.equal(same, labels)
    for one, two in zip(outputs, again, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))
    with pytest.raises(ValueError, match=r"was collected with images=31 of some, not 7; delete it or name another"):
        cached.load_outputs(path, {**made_of, "images": "7"})
    with pytest.raises(ValueError, match=r"was collected with network=abc, not None"):
        cached.load_outputs(path, {"images": "31 of some"})


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-5], lambda whole: whole.replace(b"labels", b"labelz")], ids=["cut off", "renamed"]
)
def test_damaged_cache_is_named(tmp_path, damage) -> None:
    outputs, labels = make_outputs(3, 2, 0)
    path = tmp_path / "held.safetensors"
    cached.save_outputs(path, outputs, labels, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"held.safetensors is not a complete file of cached outputs.*delete it"):
        cached.load_outputs(path, {})


@pytest.mark.parametrize("criterion", ["learned", "entropy"])
def test_cached_outputs_answer_as_the_network(criterion) -> None:
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12), criterion=criterion), 1)
    x = images(31, (1, 12, 12))
    spread_thresholds(net, x, 0.4)
    outputs, _ = cached.collect(net, [(x, torch.zeros(31))])
    got = cached.by_thresholds(outputs, net, criterion, net.thresholds)
    expected = net(x)
    assert torch.equal(got.exit_index, expected.exit_index)
    assert torch.equal(got.cost, expected.cost)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("collect", [cached.collect, cached.collect_answers])
def test_batches_must_not_be_empty(collect) -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        collect(zoo.eenet("eenet8", input_shape=(1, 28, 28)), [])


COST = torch.tensor([0.2, 0.5, 1.0])


@pytest.mark.parametrize(
    "use",
    [
        lambda outputs, labels: cached.outcome(outputs, labels, COST, "margin", [0.5] * 2),
        lambda outputs, labels: benefit_curve(outputs, labels, COST, "margin"),
        lambda outputs, labels: Cuts(outputs, labels, COST, "margin"),
        lambda outputs, labels: calibrate(outputs, labels, COST, "margin", max_cost=0.9),
        lambda outputs, labels: calibrate(outputs, labels, COST, "margin", max_cost=0.9, assurance=0.5),
        lambda outputs, labels: find_thresholds_and_exits(
            outputs, labels, [StageCost(100, 5, (8, 1, 1), 4)] * 3, "margin", max_cost=2.0
        ),
        lambda outputs, labels: exit_quality(outputs, labels),
        lambda outputs, labels: fit_scaling(outputs, labels),
        lambda outputs, labels: make_candidate("vote", outputs, labels),
        lambda outputs, labels: make_candidate("fitted", outputs, labels),
        lambda outputs, labels: compare(outputs, labels, COST, ["margin"], 0.5),
        lambda outputs, labels: BudgetController.from_outputs(outputs, labels, COST, "margin", 0.6),
        lambda outputs, labels: cached.collect(
            zoo.eenet("eenet8", input_shape=(1, 12, 12)), [(images(127, (1, 12, 12)), labels)]
        ),
        lambda outputs, labels: cached.collect_answers(
            zoo.eenet("eenet8", input_shape=(1, 12, 12)).eval(), [(images(127, (1, 12, 12)), labels)]
        ),
    ],
)
def test_labels_of_another_shape_are_refused(use) -> None:
    outputs, labels = make_outputs(127, 3, 0)
    for wrong in (labels[:, None], labels[:1], torch.nn.functional.one_hot(labels)):
        with pytest.raises(
            ValueError, match=r"labels has shape \(.*\) for 127 samples; give the class of each, \(127,\)"
        ):
            use(outputs, wrong)


def test_rows_of_thresholds_are_as_each_alone() -> None:
    outputs, _ = make_outputs(31, 4, 0)
    rows = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    found = cached.exits_taken(outputs, criteria.get("entropy"), rows)
    assert found.shape == (5, 31)
    for row, taken in zip(rows, found, strict=True):
        assert torch.equal(taken, cached.exits_taken(outputs, criteria.get("entropy"), row.tolist()))


def test_carried_outputs_are_counted_by_hand() -> None:
    outputs, _ = make_outputs(31, 4, 1, classes=2)
    found = cached.carried(outputs, rules.patience(3))
    for k in range(31):
        streak, before = 0, None
        for out, got in zip(outputs, found, strict=True):
            said = int(out.logits[k].argmax())
            streak, before = streak + 1 if said == before else 1, said
            assert got.confidence[k] == got.confidence_logit[k] == streak
            assert torch.equal(got.logits[k], out.logits[k])
    summed = cached.carried(outputs, rules.carried([0.0, 0.5, 1.0, -2.0]))
    a, b, c, d = (out.logits for out in outputs)
    torch.testing.assert_close(summed[2].logits, c + (b + 0.5 * a))
    torch.testing.assert_close(summed[3].logits, d - 2 * (c + (b + 0.5 * a)))
    torch.testing.assert_close(summed[3].confidence, summed[3].logits.softmax(1).amax(1))


def test_a_rule_in_python_sees_the_exit_before() -> None:
    def step(i, logits, z, before, confidence):
        return (logits, z) if i == 0 else (torch.maximum(logits, before), z + i * confidence)

    outputs, _ = make_outputs(31, 3, 1)
    a, b, c = outputs
    found = cached.carried(outputs, rules.PythonRule("highest", step))
    assert torch.equal(found[2].logits, torch.stack([a.logits, b.logits, c.logits]).amax(0))
    torch.testing.assert_close(found[2].confidence, c.confidence_logit + 2 * (b.confidence_logit + a.confidence_logit))
    with pytest.raises(ValueError, match="the rule is of 3 early exits, the outputs are of 2"):
        cached.carried(outputs, rules.patience(3))


def test_outputs_of_a_network_that_carries_answer_as_it_does() -> None:
    x = images(31, (1, 12, 12))
    plain = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 1)
    outputs, _ = cached.collect(plain, [(x, torch.zeros(31))])
    net = plain.with_criterion(rules.carried([0.0, 0.4, 0.3])).eval()
    assert fingerprints.weights(net) == fingerprints.weights(plain)
    confidence = torch.stack([out.confidence for out in cached.answered(outputs, net)[:-1]])
    net.thresholds.copy_(confidence.sort(dim=1).values[:, 14:16].mean(dim=1))
    got, expected = cached.by_thresholds(outputs, net, "carried", net.thresholds.tolist()), net(x)
    assert torch.equal(got.exit_index, expected.exit_index)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.confidence, expected.confidence)
    # An image that takes another exit is as far from the threshold as its carried confidence is.
    taken = expected.exit_index.clone()
    taken[3] = 1 - min(int(taken[3]), 1)
    earlier = min(int(taken[3]), int(expected.exit_index[3]))
    distance = cached.flip_distances(taken, expected.exit_index, outputs, net)
    assert distance.tolist() == [abs(float(confidence[earlier, 3] - net.thresholds[earlier]))]
    for one, two in zip(cached.answered(outputs, plain), outputs, strict=True):
        assert one is two
