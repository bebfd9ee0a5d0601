"""Thresholds from cached outputs, against trying everything and against the network itself."""

import itertools
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, lived_in
from scipy import optimize

import eefast
from eefast import ExitOutput, criteria, zoo
from eefast.thresholds import calibration, evaluation
from eefast.thresholds.calibration import calibrate, collect, outcome, pareto_front

COST = torch.tensor([0.2, 0.5, 1.0])


def make_outputs(
    n: int, exits: int, seed: int, rounded: bool = False, classes: int = 4
) -> tuple[list[ExitOutput], torch.Tensor]:
    """Exits that get better with depth, and confidences that know a little about it."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=random)
    outputs = []
    for i in range(exits):
        logits = torch.randn(n, classes, generator=random) + (1.0 + i) * torch.nn.functional.one_hot(labels, classes)
        z = torch.randn(n, generator=random) + 2 * (logits.argmax(1) == labels)
        logits, z = (logits.round(), z.round()) if rounded else (logits, z)
        outputs.append(ExitOutput(logits, torch.sigmoid(z), z))
    return outputs, labels


def looped(outputs, labels, cost, criterion, thresholds) -> tuple[float, float]:
    """Sample by sample: the first exit whose float32 confidence is beyond its threshold."""
    rule = criteria.get(criterion)
    values = [rule.confidence(o.logits, o.confidence_logit).numpy() for o in outputs]
    right = spent = 0.0
    for row in range(len(labels)):
        taken = len(outputs) - 1
        for i in reversed(range(len(outputs) - 1)):
            t = np.float32(thresholds[i])
            if values[i][row] > t if rule.comparison == ">" else values[i][row] < t:
                taken = i
        right += int(outputs[taken].logits[row].argmax()) == int(labels[row])
        spent += float(cost[taken])
    return right / len(labels), spent / len(labels)


def every_point(outputs, labels, cost, criterion) -> list[tuple[float, float]]:
    """Accuracy and cost for all combinations of distinguishable thresholds."""
    rule = criteria.get(criterion)
    grids = []
    for out in outputs[:-1]:
        seen = np.unique(rule.confidence(out.logits, out.confidence_logit).numpy())
        # Between two neighbours among float32 numbers there is no threshold that ties with neither.
        between = [(a + b) / 2 for a, b in itertools.pairwise(seen) if np.nextafter(a, b) < b]
        grids.append([seen[0] - 1, *between, seen[-1] + 1])
    values = [rule.confidence(o.logits, o.confidence_logit).double().numpy() for o in outputs[:-1]]
    right = np.stack([(o.logits.argmax(1) == labels).numpy() for o in outputs])
    points = []
    for thresholds in itertools.product(*grids):
        taken = np.full(len(labels), len(outputs) - 1)
        for i in reversed(range(len(grids))):
            beyond = values[i] > thresholds[i] if rule.comparison == ">" else values[i] < thresholds[i]
            taken[beyond] = i
        points.append((right[taken, np.arange(len(labels))].mean(), cost.double().numpy()[taken].mean()))
    return points


def costs_of(exits: int) -> torch.Tensor:
    # Powers of two add up exactly, whatever the order.
    return torch.tensor([0.125, 0.25, 0.5, 1.0])[-exits:]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    exits=st.integers(2, 4),
    seed=st.integers(0, 10**6),
    criterion=st.sampled_from(list(criteria.CRITERIA)),
    rounded=st.booleans(),
    # Costs that differ from the bound by a rounding keep it.
    bound=st.floats(0.1, 1.0).map(lambda value: round(value, 6)),
    by_cost=st.booleans(),
)
def test_few_samples_are_exact(n, exits, seed, criterion, rounded, bound, by_cost) -> None:
    n = min(n, 7) if exits == 4 else n
    outputs, labels = make_outputs(n, exits, seed, rounded)
    cost = costs_of(exits)
    points = every_point(outputs, labels, cost, criterion)
    if by_cost:
        feasible = [(accuracy, -cost) for accuracy, cost in points if cost <= bound]
        wanted, nearest = {"max_cost": bound}, min(cost for _, cost in points)
    else:
        feasible = [(-cost, accuracy) for accuracy, cost in points if accuracy >= bound]
        wanted, nearest = {"min_accuracy": bound}, max(accuracy for accuracy, _ in points)
    if not feasible:
        words = r"at mean cost" if by_cost else "the nearest is accuracy"
        with pytest.raises(ValueError, match=rf"cannot be kept.*{words} {nearest:.4f}"):
            calibrate(outputs, labels, cost, criterion, **wanted)
        return
    found = calibrate(outputs, labels, cost, criterion, **wanted)
    got = (found.accuracy, -found.cost) if by_cost else (-found.cost, found.accuracy)
    assert got == pytest.approx(max(feasible))
    assert looped(outputs, labels, cost, criterion, found.thresholds) == pytest.approx((found.accuracy, found.cost))


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("exits", [2, 3])
def test_the_front_is_all_that_nothing_beats(criterion: str, exits: int) -> None:
    for seed in range(5):
        outputs, labels = make_outputs(11, exits, seed, rounded=seed % 2 == 0)
        points = set(every_point(outputs, labels, costs_of(exits), criterion))
        best = {(a, c) for a, c in points if not any(b >= a and d <= c and (b, d) != (a, c) for b, d in points)}
        found = pareto_front(outputs, labels, costs_of(exits), criterion)
        got = np.array([(f.accuracy, f.cost) for f in found])
        assert got == pytest.approx(np.array(sorted(best, key=lambda point: point[1])))
        for f in found:
            again = looped(outputs, labels, costs_of(exits), criterion, f.thresholds)
            assert again == pytest.approx((f.accuracy, f.cost))


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize(("n", "exits"), [(257, 3), (43, 4)])
def test_the_search_comes_close_to_the_optimum(monkeypatch, criterion: str, n: int, exits: int) -> None:
    cost = costs_of(exits)
    losses = []
    for seed in range(2):
        outputs, labels = make_outputs(n, exits, seed)
        for bound in (0.3, 0.5):
            monkeypatch.setattr(calibration, "EVERYTHING", 20_000_000)
            exact = calibrate(outputs, labels, cost, criterion, max_cost=bound)
            monkeypatch.setattr(calibration, "EVERYTHING", 0)
            found = calibrate(outputs, labels, cost, criterion, max_cost=bound)
            assert found.cost <= bound
            assert found.accuracy <= exact.accuracy
            losses.append(exact.accuracy - found.accuracy)
            found = calibrate(outputs, labels, cost, criterion, min_accuracy=exact.accuracy - 1e-9)
            assert found.cost <= exact.cost + 0.02
    # At most one sample more is wrong, and seldom that.
    assert max(losses) <= 1.01 / n
    assert sum(loss > 0 for loss in losses) <= 1


def test_two_thresholds_move_together(monkeypatch) -> None:
    """Within a bound that is used up no single threshold can move; here that would cost three to six points."""
    cost = torch.tensor([0.1, 0.55, 1.0])
    for seed in range(2):
        outputs, labels = make_outputs(1500, 3, seed)
        exact = calibrate(outputs, labels, cost, max_cost=0.3)
        with monkeypatch.context() as patched:
            patched.setattr(calibration, "EVERYTHING", 0)
            patched.setattr(calibration, "KICKS", 0)
            found = calibrate(outputs, labels, cost, max_cost=0.3)
        assert exact.accuracy - 0.001 <= found.accuracy <= exact.accuracy


def test_search_finds_a_planted_optimum() -> None:
    """3,000 samples of 12 kinds: at least what is best for the kinds, since a threshold may split a kind too."""
    kinds, kind_labels = make_outputs(12, 4, 5)
    points = every_point(kinds, kind_labels, costs_of(4), "learned")
    random = torch.Generator().manual_seed(0)
    outputs = []
    for out in kinds:
        z = out.confidence_logit.repeat(250) + 1e-4 * torch.rand(3000, generator=random)
        outputs.append(ExitOutput(out.logits.repeat(250, 1), torch.sigmoid(z), z))
    labels = kind_labels.repeat(250)
    for bound in (0.2, 0.3, 0.5):
        planted = max(accuracy for accuracy, cost in points if cost <= bound)
        found = calibrate(outputs, labels, costs_of(4), max_cost=bound)
        assert found.cost <= bound
        assert found.accuracy >= planted - 1e-9


def test_fifty_thousand_samples_and_eight_exits() -> None:
    """Measured in time of the processor, so that others' work does not count: 10 s on two cores."""
    outputs, labels = make_outputs(50_000, 8, 0, classes=10)
    begin = time.process_time()
    found = calibrate(outputs, labels, torch.linspace(0.1, 1, 8), max_cost=0.4)
    assert time.process_time() - begin < 20
    assert found.cost <= 0.4
    expected = outcome(outputs, labels, torch.linspace(0.1, 1, 8), "learned", found.thresholds)
    assert (found.accuracy, found.cost) == pytest.approx(expected)


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("rounded", [False, True])
def test_no_confidence_ties_with_its_threshold(criterion: str, rounded: bool) -> None:
    outputs, labels = make_outputs(257, 4, 0, rounded)
    cost = torch.tensor([0.1, 0.3, 0.6, 1.0])
    for bound in (0.2, 0.35, 0.5, 1.0):
        found = calibrate(outputs, labels, cost, criterion, max_cost=bound)
        assert found.cost <= bound + 1e-9
        for out, threshold in zip(outputs, found.thresholds, strict=False):
            values = criteria.get(criterion).confidence(out.logits, out.confidence_logit)
            assert not (values == torch.tensor(threshold, dtype=torch.float32)).any()
        expected = looped(outputs, labels, cost, criterion, found.thresholds)
        assert (found.accuracy, found.cost) == pytest.approx(expected)
        assert outcome(outputs, labels, cost, criterion, found.thresholds) == pytest.approx(expected)


def test_nan_confidence_never_leaves() -> None:
    outputs, labels = make_outputs(31, 2, 0)
    outputs[0].confidence_logit[:5] = float("nan")
    found = calibrate(outputs, labels, COST[:2], max_cost=0.2 + 0.3 * 5 / 31 + 1e-6)
    assert found.cost == pytest.approx(0.2 + 0.3 * 5 / 31)
    with pytest.raises(ValueError, match="cannot be kept"):
        calibrate(outputs, labels, COST[:2], max_cost=0.2 + 0.3 * 4 / 31)


def test_many_exits_with_few_cuts_are_searched_and_not_tried_one_and_all() -> None:
    """Five cuts at each of eight exits: few combinations, but a pass over 3,000 samples for each would take minutes."""
    outputs, labels = make_outputs(3000, 9, 0)
    outputs = [out._replace(confidence_logit=out.confidence_logit.clamp(-1, 3).round()) for out in outputs]
    begin = time.process_time()
    found = calibrate(outputs, labels, torch.linspace(0.1, 1, 9), max_cost=0.4)
    assert time.process_time() - begin < 20
    assert found.cost <= 0.4


def test_bad_arguments() -> None:
    outputs, labels = make_outputs(3, 3, 0)
    for both in ({}, {"min_accuracy": 0.5, "max_cost": 0.5}):
        with pytest.raises(ValueError, match="exactly one of them"):
            calibrate(outputs, labels, COST, **both)
    with pytest.raises(ValueError, match="criterion='best' is unknown"):
        calibrate(outputs, labels, COST, "best", max_cost=0.5)
    with pytest.raises(ValueError, match="0 samples"):
        calibrate([ExitOutput(*(part[:0] for part in o)) for o in outputs], labels[:0], COST, max_cost=0.5)
    with pytest.raises(ValueError, match="3 samples, 0 early exits"):
        calibrate(outputs[-1:], labels, COST[-1:], max_cost=0.5)
    outputs[0].confidence_logit[:] = float("nan")
    with pytest.raises(ValueError, match="no confidence that is a number"):
        calibrate(outputs, labels, COST, max_cost=0.5)
    net = zoo.eenet("eenet8", input_shape=(1, 28, 28))
    with pytest.raises(ValueError, match="batches is empty"):
        collect(net, [])


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_thresholds_do_in_the_network_what_was_promised(criterion: str) -> None:
    torch.manual_seed(0)
    net = zoo.eenet("eenet8", input_shape=(1, 12, 12), criterion=criterion).train()
    images, labels = torch.randn(67, 1, 12, 12), torch.randint(10, (67,))
    net(images)
    batches = [(images[:33], labels[:33]), (images[33:], labels[33:])]
    outputs, cached = collect(net, batches)
    assert net.training
    assert torch.equal(cached, labels)
    found = calibrate(outputs, labels, net.cost, criterion, max_cost=0.8)
    net.thresholds.copy_(torch.tensor(found.thresholds))
    result = net.eval()(images)
    assert (result.labels == labels).double().mean().item() == pytest.approx(found.accuracy)
    assert result.cost.double().mean().item() == pytest.approx(found.cost, abs=1e-6)
    assert len(set(result.exit_index.tolist())) > 1


def test_cached_outputs_come_back_bit_by_bit(tmp_path) -> None:
    outputs, labels = make_outputs(31, 3, 0)
    outputs[1].confidence_logit[3] = float("nan")
    path, made_of = tmp_path / "held.safetensors", {"network": "abc", "images": "31 of some"}
    calibration.save_outputs(path, outputs, labels, made_of)
    again, same = calibration.load_outputs(path, made_of)
    assert torch.equal(same, labels)
    for one, two in zip(outputs, again, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))
    with pytest.raises(ValueError, match=r"was collected with images=31 of some, not 7; delete it or name another"):
        calibration.load_outputs(path, {**made_of, "images": "7"})
    with pytest.raises(ValueError, match=r"was collected with network=abc, not None"):
        calibration.load_outputs(path, {"images": "31 of some"})


def test_damaged_cache_is_named(tmp_path) -> None:
    outputs, labels = make_outputs(3, 2, 0)
    path = tmp_path / "held.safetensors"
    calibration.save_outputs(path, outputs, labels, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"held.safetensors is no whole file of cached outputs.*delete it"):
        calibration.load_outputs(path, {})
    path.write_bytes(whole.replace(b"labels", b"labelz"))
    with pytest.raises(ValueError, match="no whole file of cached outputs"):
        calibration.load_outputs(path, {})


def test_fingerprint_follows_weights_and_not_thresholds() -> None:
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 0)
    before = calibration.fingerprint(net)
    net.thresholds.fill_(0.1)
    assert calibration.fingerprint(net) == before
    next(net.parameters()).data[0] += 1e-6
    assert calibration.fingerprint(net) != before


def test_scaling_is_the_optimum_that_scipy_finds() -> None:
    outputs, labels = make_outputs(257, 3, 1)
    # Three times too sure of itself, and a row that is right about what is wrong.
    outputs[1] = outputs[1]._replace(logits=3 * outputs[1].logits, confidence_logit=-outputs[1].confidence_logit)
    found = calibration.fit_scaling(outputs, labels)
    for i, out in enumerate(outputs):
        logits, z = out.logits.double().numpy(), out.confidence_logit.double().numpy()
        rows, right = np.arange(257), (out.logits.argmax(1) == labels).numpy()

        def nll(t, logits=logits, rows=rows):
            x = logits / np.exp(t)
            return np.mean(np.log(np.exp(x).sum(1)) - x[rows, labels.numpy()])

        def line_nll(p, z=z, right=right):
            target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
            x = p[0] * z + p[1]
            return np.mean(np.log1p(np.exp(x)) - target * x)

        assert np.log(found.temperature[i]) == pytest.approx(optimize.minimize_scalar(nll).x, abs=1e-4)
        line = optimize.minimize(line_nll, [1.0, 0.0], tol=1e-10).x
        assert (found.slope[i], found.offset[i]) == pytest.approx(line, abs=1e-3)
    assert found.slope[1] < 0 < found.slope[0]


def test_scaling_keeps_labels_and_lowers_calibration_errors() -> None:
    outputs, labels = make_outputs(3000, 3, 1)
    outputs = [out._replace(logits=4 * out.logits) for out in outputs]
    after = calibration.scaled(outputs, calibration.fit_scaling(outputs, labels))
    for one, two in zip(outputs, after, strict=True):
        assert torch.equal(one.logits.argmax(1), two.logits.argmax(1))
        assert torch.equal(two.confidence, torch.sigmoid(two.confidence_logit))
    before, after = (evaluation.exit_quality(o, labels) for o in (outputs, after))
    for one, two in zip(before, after, strict=True):
        assert two.probability_error < 0.5 * one.probability_error
        assert two.confidence_error < 0.5 * one.confidence_error
    # The order of the learned confidences stays, so its front does.
    points = [
        np.array([(f.accuracy, f.cost) for f in pareto_front(o[1:], labels, costs_of(2))])
        for o in (outputs, calibration.scaled(outputs, calibration.fit_scaling(outputs, labels)))
    ]
    assert points[0] == pytest.approx(points[1])


def test_all_right_and_all_wrong_stay_finite() -> None:
    outputs, labels = make_outputs(31, 2, 0)
    perfect = torch.nn.functional.one_hot(labels, 4).float()
    outputs = [outputs[0]._replace(logits=perfect), outputs[1]._replace(logits=-perfect)]
    found = calibration.fit_scaling(outputs, labels)
    assert found.temperature == pytest.approx((np.exp(-3), np.exp(3)), rel=0.05)
    assert torch.tensor([found.slope, found.offset]).isfinite().all()


def test_folded_scaling_answers_as_scaled_outputs() -> None:
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 0)
    x, labels = images(31, (1, 12, 12)), torch.arange(31) % 10
    outputs, _ = collect(net, [(x, labels)])
    scaling = calibration.fit_scaling(outputs, labels)
    calibration.fold_scaling(net, scaling)
    expected = calibration.scaled([ExitOutput(*(p.double() for p in out)) for out in outputs], scaling)
    again, _ = collect(net, [(x, labels)])
    for one, two in zip(expected, again, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-5)
    net.heads[1].confidence = torch.nn.Identity()
    weight = net.heads[0].classifier.weight.clone()
    with pytest.raises(ValueError, match="head 1 has no linear layers"):
        calibration.fold_scaling(net, scaling)
    assert torch.equal(weight, net.heads[0].classifier.weight)


def test_nothing_to_fit_is_said() -> None:
    outputs, labels = make_outputs(3, 2, 0)
    with pytest.raises(ValueError, match="exit 0 has 0 samples"):
        calibration.fit_scaling([ExitOutput(*(part[:0] for part in o)) for o in outputs], labels[:0])
    outputs[1].logits[0, 0] = float("nan")
    with pytest.raises(ValueError, match="exit 1 has 3 samples, or outputs that are no numbers"):
        calibration.fit_scaling(outputs, labels)


def test_saved_thresholds_load_with_their_criterion(tmp_path) -> None:
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 0)
    one = calibration.Calibration("margin", (0.25, 0.75), 0.9, 0.5)
    two = calibration.Calibration("learned", (0.5, 0.125), 0.9, 0.5)
    for chosen, kept in (({"margin": one, "learned": two}, two), ({"margin": one}, one)):
        calibration.save_thresholds(net, tmp_path, chosen)
        loaded = eefast.load(tmp_path)
        assert loaded.criterion.name == kept.criterion
        assert loaded.thresholds.tolist() == list(kept.thresholds)
        assert json.loads((tmp_path / "thresholds.json").read_text()) == {
            name: list(c.thresholds) for name, c in chosen.items()
        }
        assert not list(tmp_path.glob("*.partial"))
