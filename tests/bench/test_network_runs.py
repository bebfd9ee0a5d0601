"""A run on any device: what no longer fits is a row that says so, and only right answers get a speed."""

import json
import os
from contextlib import closing
from dataclasses import asdict, replace
from types import SimpleNamespace

import cpu_ways
import network_runs
import pytest

# At the end, where none of its modules hides one of the tests'.
import rows
import torch
from cpu_ways import CpuWays
from network_runs import Budget
from peers import EAGER, MASKED, Peer
from rows import NetworkRow, environment
from subjects import Network
from summary import show
from workloads import Workload

from eefast.measure.time_costs import TimeCosts

SHAPE = (1, 12, 12)
AROUND = {"device": "some CPU", "date": "2026-11-26"}
FIRST, SECOND = Network("first", (1, 8, 8), 10, ()), Network("second", (1, 8, 8), 10, ())
EENET20 = Network("eenet20", SHAPE, 10, ())


class Fake(network_runs.Device):
    """A device on a clock that only work moves, by `takes` × its guess; it has no images for `SECOND`."""

    def __init__(self, takes=1.0, adapts=True):
        self.now, self.takes, self.adapts, self.budgets, self.closed = 0.0, takes, adapts, [], False

    def subject(self, work, works):
        if work.network is SECOND:
            raise ModuleNotFoundError("no images")
        return work.network

    def measure(self, work, subject, device, budget):
        assert (subject, device) == (work.network, self)
        self.now += self.takes * work.guess
        self.budgets.append(budget)
        row = NetworkRow(work.network.name, "way", work.batch_size, "float32", (), True, images_per_s=(1, 2, 3))
        return [row], [(f"{work}", row)]

    def traced(self, measured):
        self.now += 4
        return [replace(row, launch_gaps=0.5) for _, row in measured]

    def close(self):
        self.closed = True


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A fake device; rows in a fresh folder."""
    device = Fake()
    monkeypatch.setattr(network_runs, "measure", lambda *arguments: device.measure(*arguments))
    monkeypatch.setattr(network_runs.time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    device.rows = lambda: rows.read(tmp_path.glob("*.jsonl"))
    yield device
    assert device.closed


def notes(bench):
    return [(row["network"], row["batch_size"], row["note"]) for row in bench.rows()]


def test_what_does_not_fit_is_skipped_and_what_does_is_not(bench):
    works = [Workload(FIRST, n, (1.0, None), seconds) for n, seconds in ((256, 40), (16, 70), (1, 50))]
    network_runs.run(works, AROUND, 100, bench)
    skipped = "skipped: the budget of 100 s is spent"
    assert notes(bench) == [("first", 256, ""), ("first", 16, skipped), ("first", 1, "")]
    assert {budget.deadline for budget in bench.budgets} == {100}


@pytest.mark.parametrize(("takes", "measured"), [(1, 4), (1.5, 2), (4, 1), (0.5, 8)])
def test_guesses_follow_what_was_measured(bench, takes, measured):
    bench.takes = takes
    network_runs.run([Workload(FIRST, n, (1.0, None), 30) for n in range(1, 9)], AROUND, 125, bench)
    assert [bool(note) for *_, note in notes(bench)] == [False] * measured + [True] * (8 - measured)
    assert bench.now <= 125


def test_guesses_stay_where_a_device_does_not_adapt_and_what_has_begun_is_finished(bench):
    bench.takes, bench.adapts = 2, False
    network_runs.run([Workload(FIRST, n, (1.0,), 10, compile_seconds=20) for n in range(3)], AROUND, 100, bench)
    assert [bool(note) for *_, note in notes(bench)] == [False, False, True]
    assert bench.now == 120
    assert {budget.deadline for budget in bench.budgets} == {float("inf")}


def test_traces_come_last_and_have_seconds_left_for_them(bench):
    works = [Workload(FIRST, n, (1.0,), 10, traced=n != 2) for n in range(1, 5)]
    network_runs.run(works, AROUND, 38, bench)
    found = [(row["batch_size"], row["launch_gaps"], bool(row["note"])) for row in bench.rows()]
    assert found == [
        (1, None, False),
        (2, None, False),
        (3, None, False),
        (4, None, True),
        (1, 0.5, False),
        (3, 0.5, False),
    ]


def test_costs_in_time_once_for_a_network_and_batch_size(monkeypatch, capsys):
    found, device = [], network_runs.Device.__new__(CpuWays)
    subject = SimpleNamespace(net="the net", images=torch.zeros(9, 1))

    def measured(net, images, dtype, clock):
        found.append((net, len(images)))
        if len(images) == 3:
            raise ValueError("no such head\nat all")
        return "costs"

    monkeypatch.setattr(network_runs.time_costs, "measured", measured)
    works = [Workload(FIRST, 4, (0.5,)), Workload(FIRST, 4, (1.0, None)), Workload(FIRST, 4, (1.0,))]
    works += [Workload(FIRST, 3), Workload(FIRST, 3), Workload(SECOND, 4)]
    device.clock = "process_time"
    assert [device.time_costs(work, subject) for work in works] == ["costs", "costs", None, None, None, "costs"]
    assert found == [("the net", 4), ("the net", 3), ("the net", 4)]
    assert capsys.readouterr().err == "first, batch 3: no costs in time: ValueError: no such head\n"


def test_a_network_that_cannot_be_made_is_a_row(bench):
    network_runs.run([Workload(n, 16, (1.0, None), 1) for n in (FIRST, SECOND, FIRST)], AROUND, 100, bench)
    assert [note for *_, note in notes(bench)] == ["", "ModuleNotFoundError: no images", ""]


@pytest.mark.parametrize(
    ("costs", "compile_seconds", "name", "setting"),
    [((0.4,), 3, "all ways, torch.compile among them", "cost 0.4"), ((1.0, None), 0, "all ways", "")],
    ids=["one cost", "several costs"],
)
def test_a_row_for_all_that_was_skipped(costs, compile_seconds, name, setting):
    work = Workload(FIRST, 16, costs, compile_seconds=compile_seconds)
    row = network_runs.skipped(work, torch.float16, "no time")
    assert (row.provider, row.setting, row.dtype, row.checked, row.note) == (name, setting, "float16", False, "no time")


def test_no_peer_is_asked_when_the_budget_is_spent(subject):
    work = Workload(FIRST, 8, (1.0, 0.3), 1)
    device = CpuWays((EAGER, MASKED), {"torch": SimpleNamespace(ends=0)})  # to ask it would raise
    found, _ = network_runs.measure(work, subject, device, Budget(5, 0))
    assert {row.note for row in found} == {"skipped: the budget of 5 s is spent"}
    assert [(row.provider, row.setting) for row in found] == [
        ("plain, eager", "no exits"),
        ("masked, PyTorch", "cost 0.3"),
    ]


def test_a_speed_needs_all_rounds(subject, monkeypatch):
    """Where the budget ends between two rounds, there are too few of them for quantiles."""
    budget, turns = Budget(5), []
    case = cpu_ways.case_of(subject, 8, 1)
    seen = {"exits": None, "setup_seconds": 1.0, "details": "", "peak_memory": None}
    answer = SimpleNamespace(logits=subject.outputs[-1].logits, **seen)

    def seconds(*_):
        turns.append(1)
        object.__setattr__(budget, "deadline", 0)
        return 0.1

    process = SimpleNamespace(ends=0, answer=lambda *_: answer, seconds=seconds)
    device = CpuWays((EAGER,), {"torch": process})
    one, _ = network_runs.answered(EAGER, case, device)
    (timing,) = network_runs.timed([one], device, budget)
    assert len(turns) == 1
    assert timing.note == budget.note


def test_an_answer_that_makes_no_sense_is_a_row(subject):
    answer = SimpleNamespace(logits=torch.zeros(3, 4), exits=None, setup_seconds=1.0, details="", peak_memory=None)
    device = CpuWays((EAGER,), {"torch": SimpleNamespace(ends=0, answer=lambda *_: answer)})
    (row,), _ = network_runs.measure(Workload(FIRST, 8, (1.0,), 1), subject, device)
    assert row.note.startswith("WRONG: 3 answers")
    assert not row.checked


def test_every_precision_has_its_yardstick(subject, monkeypatch):
    """Seconds per batch: two ways in float32, two in int8, without exits."""
    monkeypatch.setattr(cpu_ways, "PAUSE_SECONDS", 0)
    takes = {"a": 0.2, "b": 0.4, "c int8": 0.1, "d int8": 0.3}
    seen = {"exits": None, "setup_seconds": 1.0, "details": "", "peak_memory": None}
    process = SimpleNamespace(
        ends=0,
        answer=lambda *_: SimpleNamespace(logits=subject.outputs[-1].logits, **seen),
        seconds=lambda way, setting, turn, *_: takes[way.name] * len(turn),
    )
    ways = [replace(EAGER, name=n, dtype=torch.int8 if "int8" in n else torch.float32) for n in takes]
    found, _ = network_runs.measure(Workload(FIRST, 8, (1.0,), 1), subject, CpuWays(ways, {"torch": process}))
    assert {(r.provider, r.best_static, r.across_static) for r in found} == {
        *(("a", "a", "c int8"), ("b", "a", "c int8"), ("c int8", "c int8", "a"), ("d int8", "c int8", "a")),
    }
    ratios = {r.provider: (r.realised_ratio, r.across_ratio) for r in found}
    assert ratios["a"] == pytest.approx((1, 0.1 / 0.2))
    assert ratios["b"] == pytest.approx((0.5, 0.1 / 0.4))
    assert ratios["c int8"] == pytest.approx((1, 2))
    assert ratios["d int8"] == pytest.approx((1 / 3, 0.2 / 0.3))
    assert {r.other_answers for r in found} == {0}


def wrong_logits(net):
    plain = EAGER.prepare(net)
    return lambda x: plain(x) + torch.arange(net.num_classes)


def wrong_exits(net):
    def run(x):
        result = net(x)
        return result._replace(exit_index=(result.exit_index + 1) % 3)

    return run


def ends(net):
    os._exit(7)


def test_only_right_answers_get_a_speed(subject, monkeypatch):
    monkeypatch.setattr(network_runs, "ROUNDS", 2)
    monkeypatch.setattr(cpu_ways, "TURN_SECONDS", 0.001)
    monkeypatch.setattr(network_runs.time_costs, "measured", lambda *_: TimeCosts("PyTorch", 8, (0.5, 0.75, 1.0)))
    right = replace(EAGER, name="right", family="here")
    peers = (
        right,
        replace(right, name="wrong logits", prepare=wrong_logits),
        Peer("wrong exits", wrong_exits, str, False, "here"),
        replace(right, name="missing", needs=("a_package_that_is_missing",)),
        replace(right, name="ends", prepare=ends, family="elsewhere"),
    )
    work = Workload(EENET20, 8, (0.3,))
    with closing(cpu_ways.started(peers)) as device:
        device.open(subject)
        rows = {row.provider: row for row in network_runs.measure(work, subject, device)[0]}
    assert rows["right"].images_per_s[1] > 0
    assert rows["right"].realised_ratio == pytest.approx(1)
    assert rows["right"].best_static == "right"
    assert rows["right"].exits == (0, 0, 64)
    assert (rows["right"].time_cost, rows["right"].time_way) == (1.0, "PyTorch")
    assert rows["wrong logits"].time_cost is None
    assert rows["missing"].note == "not installed: pip install 'eefast[bench]'"
    assert rows["ends"].note == "its process has ended, exit code 7"
    for name, what in (("wrong logits", "logits of one are off"), ("wrong exits", "images took another exit")):
        assert rows[name].note.startswith("WRONG")
        assert what in rows[name].note
    for name in set(rows) - {"right"}:
        assert rows[name].images_per_s is None

    text = show([json.loads(json.dumps({**asdict(row), "environment": environment("cpu")})) for row in rows.values()])
    assert "! WRONG" in text
    assert "not measured: resident: realised ratio ≥ 2.2" in text
