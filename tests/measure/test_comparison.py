"""Candidates: wrong answers get no speed, right ones are timed on the same images, ratios are those of the times."""

from types import SimpleNamespace

import pytest
import torch
from networks import images, lived_in, one_by_one, spread_thresholds

from eefast import rules, zoo
from eefast.measure import comparison, timing
from eefast.measure.comparison import Candidate, Span
from eefast.result import ExitOutput
from eefast.thresholds.outputs import collect


@pytest.fixture(scope="module")
def ready():
    """A network that uses all its exits, 31 images, and what all exits say about them."""
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 3)
    x = images(31, (1, 12, 12))
    spread_thresholds(net, x, 0.4)
    return net, x, collect(net, [(x, torch.zeros(31))])[0]


def check(ready, run, net, dtype=torch.float32):
    expected, x, outputs = ready
    one = Candidate("it", run, net, 31, 8, 8, dtype=dtype)
    return comparison.answer(one, comparison.by_layout([one], x), outputs, expected.cost)


def test_right_answers_are_those_of_one_by_one(ready):
    net, x, _ = ready
    answer, flips = check(ready, net, net)
    alone = one_by_one(net, x)
    assert answer.exit_index.tolist() == alone.exit_index.tolist()
    assert answer.cost.tolist() == pytest.approx(alone.cost.tolist())
    assert flips == 0
    answer, flips = check(ready, net.plain(), None)
    assert set(answer.exit_index.tolist()) == {net.num_exits}
    assert set(answer.cost.tolist()) == {1.0}
    torch.testing.assert_close(answer.logits, net.plain()(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_rule_that_carries_is_judged_by_the_answers_so_far(ready):
    net, _, outputs = ready
    carrying = net.with_criterion(rules.carried([0.0, 0.7, 0.4]), [0.22, 0.24]).eval()
    answer, flips = check(ready, carrying, carrying)
    assert flips == 0
    assert len(answer.exit_index.unique()) > 1
    assert not torch.allclose(answer.logits, torch.stack([o.logits for o in outputs])[answer.exit_index, range(31)])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda r: r._replace(exit_index=(r.exit_index + 1) % 3), "31 of 31 images took another exit"),
        (lambda r: r._replace(logits=r.logits.roll(1, 0)), "0 of 31 images took another exit"),
        (lambda r: r._replace(logits=r.logits + 0.01), "its speed is not measured"),
        (lambda r: r._replace(logits=r.logits * float("nan")), "nan standard deviations"),
    ],
)
def test_wrong_answers_are_refused(ready, wrong, words):
    net = ready[0]
    with pytest.raises(RuntimeError, match=f"'it' disagrees with the reference: .*{words}"):
        check(ready, lambda x: wrong(net(x)), net)


def test_answers_to_some_of_the_images_alone_are_refused(ready):
    net = ready[0]
    for run, own in ((net, net), (net.plain(), None)):
        with pytest.raises(RuntimeError, match="'it' gives 5 answers for 8 images"):
            check(ready, lambda x, run=run: run(x[:5]), own)


@pytest.mark.parametrize(("further", "right"), [(0, True), (1, True), (2, False)])
def test_in_int8_one_image_of_a_hundred_may_exit_further_from_a_threshold(further, right):
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 3)
    net.thresholds.fill_(0.5)
    n = 101
    sure = torch.full((n,), 0.99)
    outputs = [ExitOutput(torch.randn(n, 3), sure, sure.logit()) for _ in range(net.num_exits + 1)]
    taken = torch.zeros(n, dtype=torch.int64)
    taken[:further] = 1
    logits = torch.stack([out.logits for out in outputs])[taken, torch.arange(n)]
    flips, problem = comparison.judge(net, outputs, logits, taken, torch.int8)
    assert (flips, problem == "") == (further, right)
    assert bool(comparison.judge(net, outputs, logits, taken, torch.bfloat16)[1]) == (further > 0)


@pytest.mark.parametrize(("distance", "dtype"), [(5e-5, torch.float32), (2e-2, torch.float16), (5e-2, torch.bfloat16)])
def test_other_exits_at_the_edge_of_a_threshold_are_counted(ready, distance, dtype):
    net, x, outputs = ready
    at = int((one_by_one(net, x).exit_index == 0).nonzero()[0])
    # The threshold moves until an image that exited is just above it; an image as close may exit or go on.
    edge = net.with_criterion(net.criterion.name, net.thresholds.tolist())
    edge.thresholds[0] = outputs[0].confidence[at] - distance
    other = net.with_criterion(net.criterion.name, edge.thresholds.tolist())
    other.thresholds[0] = outputs[0].confidence[at] + distance
    parted = int((edge(x).exit_index != other(x).exit_index).sum())
    assert parted >= 1
    assert check(ready, other, edge, dtype)[1] == parted
    edge.thresholds[0] = outputs[0].confidence[at] - 2 * comparison.FLIP_MARGIN[dtype]
    with pytest.raises(RuntimeError, match="images took another exit"):
        check(ready, other, edge, dtype)


def test_ratios_are_those_of_the_times(ready, monkeypatch):
    """On a clock that only the candidates move: 8 s a call without exits, 3 s with them, 1 s more in odd rounds."""
    net, x, outputs = ready
    now, seen = [0.0], {"plain": [], "early": []}
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def candidate(name, run, early, seconds):
        def timed(part):
            now[0] += seconds + late[0]
            seen[name].append(part[:, 0, 0, 0].tolist())
            return run(part)

        return Candidate(name, timed, early, 31, 4, 8)

    late = [0.0]
    both = [candidate("plain", net.plain(), None, 8), candidate("early", net, net, 3)]
    layouts = comparison.by_layout(both, x)
    answers = [comparison.answer(one, layouts, outputs, net.cost) for one in both]
    seen["plain"].clear(), seen["early"].clear()
    rounds = []
    for number in range(3):
        late[0] = number % 2
        rounds.append(comparison.one_round(both, layouts, number))
    # The same images for both, other ones in every round.
    assert seen["plain"] == seen["early"]
    assert [part for start in (0, 8, 16) for part in (start, start + 4)] == [
        x[:, 0, 0, 0].tolist().index(part[0]) for part in seen["plain"]
    ]
    plain, early = zip(*rounds, strict=True)
    labels = torch.arange(31) % 10
    row = comparison.row(both[1], *answers[1], labels, early, plain)
    assert row.speedup == pytest.approx(8 / 3)
    assert row.images_per_s == pytest.approx(8 / 6)
    alone = one_by_one(net, x)
    ratios = [float(alone.cost[8 * i : 8 * i + 8].mean()) * gain for i, gain in enumerate((8 / 3, 9 / 4, 8 / 3))]
    assert row.realised_ratio == pytest.approx(sorted(ratios)[1])
    assert row.accuracy == pytest.approx(float((alone.labels == labels).float().mean()))
    assert row.exits == tuple(alone.exit_index.bincount(minlength=3).tolist())
    base = comparison.row(both[0], *answers[0], labels, plain, plain)
    assert (base.speedup, base.speedup_quantiles, base.realised_ratio, base.criterion) == (1, (1, 1), 1, None)


def test_exits_that_no_image_takes_are_counted_too(ready):
    net, x, _ = ready
    first = net.with_criterion("learned", [-1.0, -1.0]).eval()
    outputs = collect(first, [(x, torch.zeros(31))])[0]
    one = Candidate("it", first, first, 31, 8, 8)
    answer, flips = comparison.answer(one, comparison.by_layout([one], x), outputs, net.cost)
    spans = [Span(0, 8, 1.0)] * 3
    assert comparison.row(one, answer, flips, torch.arange(31) % 10, spans, spans).exits == (31, 0, 0)


def test_short_turns_are_repeated_until_they_are_long_enough(ready, monkeypatch):
    net, x, _ = ready
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(comparison, "time", SimpleNamespace(sleep=calls.append))

    def run(part):
        now[0] += 0.5
        calls.append(len(part))
        return net(part)

    one = Candidate("it", run, net, 31, 4, 8)
    (span,) = comparison.one_round([one], comparison.by_layout([one], x), 0, pause=0.25, least=2.5)
    # A rest, a call that is not counted, then passes of two calls.
    assert calls == [0.25, 4, *[4] * 6]
    assert span == comparison.Span(0, 8, 1.0)
