"""The bench of latencies: a Poisson process, a queue whose clock starts at the arrival, no time for wrong answers."""

import json
import math
from dataclasses import replace
from itertools import chain

import guard
import latency
import pytest
import rows
import torch
from cases import Case
from networks import images, lived_in
from peers import EAGER
from subjects import Network
from summary import show

import eefast
from eefast.thresholds.outputs import collect

SHAPE = (1, 12, 12)
CASE = guard.GuardCase(Network("small", SHAPE, 10, ()), 16, 0.5)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in sleeps and in answers."""
    clock = type("Clock", (), {"now": 0.0})()

    def sleep(seconds):
        assert seconds >= 0
        clock.now += seconds

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(latency.time, "sleep", sleep)
    return clock


def server(clock, seconds):
    """A server that takes this time for a batch of any size, and the batches that it was given."""
    seen = []

    def run(x):
        seen.append(x.tolist())
        clock.now += seconds

    return run, seen


@pytest.mark.parametrize("rate", [3.0, 257.0])
def test_arrivals_are_a_poisson_process(rate):
    count = 31_000
    times = latency.arrivals(rate, count / rate, 5)
    assert times == latency.arrivals(rate, count / rate, 5)
    assert times != latency.arrivals(rate, count / rate, 6)
    assert times == sorted(times)
    # Of a Poisson count the standard deviation is its root; of waiting times mean and deviation are equal.
    assert abs(len(times) - count) < 4 * math.sqrt(count)
    waits = torch.tensor(times, dtype=torch.float64).diff()
    assert float(waits.mean()) * rate == pytest.approx(1, abs=0.05)
    assert float(waits.std()) * rate == pytest.approx(1, abs=0.05)


def test_there_is_an_arrival_however_short_the_run():
    assert latency.arrivals(0.1, 1e-9, 0) == [0.0]


def test_an_image_waits_from_its_arrival_to_its_answer(clock):
    run, batches = server(clock, 1.0)
    found = latency.serve(run, torch.arange(10), [0.0, 0.1, 0.5, 0.9, 5.0], 3)
    # One alone; the three that came meanwhile; none until 5.
    assert batches == [[0], [1, 2, 3], [4]]
    assert found.waits == pytest.approx([1.0, 1.9, 1.5, 1.1, 1.0])
    assert found.batches == [1, 3, 1]
    assert found.seconds == pytest.approx(6.0)


def test_batches_are_no_larger_than_the_largest(clock):
    run, batches = server(clock, 1.0)
    found = latency.serve(run, torch.arange(100), [0.0] * 31, 8)
    assert [len(batch) for batch in batches] == [8, 8, 8, 7]
    assert list(chain(*batches)) == list(range(31))
    assert found.waits == pytest.approx([1.0] * 8 + [2.0] * 8 + [3.0] * 8 + [4.0] * 7)


def test_images_come_again_when_all_have_been_there(clock):
    run, batches = server(clock, 1.0)
    latency.serve(run, torch.arange(3), [0.0] * 7, 2)
    assert list(chain(*batches)) == [0, 1, 2, 0, 1, 2, 0]
    assert max(map(len, batches)) == 2


def test_a_server_that_is_too_slow_makes_its_images_wait_longer_and_longer(clock):
    run, _ = server(clock, 1.0)
    found = latency.serve(run, torch.arange(257), [0.5 * i for i in range(257)], 1)
    # The last one came at 128 and is answered at 257.
    assert found.waits[-1] == pytest.approx(129)
    assert found.waits == sorted(found.waits)


def test_back_to_back_ends_when_its_time_is_over(clock):
    run, batches = server(clock, 0.5)
    found = latency.back_to_back(run, torch.arange(2), 1.5)
    assert list(chain(*batches)) == [0, 1, 0]
    assert found.waits == [0.5] * 3
    assert found.seconds == 1.5
    assert len(latency.back_to_back(run, torch.arange(2), 0.0).waits) == 1


@pytest.fixture
def small(monkeypatch):
    def prepare(case):
        net, x = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE), 3), images(31, SHAPE)
        return Case(net, x.split(case.batch_size), collect(net, [(x, torch.zeros(len(x)))])[0])

    monkeypatch.setattr(latency, "prepare_case", prepare)
    monkeypatch.setattr(latency, "plain", lambda: EAGER)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_run_measures_all_scenarios_and_reports_them(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert latency.main(["--seconds", "0.5", "--most", "8"], (CASE,)) == 0
    (file,) = tmp_path.iterdir()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert not [row["note"] for row in found if row["note"] and row["provider"] != "eefast stream"]
    early = {"masked, PyTorch", "eefast call"}
    assert {row["provider"] for row in found if row["scenario"] == "Offline"} == {
        *early,
        "plain, eager",
        "eefast stream",
    }
    assert {row["provider"] for row in found if row["scenario"] == "SingleStream"} == {*early, "plain, eager"}
    served = [row for row in found if row["scenario"] == "Server" and not row["note"]]
    for name in ("plain, eager", *early):
        of_way = [row for row in served if row["provider"] == name]
        loads = [row["load"] for row in of_way]
        assert loads == sorted(set(loads))
        assert len(of_way) >= 3
        assert all(row["milliseconds"] == sorted(row["milliseconds"]) for row in of_way)
        assert all(1 <= row["batch"] <= 8 for row in of_way)
    assert all(row["checked"] and row["environment"]["threads"] == latency.THREADS for row in served)
    text = capsys.readouterr().out
    assert text == show(found) + "\n"
    assert (
        "! reads batches ahead of its answers, so it fits Offline alone (small, cost 0.5, Server, eefast stream)"
        in text
    )
    (line,) = [line for line in text.splitlines() if "SingleStream" in line and "eefast call" in line]
    (row,) = [row for row in found if row["scenario"] == "SingleStream" and row["provider"] == "eefast call"]
    assert [f"{ms:.2f}" for ms in row["milliseconds"]] == [cell.strip() for cell in line.split("|")][-5:-2]


def test_wrong_answers_get_no_time(small, monkeypatch):
    ready = latency.prepare_case(CASE)
    monkeypatch.setattr(latency, "prepare_case", lambda case: ready)
    x = torch.cat(list(ready.batches))
    right = latency.Service("right", False, x, ready.net)
    with torch.no_grad():
        assert latency.wrong(ready, right, 8) == ""

        def wrong_alone(x):
            result = ready.net(x)
            return result if len(x) > 1 else result._replace(logits=result.logits + torch.arange(10))

        assert latency.wrong(ready, replace(right, run=wrong_alone), 8).startswith("WRONG")

    def raises():
        raise OSError("broken")

    made = [("wrong", lambda: replace(right, name="wrong", run=wrong_alone)), ("raises", raises)]
    monkeypatch.setattr(latency, "services", lambda ready: iter([*made, ("right", lambda: right)]))
    found = {row.provider: row for row in latency.measure(CASE, 8, 0.1) if row.scenario == "Offline"}
    assert not found["wrong"].checked
    assert found["wrong"].note.startswith("WRONG")
    assert found["raises"].note == "OSError: broken"
    assert found["wrong"].images_per_s is None
    assert found["right"].images_per_s > 0, found["right"].note


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--most", "0"], ["--only", "nothing"]])
def test_what_cannot_be_measured_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        latency.main(arguments, (CASE,))
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err
