"""Tables of rules that carry: what they hold, what is refused, how a network keeps, saves and changes them."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from rule_cases import agreeing_outputs, as_images, cases, check, check_random, random_rule, speaking_network

import eefast
from eefast import criteria, rules

EXITS, CLASSES = 4, 10


@pytest.fixture
def net() -> eefast.EarlyExitNet:
    return speaking_network(EXITS, CLASSES, rules.vote([1.0, 2.0, 3.0, 4.0]), [0.9, 1.5, 2.5])


@pytest.mark.parametrize(("exits", "classes"), [(2, 1), (4, 10), (9, 7)])
@pytest.mark.parametrize("place", range(5), ids=[case.name for case in cases(2)])
def test_the_network_answers_by_the_rule_s_definition(place: int, exits: int, classes: int) -> None:
    case, outputs = cases(exits)[place], agreeing_outputs(67, exits, classes)
    answer = speaking_network(exits, classes, case.rule, case.thresholds)(as_images(outputs))
    assert check(case, outputs, answer.exit_index, answer.confidence.detach()) <= 1
    if classes > 1:
        assert len(answer.exit_index.unique()) > 1


@pytest.mark.parametrize("seed", range(8))
def test_any_table_is_its_formula_in_float64(seed: int) -> None:
    rule, outputs = random_rule(EXITS, seed), agreeing_outputs(257, EXITS, CLASSES, seed)
    with torch.no_grad():
        answer = speaking_network(EXITS, CLASSES, rule, [0.3] * 3)(as_images(outputs))
    assert check_random(outputs, rule, [0.3] * 3, answer.logits, answer.confidence, answer.exit_index) < 13


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_one_column_is_the_criterion_of_that_name(name: str) -> None:
    x = as_images(agreeing_outputs(31, EXITS, CLASSES))
    sign = -1 if name == "entropy" else 1
    thresholds = [0.9, 0.7, 0.5] if name == "entropy" else [0.6, 0.5, 0.4]
    plain = speaking_network(EXITS, CLASSES, name, thresholds)(x)
    table = speaking_network(EXITS, CLASSES, rules.stateless(name, 3), [sign * t for t in thresholds])(x)
    assert torch.equal(table.exit_index, plain.exit_index)
    assert torch.equal(table.logits, plain.logits)
    assert torch.equal(sign * table.confidence, plain.confidence)


def said(*exits: list[float]) -> torch.Tensor:
    """One image's logits and confidence row at every exit."""
    return as_images(torch.tensor([exits]))


def test_a_class_is_the_first_of_the_largest() -> None:
    net = speaking_network(3, 2, rules.patience(2), [1.5, 1.5])
    assert net(said([1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0])).exit_index.tolist() == [1]
    assert net(said([1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0])).exit_index.tolist() == [2]


def carried_through(rule: rules.Rule, outputs: torch.Tensor) -> list[float]:
    """The number s of every exit; outputs: [exits, K + 1] of one image."""
    logits, s, found = None, None, []
    for row, out in zip(rule.table(), outputs, strict=True):
        logits, s = criteria.carry(out[None, :-1], out[-1:], row, logits, s)
        found.append(float(s))
    return found


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("rule", [rules.patience(3), rules.vote([1.0] * 4), rules.carried([0.0, 1.0, 1.0, 1.0])])
def test_a_nan_in_logits_stays_to_the_end(rule: rules.Rule) -> None:
    outputs = torch.tensor([[2.0, 1.0, 0.0]] * 4)
    outputs[1, 1] = NAN
    found = torch.tensor(carried_through(rule, outputs)).isnan().tolist()
    assert found == [False, True, True, True]


def test_numbers_that_are_left_out_may_be_anything() -> None:
    outputs = torch.tensor([[NAN, INF, 0.5]] * 4)
    learned = float(torch.tensor(0.5).sigmoid())
    assert carried_through(rules.stateless("learned", 3), outputs) == [learned] * 4
    assert carried_through(rules.survival(3), outputs)[3] == pytest.approx(4 * 0.974077)
    infinite = torch.tensor([[2.0, 1.0, 9.0], [1.0, 2.0, 9.0]])
    weights = [[0.0, 0.0, 0.0, 0.0, 1.0]] * 2
    rule = rules.fitted(weights, [0.0, 0.0], keep_if_same=1.0)
    infinite[0, 2] = INF  # of another class, so that it does not count
    assert carried_through(rule, infinite) == [INF, pytest.approx(9.000123)]


def test_a_number_that_is_nan_stays_nan_though_classes_differ() -> None:
    rule = rules.fitted([[1.0, 0.0, 0.0, 0.0, 0.0]] * 2, [0.0, 0.0], keep_if_same=1.0)
    found = carried_through(rule, torch.tensor([[2.0, 1.0, NAN], [1.0, 2.0, 0.0]]))
    assert torch.tensor(found).isnan().all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: rules.Rule("x", ((0.0,) * 9,)), "name='x' is unknown; choose one of patience, vote"),
        (lambda: rules.Rule("fitted", ((0.0,) * 8,)), r"rows have \[8\] numbers; give each exit 9"),
        (lambda: rules.Rule("fitted", ()), r"rows have \[\] numbers"),
        (lambda: rules.Rule("fitted", ((0.0,) * 9, (0.0, NAN, *[0.0] * 7))), "'max_probability' of exit 1 is nan"),
        (lambda: rules.Rule("fitted", ((*[0.0] * 5, INF, 0.0, 0.0, 0.0),)), "'bias' of exit 0 is inf"),
        (lambda: rules.Rule("fitted", ((*[0.0] * 6, 1.0, 0.0, 0.0),)), "'keep' of exit 0 is 1.0, but there is no exit"),
        (lambda: rules.carried([1.0, 1.0]), "'logits' of exit 0 is 1.0"),
        (lambda: rules.vote([1.0, 0.0]), r"weights=\[1.0, 0.0\] must be above 0"),
        (lambda: rules.fitted([[1.0] * 5] * 3, [0.0] * 2), "'bias' has 2 numbers for 3 exits; give one per exit"),
        (lambda: rules.fitted([[1.0] * 6] * 3, [0.0] * 3), r"weights have \[6, 6, 6\] numbers; give each exit 5"),
        (lambda: rules.fitted([[1.0] * 5] * 3, [0.0] * 3, keep="all"), "'keep' is 'all' .*; give a number, or one per"),
        (lambda: rules.fitted([[1.0] * 5] * 3, [0.0] * 3, keep=None), "'keep' is None .*; give a number, or one per"),
        (
            lambda: rules.vote([1e39, 1.0, 1.0]),
            "'max_probability' of exit 0 is 1e\\+39; give a finite number, as float32",
        ),
        (lambda: rules.patience_thresholds(NAN, 2), "patience=nan must be at least 1"),
        (lambda: rules.patience_thresholds(0, 3), "patience=0 must be at least 1"),
        (lambda: rules.vote_thresholds(0.0, 3), "votes=0.0 must be above 0"),
        (lambda: rules.survival_thresholds(1.0, 3), "probability=1.0 must be between 0 and 1"),
        (lambda: rules.named("fitted", 3), "criterion='fitted' needs numbers for every exit"),
        (lambda: rules.named("x", 3), "criterion='x' is unknown; choose one of learned"),
        (lambda: rules.read("vote", torch.zeros(3, 9), 3), r"shape \[3, 9\]; expected float32 of \[4, 9\]"),
        (lambda: rules.read("vote", torch.zeros(4, 9).double(), 3), "the rule is torch.float64"),
    ],
)
def test_what_no_table_can_hold_is_refused(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("half", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array([0, 0.5, 0.5])])
def test_numbers_may_be_those_of_numpy_and_torch(half: object) -> None:
    bias, weights = [0.0] * 3, [[1.0] * 5] * 3
    made = rules.fitted(np.array(weights), np.array(bias), keep=half)  # type: ignore[arg-type]
    assert made == rules.fitted(weights, bias, keep=0.5)
    assert rules.vote(np.ones(3)) == rules.vote([1.0] * 3)  # type: ignore[arg-type]


def test_numbers_are_those_of_float32() -> None:
    rule = rules.carried([0.0, 0.1])
    assert rule.rows[1][8] == float(torch.tensor(0.1))
    assert rules.read("carried", rule.table(), 1) == rule


def test_thresholds_are_reached_where_the_definition_says_at_least() -> None:
    for limit in (0.1, 1.0, 1.1, 3e-45):
        below = torch.tensor(rules.vote_thresholds(limit, 1)[0])
        assert torch.tensor(limit) > below
        assert not torch.nextafter(torch.tensor(limit), torch.tensor(-INF)) > below
    assert rules.patience_thresholds(2, 4) == [2.5] * 4


def test_patience_beyond_all_exits_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        rules.patience_thresholds(77, 3)
    assert caplog.messages.count("patience=77 with 3 early exits: no image exits early") == 1


def test_a_network_takes_rules_by_name(net: eefast.EarlyExitNet) -> None:
    assert net.with_criterion("patience").exit_rule == rules.patience(3)
    assert net.with_criterion("survival").exit_rule == rules.survival(3)
    assert net.with_criterion("vote").exit_rule == net.exit_rule != rules.vote([1.0] * 4)
    assert net.with_criterion("patience").thresholds.tolist() == [1.5] * 3
    plain = net.with_criterion("entropy")
    assert "rule" not in plain.state_dict()
    assert plain.exit_rule == "entropy"
    assert plain.current_rule() is None
    with pytest.raises(ValueError, match="needs numbers for every exit"):
        plain.with_criterion("carried")
    with pytest.raises(ValueError, match=r"shape \[3, 9\]"):
        plain.with_criterion(rules.patience(2))


def test_a_rule_is_saved_with_the_network(tmp_path: Path) -> None:
    net = eefast.zoo.eenet("eenet8", 2, filters=2, input_shape=(1, 8, 8)).eval()
    rule = rules.carried([0.0, 0.3, 0.7])
    net = net.with_criterion(rule, [0.2, 0.3])
    net.profiles = {"eco": [0.1, 0.2]}
    net.save(tmp_path)
    found, x = eefast.load(tmp_path), torch.randn(5, 1, 8, 8)
    assert found.exit_rule == rule
    assert found.criterion.name == "carried"
    assert dict(found.profiles) == dict(net.profiles)
    assert all(map(torch.equal, found(x), net(x)))
    net.with_criterion("margin").save(tmp_path)
    assert eefast.load(tmp_path).exit_rule == "margin"


@pytest.mark.parametrize("change", ["lacks", "has"])
def test_a_rule_without_its_criterion_is_not_loaded(change: str, tmp_path: Path) -> None:
    net = eefast.zoo.eenet("eenet8", 2, filters=2, input_shape=(1, 8, 8)).eval().with_criterion("patience")
    net.save(tmp_path)
    config, other = tmp_path / "config.json", "learned" if change == "has" else "vote"
    if change == "lacks":
        net.with_criterion("learned").save(tmp_path)
        config.write_text(config.read_text().replace('"learned"', f'"{other}"'))
    else:
        config.write_text(config.read_text().replace('"patience"', f'"{other}"'))
    with pytest.raises(ValueError, match=rf"model.safetensors {change}.* criterion '{other}'"):
        eefast.load(tmp_path)


def test_copies_and_casts_keep_the_rule_exact(net: eefast.EarlyExitNet) -> None:
    rule = net.exit_rule
    for made in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(net).half().float()):
        assert made.exit_rule == rule
    assert copy.deepcopy(net).half().rule.dtype == torch.float32


def test_a_snapshot_stays_the_same_until_the_rule_changes(net: eefast.EarlyExitNet) -> None:
    first = net.current_rule()
    assert first is net.current_rule()
    net.rule[2, 1] = 5.0
    second = net.current_rule()
    assert second is not first
    assert (float(first[2, 1]), float(second[2, 1])) == (3.0, 5.0)
    net.rule = rules.patience(3).table()
    assert net.current_rule().tolist() == rules.patience(3).table().tolist()
    net.rule[0, 8] = 1.0
    with pytest.raises(ValueError, match="'logits' of exit 0 is 1"):
        net.current_rule()


def test_the_plain_network_carries_nothing(net: eefast.EarlyExitNet) -> None:
    x = as_images(agreeing_outputs(5, EXITS, CLASSES))
    assert torch.equal(net.plain()(x), net.all_exits(x)[-1].logits)


def test_exits_of_a_rule_that_carries_cannot_be_left_out(net: eefast.EarlyExitNet) -> None:
    with pytest.raises(ValueError, match="criterion='vote' reads the exits before"):
        net.without_exits([1])


def test_profiles_belong_to_the_rule_s_name(net: eefast.EarlyExitNet) -> None:
    net.profiles = {"eco": eefast.Profile((0.1, 0.2, 0.3), last_exit=1)}
    x = as_images(agreeing_outputs(31, EXITS, CLASSES))
    assert int(net(x, profile="eco").exit_index.max()) <= 1
    with pytest.raises(ValueError, match="the profiles are of criterion 'vote'"):
        net.with_criterion("patience").profiles = net.profiles


def test_a_rule_read_while_another_thread_changes_it_is_one_of_both(net: eefast.EarlyExitNet) -> None:
    wanted = [rules.vote([1.0] * 4).table(), rules.vote([5.0] * 4).table()]
    done, seen = threading.Event(), []

    def change() -> None:
        for table in itertools.cycle(wanted):
            net.rule.copy_(table)
            if done.is_set():
                break

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            seen.append(net.current_rule()[:, 1].tolist())
    finally:
        done.set()
        thread.join()
    assert set(map(tuple, seen)) <= {(1.0,) * 4, (5.0,) * 4, (1.0, 2.0, 3.0, 4.0)}
