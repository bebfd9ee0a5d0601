"""The lists of workloads: what decides comes first and fits into the seconds that its command has."""

import re
from pathlib import Path

import network_runs
import pytest
import throughput
import torch
from cases import setting_of
from runtime_process import ANSWER_SECONDS
from selection import RESIDENT_INT8
from targets import TARGETS, Target
from workloads import ALL_ON_CPU, COMPACT_ON_GPU, INT8_ON_CPU, KEY_ON_CPU


def test_key_figures_come_first_and_fit_into_their_phase():
    targets = [t for t in TARGETS if t.gpu]
    key = COMPACT_ON_GPU[: len(targets)]
    for work, target in zip(key, targets, strict=True):
        row = {"network": work.network.name, "batch_size": work.batch_size, "setting": work.setting}
        assert target.concerns({**row, "provider": target.provider})
        assert work.compile_seconds
        assert work.traced
    script = Path(throughput.__file__).with_name("gpu.sh").read_text()
    (seconds,) = map(int, re.findall(r"--engine compact --seconds (\d+)", script))
    (limit,) = map(int, re.findall(r"\[compact\]=(\d+)", script))
    assert sum(work.guess for work in key) + network_runs.TRACE_SECONDS <= seconds
    assert seconds + 20 <= limit <= 150, "Python, PyTorch and the last work need some more"
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", script))
    first = [limits[phase] for phase in ("build", "smoke", "key", "compact", "throughput", "parity")]
    assert sum(map(int, first)) <= 480, "what decides fits into one command"
    total = sum(int(limits[phase]) for phase in re.search(r'PHASES="([^"]+)"', script)[1].split())
    assert f"all phases, {total} s at most" in script


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("eenet50", (1, 8, 32, 128, 256)), ("eenet18", (1, 8, 32, 128, 256, 1024))],
    ids=["eenet50", "eenet18"],
)
def test_all_sizes_and_costs_are_on_the_list(name, sizes):
    asked = {(w.network.name, w.batch_size, *w.costs) for w in COMPACT_ON_GPU}
    assert {(name, n, cost) for n in sizes for cost in (1.0, 0.4, 0.3)} <= asked
    assert "regnety_008" in {name for name, *_ in asked}


def test_key_figures_come_first_and_fit():
    assert ALL_ON_CPU[: len(KEY_ON_CPU)] == KEY_ON_CPU
    assert len(set(ALL_ON_CPU)) == len(ALL_ON_CPU)
    for network in {work.network for work in ALL_ON_CPU if work.deep}:
        assert [work for work in ALL_ON_CPU if work.network == network and not work.deep], "later with all peers"
    source = Path(throughput.__file__).read_text()
    quick, default = map(
        int, re.search(r"arguments.seconds or \((\d+) if arguments.quick else (\d+)\)", source).groups()
    )
    assert sum(work.seconds for work in KEY_ON_CPU) <= default
    # The ops take a little more than a minute, and one peer may hang when the budget ends.
    assert quick < default <= 25 * 60 - 90 - ANSWER_SECONDS
    assert f"on a CPU {default}, --quick {quick}" in source


@pytest.mark.parametrize("target", [t for t in TARGETS if t.provider == RESIDENT_INT8], ids=lambda target: target.text)
def test_every_target_of_int8_is_measured(target: Target):
    rows = [
        {"network": w.network.name, "batch_size": w.batch_size, "provider": RESIDENT_INT8, "setting": setting_of(cost)}
        for w in INT8_ON_CPU
        for cost in w.costs
    ]
    assert {row["network"] for row in rows if target.concerns(row)} == set(target.networks)


def test_int8_is_measured_in_one_thread_then_in_all(monkeypatch):
    """Within its seconds, of which one thread leaves some."""
    asked = []
    monkeypatch.setattr(throughput, "run", lambda works, around, seconds, ways: asked.append((around, works, seconds)))
    monkeypatch.setattr(throughput, "environment", lambda device: torch.get_num_threads())
    monkeypatch.setattr(throughput, "conclude", lambda around: around == 1)
    monkeypatch.setattr(throughput.cpu_ways, "started", lambda peers: peers)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert throughput.int8(INT8_ON_CPU, 100) == 1, "of any part"
    finally:
        torch.set_num_threads(before)
    assert [(threads, works) for threads, works, _ in asked] == [(1, INT8_ON_CPU), (2, INT8_ON_CPU)]
    assert asked[0][2] == pytest.approx(65, abs=1)
    assert asked[1][2] == pytest.approx(100, abs=1)
    assert sum(work.guess for work in INT8_ON_CPU) <= 0.7 * 720 + 10
