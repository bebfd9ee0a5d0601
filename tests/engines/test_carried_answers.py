"""Rules that carry in every engine: by each rule's definition, as the named rules, in streams, while they change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import images, lived_in
from quantized_networks import network as quantized
from rule_cases import agreeing_outputs, as_images, cases, check, check_random, random_rule, speaking_network

import eefast
from eefast import criteria, ops, rules, zoo
from eefast.result import ExitResult, concatenated

needs_cpp = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
ENGINES = ["reference", "compact", pytest.param("resident", marks=needs_cpp)]
FAST = ENGINES[1:]
EXITS, CLASSES = 4, 10


def equal(a: ExitResult, b: ExitResult, allowed: float = 0) -> bool:
    """allowed: between confidences, which PyTorch rounds otherwise at the end of a vector."""
    near = torch.allclose(a.confidence, b.confidence, rtol=allowed, atol=allowed, equal_nan=True)
    parts = [(r.logits.nan_to_num(7), r.exit_index, r.cost) for r in (a, b)]
    return near and all(map(torch.equal, *parts))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", range(5), ids=[case.name for case in cases(2)])
def test_engines_answer_by_the_rule_s_definition(place: int, engine: str) -> None:
    case, outputs = cases(EXITS)[place], agreeing_outputs(257, EXITS, CLASSES)
    net = speaking_network(EXITS, CLASSES, case.rule, case.thresholds)
    fast, x = eefast.accelerate(net, engine=engine), as_images(outputs)
    assert fast.plan.engine == engine
    answer, allowed = fast(x), 1e-6 * (engine == "reference")
    assert check(case, outputs, answer.exit_index, answer.confidence) <= 3
    assert len(answer.exit_index.unique()) > 2
    for begin, end in ((0, 0), (3, 4), (5, 36)):
        assert equal(fast(x[begin:end]), ExitResult(*(part[begin:end] for part in answer)), allowed)
    streamed = list(fast.stream(x.split(9) * 2))  # more batches than the compact engine has slots
    assert equal(concatenated(streamed), ExitResult(*(torch.cat([part, part]) for part in answer)), allowed)
    assert equal(concatenated(list(fast.stream(x.split(100)))), answer, allowed)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_class_is_always_the_same_class(engine: str) -> None:
    outputs = agreeing_outputs(31, 3, 1)
    answer = eefast.accelerate(speaking_network(3, 1, "patience", [1.5, 1.5]), engine=engine)(as_images(outputs))
    assert answer.exit_index.tolist() == [1] * 31


def random_tables(engine: str, seeds: range, n: int) -> tuple[int, int]:
    """Rows, and those too near to a threshold to tell; asserts the others."""
    fast: Any = None
    doubtful = 0
    for seed in seeds:
        rule, outputs = random_rule(EXITS, seed), agreeing_outputs(n, EXITS, CLASSES, seed)
        if fast is None:
            fast = eefast.accelerate(speaking_network(EXITS, CLASSES, rule, [0.3] * 3), engine=engine)
        fast.rule.copy_(rule.table())
        answer = fast(as_images(outputs))
        doubtful += check_random(outputs, rule, [0.3] * 3, answer.logits, answer.confidence, answer.exit_index)
    return len(seeds) * n, doubtful


@pytest.mark.parametrize("engine", FAST)
def test_random_tables(engine: str) -> None:
    rows, doubtful = random_tables(engine, range(20), 67)
    assert doubtful < 0.02 * rows


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_ten_thousand_rows_of_random_tables(engine: str) -> None:
    rows, doubtful = random_tables(engine, range(100, 200), 101)
    assert doubtful < 0.02 * rows


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", range(5), ids=[case.name for case in cases(2)])
def test_ten_thousand_rows_of_each_rule(place: int, engine: str) -> None:
    case, outputs = cases(EXITS)[place], agreeing_outputs(10_007, EXITS, CLASSES, 1)
    answer = eefast.accelerate(speaking_network(EXITS, CLASSES, case.rule, case.thresholds), engine=engine)(
        as_images(outputs)
    )
    assert check(case, outputs, answer.exit_index, answer.confidence) <= 10


@pytest.mark.parametrize("name", criteria.CRITERIA)
@pytest.mark.parametrize("engine", FAST)
def test_one_column_is_the_named_rule_bit_for_bit(engine: str, name: str) -> None:
    plain = lived_in(zoo.eenet("eenet8", 2, filters=3, input_shape=(3, 9, 7), criterion=name), 1)
    x, sign = images(67, (3, 9, 7)), -1 if name == "entropy" else 1
    values = [plain.criterion.confidence(o.logits, o.confidence_logit).median().item() for o in plain.all_exits(x)]
    plain.thresholds.copy_(torch.tensor(values[:2]))
    table = plain.with_criterion(rules.stateless(name, 2), [sign * v for v in values[:2]])
    expected, found = (eefast.accelerate(net, engine=engine)(x) for net in (plain, table))
    assert equal(found, expected._replace(confidence=sign * expected.confidence))
    assert len(found.exit_index.unique()) == 3


@pytest.mark.parametrize("engine", FAST)
def test_a_nan_image_carries_on_to_the_end_and_touches_no_other(engine: str) -> None:
    rule = rules.fitted([[0.2, 1.0, 0.1, 0.1, 0.1]] * 3, [0.1] * 3, keep=0.3, keep_if_same=0.5, logits=0.6)
    net = lived_in(zoo.eenet("eenet8", 2, filters=3, input_shape=(3, 9, 7)), 1).with_criterion(rule, [1.2, 1.9])
    fast, x = eefast.accelerate(net, engine=engine), images(37, (3, 9, 7))
    before = fast(x)
    x[11, 0, 0, 0] = torch.nan
    after = fast(x)
    others = torch.arange(37) != 11
    assert equal(ExitResult(*(part[others] for part in after)), ExitResult(*(part[others] for part in before)))
    assert (int(after.exit_index[11]), bool(after.confidence[11].isnan())) == (2, True)
    assert int(fast(x, exit_limit=1).exit_index[11]) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_changed_rule_holds_from_the_next_call_on(engine: str) -> None:
    outputs = agreeing_outputs(67, EXITS, CLASSES)
    first, other = cases(EXITS)[1].rule, rules.vote([2.0, 1.0, 1.0, 1.0])
    net, x = speaking_network(EXITS, CLASSES, first, [1.1] * 3), as_images(outputs)
    expected = net.with_criterion(other, [1.1] * 3)(x)
    fast = eefast.accelerate(net, engine=engine)
    plan, before = fast.plan, fast(x)
    batches = iter(fast.stream(iter_changing(fast, x, other)))
    assert torch.equal(next(batches).exit_index, before.exit_index)
    assert torch.equal(next(batches).exit_index, expected.exit_index)
    assert torch.equal(fast(x).exit_index, expected.exit_index)
    assert not torch.equal(before.exit_index, expected.exit_index)
    assert fast.plan is plan


def iter_changing(fast: Any, x: torch.Tensor, rule: rules.Rule) -> Any:
    yield x
    fast.rule.copy_(rule.table())
    yield x


@pytest.mark.parametrize("engine", FAST)
def test_profiles_and_limits_of_each_image(engine: str) -> None:
    net = speaking_network(EXITS, CLASSES, "vote", [1.1] * 3)
    net.profiles = {"eco": eefast.Profile((0.5, 0.7, 0.9)), "first": eefast.Profile((9.0, 9.0, 9.0), last_exit=0)}
    x, ids = as_images(agreeing_outputs(67, EXITS, CLASSES)), torch.arange(67) % 2
    fast = eefast.accelerate(net, engine=engine)
    expected = net(x, profile=ids)
    for found in (fast(x, profile=ids), concatenated(list(fast.stream([(x[:31], ids[:31]), (x[31:], ids[31:])])))):
        assert torch.equal(found.exit_index, expected.exit_index)
        assert torch.equal(found.logits, expected.logits)
    assert not expected.exit_index[1::2].any()


@needs_cpp
@pytest.mark.parametrize("place", range(5), ids=[case.name for case in cases(2)])
def test_integers_carry_as_their_reference(place: int) -> None:
    net, x = quantized(1, (3, 11, 9)), images(67, (3, 11, 9))
    rule, thresholds, logits, s = cases(net.num_exits + 1)[place].rule, [], None, None
    with torch.no_grad():
        outputs = net.all_exits(x)
    for out, row in zip(outputs[:-1], rule.table(), strict=False):
        logits, s = criteria.carry(out.logits, out.confidence_logit, row, logits, s)
        ordered = s.sort().values[20:50]
        gap = int(ordered.diff().argmax())
        thresholds.append(float(ordered[gap : gap + 2].mean()))
    net = net.with_criterion(rule, thresholds)
    wanted = net(x)
    assert len(wanted.exit_index.unique()) > 1
    for engine in ("compact", "resident"):
        found = eefast.accelerate(net, engine=engine)(x)
        assert torch.equal(found.exit_index, wanted.exit_index)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.confidence, wanted.confidence, rtol=1e-4, atol=1e-4)


def test_auto_runs_rules_that_carry_and_the_plan_names_them() -> None:
    fast = eefast.accelerate(speaking_network(3, 2, "survival", [1.0, 1.0]))
    assert (fast.plan.criterion, fast.plan.engine in ("compact", "resident")) == ("survival", True)
