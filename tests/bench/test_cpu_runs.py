"""The budget of the CPU's bench: what matters most first, what no longer fits a row that says so."""

import re
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import cpu_runs
import pytest

# At the end, where none of its modules hides one of the tests'.
import rows
import throughput
import torch
from cpu_runs import ALL_WORK, KEY_WORK, Budget, CpuWork
from networks import images, lived_in
from peers import ALL_PEERS, EAGER, MASKED, torch_compile_early
from rows import NetworkRow
from runtime_process import ANSWER_SECONDS
from subjects import Network, Subject

from eefast import zoo
from eefast.thresholds.outputs import collect

AROUND = {"device": "some CPU", "date": "2026-11-26"}
FIRST, SECOND = Network("first", (1, 8, 8), 10, ()), Network("second", (1, 8, 8), 10, ())


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A clock that only work moves, by `takes` × its guess; fake networks and processes; rows in a fresh folder."""
    found = SimpleNamespace(now=0.0, takes=1.0, made=[], rows=lambda: rows.read(tmp_path.glob("*.jsonl")))

    def make_subject(network, count):
        if network is SECOND:
            raise ModuleNotFoundError("no images")
        found.made.append((network, count))
        return network

    def measure(work, subject, workers, peers, budget):
        assert subject is work.network
        found.now += found.takes * work.seconds
        return [NetworkRow(work.network.name, "way", work.batch_size, "float32", (), True, images_per_s=(1, 2, 3))]

    @contextmanager
    def started(peers):
        yield {}

    for name, value in {"make_subject": make_subject, "measure": measure, "started": started}.items():
        monkeypatch.setattr(cpu_runs, name, value)
    monkeypatch.setattr(cpu_runs, "saved", nullcontext)
    monkeypatch.setattr(cpu_runs.time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    return found


def notes(bench):
    return [(row["network"], row["batch_size"], row["note"]) for row in bench.rows()]


def test_what_does_not_fit_is_skipped_and_what_does_is_not(bench):
    works = [CpuWork(FIRST, n, (1.0,), seconds) for n, seconds in ((256, 40), (16, 70), (1, 50))]
    cpu_runs.run(works, AROUND, 100, ())
    skipped = "skipped: the budget of 100 s is spent"
    assert notes(bench) == [("first", 256, ""), ("first", 16, skipped), ("first", 1, "")]
    assert bench.made == [(FIRST, cpu_runs.LEAST_IMAGES)], "one network for all its batch sizes"


@pytest.mark.parametrize(("takes", "measured"), [(1, 4), (1.5, 2), (4, 1), (0.5, 8)])
def test_guesses_follow_what_was_measured(bench, takes, measured):
    bench.takes = takes
    cpu_runs.run([CpuWork(FIRST, n, (1.0,), 30) for n in range(1, 9)], AROUND, 125, ())
    assert [bool(note) for *_, note in notes(bench)] == [False] * measured + [True] * (8 - measured)
    assert bench.now <= 125


def test_a_network_that_cannot_be_made_is_a_row(bench):
    cpu_runs.run([CpuWork(n, 16, (1.0,), 1) for n in (FIRST, SECOND, FIRST)], AROUND, 100, ())
    assert [note for *_, note in notes(bench)] == ["", "ModuleNotFoundError: no images", ""]


@pytest.fixture(scope="module")
def subject():
    net, x = lived_in(zoo.eenet("eenet20", 2, input_shape=(1, 12, 12)), 5), images(16, (1, 12, 12))
    return Subject(net, x, collect(net, [(x, torch.zeros(len(x)))])[0])


def test_no_peer_is_asked_when_the_budget_is_spent(subject):
    work = CpuWork(FIRST, 8, (1.0, 0.3), 1)
    workers = {"torch": SimpleNamespace(ends=0)}  # to ask it would raise
    found = cpu_runs.measure(work, subject, workers, (EAGER, MASKED), Budget(5, 0))
    assert {row.note for row in found} == {"skipped: the budget of 5 s is spent"}
    assert [(row.provider, row.setting) for row in found] == [
        ("plain, eager", "no exits"),
        ("masked, PyTorch", "cost 0.3"),
    ]


def test_no_minutes_of_compilation_for_deep_networks(subject):
    names = [
        {peer.name for peer, _ in cpu_runs.pairs_of(CpuWork(FIRST, 16, (0.3,), 1, deep=deep), subject, ALL_PEERS)}
        for deep in (False, True)
    ]
    compiled = {peer.name for peer in torch_compile_early.PEERS}
    assert names[0] == {peer.name for peer in ALL_PEERS} == names[1] | compiled
    assert not names[1] & compiled


def test_a_speed_needs_all_rounds(subject, monkeypatch):
    """Where the budget ends between two rounds, there are too few of them for quantiles."""
    budget, turns = Budget(5), []
    case = cpu_runs.make_case(subject, 8, 1)
    seen = {"exits": None, "setup_seconds": 1.0, "details": "", "peak_memory": None}
    answer = SimpleNamespace(logits=subject.outputs[-1].logits, **seen)

    def seconds(*_):
        turns.append(1)
        object.__setattr__(budget, "deadline", 0)
        return 0.1

    process = SimpleNamespace(ends=0, answer=lambda *_: answer, seconds=seconds)
    one, _ = cpu_runs.answered(EAGER, case, process)
    (timing,) = cpu_runs.timed([one], {"torch": process}, budget)
    assert len(turns) == 1
    assert timing.note == budget.note


def test_an_answer_that_makes_no_sense_is_a_row(subject):
    answer = SimpleNamespace(logits=torch.zeros(3, 4), exits=None, setup_seconds=1.0, details="", peak_memory=None)
    workers = {"torch": SimpleNamespace(ends=0, answer=lambda *_: answer)}
    (row,) = cpu_runs.measure(CpuWork(FIRST, 8, (1.0,), 1), subject, workers, (EAGER,))
    assert "Error: " in row.note
    assert not row.checked


def test_key_figures_come_first_and_fit():
    assert ALL_WORK[: len(KEY_WORK)] == KEY_WORK
    assert len(set(ALL_WORK)) == len(ALL_WORK)
    for network in {work.network for work in ALL_WORK if work.deep}:
        assert [work for work in ALL_WORK if work.network == network and not work.deep], "later with all peers"
    source = Path(throughput.__file__).read_text()
    quick, default = map(
        int, re.search(r"arguments.seconds or \((\d+) if arguments.quick else (\d+)\)", source).groups()
    )
    assert sum(work.seconds for work in KEY_WORK) <= default
    # The ops take a little more than a minute, and one peer may hang when the budget ends.
    assert quick < default <= 25 * 60 - 90 - ANSWER_SECONDS
    assert f"on a CPU {default}, --quick {quick}" in source
