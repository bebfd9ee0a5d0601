"""The guard of the speed: it compares medians of paired rounds, gives three chances, and trusts no wrong answer."""

import json
from dataclasses import replace

import guard
import pytest
import torch
from cases import Case
from networks import images, lived_in
from peers import MASKED
from subjects import Network

import eefast
from eefast.thresholds.outputs import collect

CAPABILITY = torch.backends.cpu.get_cpu_capability()
SMALL = guard.GuardCase(Network("small", (1, 12, 12), 10, ()), 16, 0.5)


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Where the guard reads and writes; nothing there yet."""
    monkeypatch.setattr(guard, "COMMITTED", tmp_path / "guard.json")
    return tmp_path / "guard.json"


@pytest.fixture
def measured(monkeypatch):
    """Ratios that the attempts find, one after the other; the pairs measured, in this order."""
    ratios, asked = [], []

    def ratio(pair):
        asked.append(pair)
        return ratios.pop(0)

    monkeypatch.setattr(guard, "ratio", ratio)
    monkeypatch.setattr(guard.time, "sleep", asked.append)
    return ratios, asked


class Clock:
    """A clock that only the candidates move."""

    def __init__(self, monkeypatch):
        self.now, self.called = 0.0, []
        monkeypatch.setattr(guard.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(guard.time, "sleep", lambda seconds: self.spend(seconds))

    def spend(self, seconds):
        self.now += seconds

    def way(self, name, spans):
        """Takes the next of `spans` at every call."""

        def run(x):
            self.called.append(name)
            self.spend(spans.pop(0) if len(spans) > 1 else spans[0])

        return guard.Timed(run, [None])


def test_the_ratio_is_the_median_of_rounds_in_turn(monkeypatch):
    clock = Clock(monkeypatch)
    # One round of eefast was disturbed; its ratio is 0.2.
    found = guard.ratio((clock.way("masked", [4.0]), clock.way("eefast", [1.0, 1.0, 20.0, 20.0, 1.0, 1.0])))
    assert found == pytest.approx(4)
    assert clock.called == ["masked", "eefast", "eefast", "masked"] * guard.LEAST_ROUNDS


def test_a_drift_hits_both_alike(monkeypatch):
    clock = Clock(monkeypatch)
    # A machine that gets slower from turn to turn: A B B A of 1, 2, 3, 4 seconds.
    assert guard.ratio((clock.way("a", [1, 4] * 3), clock.way("b", [2, 3] * 3))) == pytest.approx(1)


def test_short_rounds_are_repeated(monkeypatch):
    clock = Clock(monkeypatch)
    guard.ratio((clock.way("masked", [0.002]), clock.way("eefast", [0.001])))
    assert len(clock.called) == 4 * guard.ROUNDS


@pytest.mark.parametrize(
    ("ratios", "passes", "count"),
    [
        ([3.0], True, 1),  # exactly what is allowed
        ([2.99, 2.99, 3.0], True, 3),
        ([2.99, 2.99, 2.99], False, 3),
    ],
)
def test_three_attempts(measured, ratios, passes, count):
    found, asked = measured
    found[:], lines = ratios, []
    assert guard.verdict({"net": "pair"}, {"net": 4.0}, lines.append) == passes
    assert asked == ["pair", *[guard.PAUSE_BETWEEN_ATTEMPTS_SECONDS, "pair"] * (count - 1)]
    assert len(lines) == count
    assert lines[-1].startswith(f"net: now {ratios[-1]:.2f}, committed 4.00, allowed 3.00")
    assert [("too slow" in line) for line in lines] == [ratio < 3 for ratio in ratios]


def test_only_slow_cases_are_measured_again(measured):
    found, asked = measured
    found[:], lines = [5.0, 1.0, 5.0], []
    assert guard.verdict({"fast": "a", "slow": "b"}, {"fast": 4.0, "slow": 4.0}, lines.append)
    assert asked == ["a", "b", guard.PAUSE_BETWEEN_ATTEMPTS_SECONDS, "b"]


def test_a_case_without_a_committed_ratio_passes_and_says_so(measured):
    measured[0][:], lines = [0.1], []
    assert guard.verdict({"new": "pair"}, {}, lines.append)
    assert "no committed ratio" in lines[0]


def test_a_processor_without_committed_ratios_passes_and_says_so(committed, capsys):
    guard.COMMITTED.write_text(json.dumps({"another": {"ratios": {str(SMALL): 9.0}}}))
    assert guard.main([], (SMALL,)) == 0
    assert f"no committed ratios for {CAPABILITY}" in capsys.readouterr().out


@pytest.fixture
def small(monkeypatch):
    """A network that takes no time to prepare."""

    def prepared(case):
        net, x = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(1, 12, 12)), 3), images(31, (1, 12, 12))
        return Case(net, x.split(case.batch_size), collect(net, [(x, torch.zeros(len(x)))])[0])

    monkeypatch.setattr(guard, "prepared", prepared)
    monkeypatch.setattr(guard, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(guard, "PAUSE_BETWEEN_ATTEMPTS_SECONDS", 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_what_was_written_is_compared_with(small, committed, capsys):
    committed.write_text(json.dumps({"another": {"ratios": {str(SMALL): 9.0}}}))
    assert guard.main(["--write"], (SMALL,)) == 0
    written = json.loads(committed.read_text())
    assert written["another"] == {"ratios": {str(SMALL): 9.0}}
    assert written[CAPABILITY]["ratios"][str(SMALL)] > 0
    assert written[CAPABILITY]["environment"]["threads"] == guard.THREADS

    for ratio, status in ((1e-6, 0), (1e6, 1)):
        written[CAPABILITY]["ratios"] = {str(SMALL): ratio}
        committed.write_text(json.dumps(written))
        assert guard.main([], (SMALL,)) == status
    assert "attempt 3 of 3" in capsys.readouterr().out

    written[CAPABILITY]["environment"]["processor"] = "Another Maker's"
    committed.write_text(json.dumps(written))
    assert guard.main([], (SMALL,)) == 0
    assert "are of Another Maker's" in capsys.readouterr().out


def test_wrong_answers_get_no_ratio(small, committed, monkeypatch, capsys):
    def wrong(net):
        return lambda x: net(x)._replace(exit_index=torch.zeros(len(x), dtype=torch.int64))

    peers = (MASKED, replace(guard.PEERS[1], prepare=wrong))
    with pytest.raises(RuntimeError, match="small, batch 16, eefast: WRONG"):
        guard.checked(SMALL, peers)
    committed.write_text(json.dumps({CAPABILITY: {"ratios": {str(SMALL): 1.0}}}))
    monkeypatch.setattr(guard, "checked", lambda case: (_ for _ in ()).throw(RuntimeError("WRONG")))
    assert guard.main([], (SMALL,)) == 1
    assert "WRONG" in capsys.readouterr().out


def test_every_case_can_be_prepared_and_is_committed():
    """The committed file is read unchanged; names that are never measured would guard nothing."""
    names = {str(case) for case in guard.CASES}
    for capability, known in json.loads(guard.COMMITTED.read_text()).items():
        assert set(known["ratios"]) == names, capability
        assert known["environment"]["capability"] == capability
