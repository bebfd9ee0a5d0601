"""Networks of torchvision and timm: what is measured of them, by which clock, and where the page shows it."""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import backbones
import benchmarks_page
import cpu_ways
import network_runs
import pytest
import torch
from page_tables import backbone_table
from peers import BACKBONE_INT8_PEERS, BACKBONE_PEERS, EAGER, TORCH_COMPILE
from rows import NetworkRow
from runtime_process import Server, Setting
from selection import AUTO, COMPACT
from shown_rows import ON_A_CPU, shown
from subjects import Network
from workloads import Workload, on_backbones

from eefast.measure.tables import markdown

ENVIRONMENT = {**ON_A_CPU, "threads": 1, "capability": "BEADS", "commit": "abc", "torch": "2"}
RESNET = "torchvision:resnet18"


@pytest.mark.parametrize(("text", "found"), [("1,8,64", (1, 8, 64)), ("31", (31,)), ("3,1,3", (3, 1))])
def test_batch_sizes(text, found):
    assert backbones.sizes(text) == found


@pytest.mark.parametrize("text", ["", "0", "-1", "65", "1,,2", "two"])
def test_batch_sizes_that_cannot_be_measured(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be numbers from 1 to 64"):
        backbones.sizes(text)


@pytest.fixture
def asked(monkeypatch):
    """Arguments → works, seconds, peers, clock and threads that would be measured."""
    monkeypatch.setattr(backbones, "environment", lambda device: {})
    monkeypatch.setattr(backbones, "conclude", lambda around: 0)
    monkeypatch.setattr(backbones.cpu_ways, "started", lambda peers, clock: (peers, clock))
    seen = []
    monkeypatch.setattr(backbones, "run", lambda works, around, *rest: seen.append((works, *rest)))
    threads = torch.get_num_threads()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["backbones.py", *arguments])
        assert backbones.main() == 0
        ((works, seconds, (peers, clock)),) = seen
        return works, seconds, peers, clock, torch.get_num_threads()

    yield run
    torch.set_num_threads(threads)


def test_one_thread_by_the_time_of_the_process(asked):
    works, seconds, peers, clock, threads = asked()
    assert works == on_backbones((1, 8, 64))
    assert sum(work.guess for work in works) <= seconds
    assert (peers, clock, threads) == (BACKBONE_PEERS, "process_time", 1)


def test_several_threads_by_the_clock_on_the_wall(asked):
    """The time of a process is that of all its threads together."""
    works, seconds, peers, clock, threads = asked(
        "--threads", "2", "--only", "resnet18", "--batches", "3,1", "--seconds", "5", "--compile"
    )
    assert [(work.network.name, work.batch_size) for work in works] == [(RESNET, 3), (RESNET, 1)]
    assert (seconds, clock, threads) == (5, "perf_counter", 2)
    assert peers == (*BACKBONE_PEERS, TORCH_COMPILE)


def test_eight_bits_beside_float32(asked):
    _, _, peers, _, _ = asked("--int8")
    assert peers == BACKBONE_INT8_PEERS
    assert {peer.name for peer in peers if peer.dtype == torch.int8} == {
        *("plain, ONNX Runtime int8", "plain, OpenVINO int8", "eefast call, int8"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--only", "no such"), "there are torchvision:resnet18"), (("--threads", "0"), "at least 1")],
    ids=["only", "threads"],
)
def test_what_cannot_be_asked_for(asked, capsys, arguments, message):
    with pytest.raises(SystemExit):
        asked(*arguments)
    assert message in capsys.readouterr().err


def test_the_default_plans_before_another_engine_has_timed_the_stages():
    names = [peer.name for peer in BACKBONE_PEERS]
    assert names.index(AUTO) < names.index(COMPACT)


def test_a_network_that_takes_no_exits_is_a_row_that_says_so(monkeypatch):
    rows = []
    monkeypatch.setattr(network_runs, "append", lambda found, around: rows.extend(found))
    network = Network("torchvision:resnet18", (3, 32, 32), 10, (0.0, 1.0), exits=("fc",))
    network_runs.run([Workload(network, 1)], {}, 1000, cpu_ways.CpuWays((), {}))
    (row,) = rows
    assert (row.network, row.images_per_s) == ("torchvision:resnet18", None)
    assert "fc" in row.note


def test_processes_are_told_the_clock(subject, monkeypatch):
    monkeypatch.setattr(cpu_ways, "PAUSE_SECONDS", 0)
    told = []
    seen = {"exits": None, "setup_seconds": 1.0, "details": "", "peak_memory": None}
    process = SimpleNamespace(
        ends=0,
        answer=lambda *_: SimpleNamespace(logits=subject.outputs[-1].logits, **seen),
        seconds=lambda *arguments: told.append(arguments[-1]) or 0.1,
    )
    device = cpu_ways.CpuWays((EAGER,), {"torch": process}, "process_time")
    work = Workload(Network("eenet20", (1, 12, 12), 10, ()), 8, (1.0,))
    network_runs.measure(work, subject, device)
    assert set(told) == {"process_time"}


class Slept:
    """Eager PyTorch that waits first, with a plan."""

    plan = SimpleNamespace(engine="compact", stages=[SimpleNamespace(note="folded"), SimpleNamespace(note="OpenVINO")])

    def __init__(self, net):
        self.run = EAGER.prepare(net)

    def __call__(self, x):
        time.sleep(0.2)
        return self.run(x)


@pytest.fixture
def server(subject):
    return Server({"slept": replace(EAGER, name="slept", prepare=Slept), "eager": EAGER}, subject.net, subject.images)


SETTING = Setting((float("inf"),) * 2, 5, 1)


def test_the_time_of_the_process_does_not_count_waiting(server):
    wall, process = (server.seconds("slept", SETTING, [0], 0.0, clock) for clock in ("perf_counter", "process_time"))
    assert process < 0.2 <= wall


def test_details_say_what_runs_the_stages_of_eefast(server):
    details = [server.answer(name, SETTING).details for name in ("slept", "eager")]
    assert details[0] == f"{details[1]}; compact engine; stage 0: folded; stage 1: OpenVINO"


def row(provider, batch_size, setting, speed, ratio=1.0, **fields):
    cost = 1.0 if setting == "no exits" else 0.5
    known = {"images_per_s": (speed,) * 3, "mean_cost": cost, "realised_ratio": ratio, "best_static": "plain, OpenVINO"}
    found = NetworkRow(RESNET, provider, batch_size, "float32", (0.5, 0.5), True, setting=setting, **known)
    return replace(found, **fields)


ROWS = (
    row("plain, OpenVINO", 1, "no exits", 31.0),
    row("plain, OpenVINO", 8, "no exits", 37.0),
    row(AUTO, 1, "no exits", 62.0, 2.0, setup_seconds=7.25),
    row(AUTO, 1, "cost 0.5", 93.0, 1.5, setup_seconds=0.01),
    row(AUTO, 8, "no exits", 35.0, 0.94, setup_seconds=0.1),
    row("ONNX Runtime per stage", 1, "cost 0.5", 50.0, 0.81),
)


def test_the_table_has_planning_once_and_the_best_way_without_exits_at_every_cost():
    lines = backbone_table([{**asdict(r), "environment": ENVIRONMENT} for r in ROWS], markdown)[2:]
    assert lines == [
        f"| {RESNET} | 1 | no exits | plain, OpenVINO | 31.0 | 2.00 (62.0/s) |  |  |  | 7.2 |",
        f"| {RESNET} | 8 | no exits | plain, OpenVINO | 37.0 | 0.94 (35.0/s) |  |  |  |  |",
        f"| {RESNET} | 1 | cost 0.5 | plain, OpenVINO | 31.0 | 1.50 (93.0/s) |  | 0.81 (50.0/s) |  |  |",
    ]


def test_a_section_of_their_own(tmp_path):
    zoo = replace(row("eefast resident", 1, "no exits", 5.0), network="eenet20")
    refused = row("all ways", 1, "", 1.0, network="timm:vit", images_per_s=None, note="ValueError: no maps")
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({**asdict(r), "environment": ENVIRONMENT}) for r in (*ROWS, zoo, refused)]
    file.write_text("\n".join(lines) + "\n")
    text = benchmarks_page.page([file])
    before, section = text.split("### Networks of torchvision and timm")
    assert RESNET not in before
    assert "### eenet20" in before
    assert "- timm:vit, all ways: ValueError: no maps" in section
    assert "eefast call is slower than another way in 1 of 3 cases" in section
    assert "by the time of the process" in section
    file.write_text(lines[-2] + "\n")
    assert "torchvision and timm" not in benchmarks_page.page([file])


@pytest.mark.parametrize(("batch_size", "least"), [(1, 0.85), (8, 0.95), (64, 0.95)])
def test_targets(batch_size, least):
    text = f"backbones: realised ratio ≥ {least} at N = {batch_size}, cost .5"
    for ratio, verdict in ((least, "reached"), (least - 0.01, "NOT REACHED")):
        assert f"\n{verdict}: {text}" in shown(row(AUTO, batch_size, "cost 0.5", 1.0, ratio), around=ON_A_CPU)


@pytest.mark.parametrize(("ratio", "verdict"), [(0.95, "reached"), (0.94, "NOT REACHED")])
def test_the_target_without_exits(ratio, verdict):
    text = f"\n{verdict}: backbones: no image exits: ≥ 0.95 × the best static way: {int(ratio == 0.95)} of 1 cases"
    assert text in shown(row(AUTO, 8, "no exits", 1.0, ratio), around=ON_A_CPU)
