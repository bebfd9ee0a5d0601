"""Which peer of a CPU is measured in which case, and what a turn in its process takes."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import cpu_ways
import network_runs
import pytest
import torch
from energy import Counter, Meter
from peers import ALL_PEERS, EAGER, MASKED, eefast_engines, torch_compile_early
from subjects import Network
from workloads import Workload

SHAPE = (1, 12, 12)
WORK = Workload(Network("eenet20", SHAPE, 10, ()), 16, (0.3,))
KEY = (EAGER, MASKED, next(peer for peer in eefast_engines.PEERS if peer.name == "eefast resident"))


def test_no_minutes_of_compilation_for_deep_networks(subject):
    names = [
        {peer.name for peer, _ in cpu_ways.pairs_of(replace(WORK, deep=deep), subject, ALL_PEERS)}
        for deep in (False, True)
    ]
    compiled = {peer.name for peer in torch_compile_early.PEERS}
    assert names[0] == {peer.name for peer in ALL_PEERS} == names[1] | compiled
    assert not names[1] & compiled


def test_peers_without_exits_are_measured_once_and_others_where_images_exit_early(subject):
    found = [
        (peer.name, case.setting) for peer, case in cpu_ways.pairs_of(replace(WORK, costs=(1.0, 0.3)), subject, KEY)
    ]
    assert found == [
        *(("plain, eager", "no exits"), ("masked, PyTorch", "cost 0.3")),
        *(("eefast resident", "no exits"), ("eefast resident", "cost 0.3")),
    ]
    thorough = replace(WORK, costs=(1.0, 0.3), thorough=True)
    assert [case.setting for peer, case in cpu_ways.pairs_of(thorough, subject, [MASKED])] == ["no exits", "cost 0.3"]


def test_one_network_for_all_its_batch_sizes(monkeypatch):
    made, opened = [], []
    monkeypatch.setattr(cpu_ways, "make_subject", lambda network, count: made.append((network.name, count)) or network)
    device = cpu_ways.CpuWays((), {})
    monkeypatch.setattr(device, "open", opened.append)
    other = Network("other", SHAPE, 10, ())
    works = [Workload(network, n) for network, n in ((WORK.network, 16), (WORK.network, 1024), (other, 1))]
    assert [device.subject(work, works) for work in works] == [WORK.network, WORK.network, other]
    assert made == [("eenet20", 1024), ("other", cpu_ways.LEAST_IMAGES)]
    assert opened == [WORK.network, other]


@pytest.mark.parametrize("peer", ALL_PEERS, ids=lambda peer: peer.name)
def test_a_peer_can_be_sent_to_its_process(peer):
    assert pickle.loads(pickle.dumps(peer)).name == peer.name


def test_energy_and_memory_on_a_cpu(subject, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(cpu_ways, "time", clock)
    # Ten watts.
    monkeypatch.setattr(cpu_ways, "meter", lambda device: Meter([Counter(lambda: 10 * now[0])], "a test"))

    def seconds(*_):
        # To get going, then three passes of what takes 0.2 s.
        now[0] += 0.1 + 3 * 0.2
        return 0.2

    seen = {"exits": None, "setup_seconds": 1.0, "details": "", "peak_memory": 1234}
    answer = SimpleNamespace(logits=subject.outputs[-1].logits, **seen)
    device = cpu_ways.CpuWays((EAGER,), {"torch": SimpleNamespace(ends=0, answer=lambda *_: answer, seconds=seconds)})
    (row,), _ = network_runs.measure(replace(WORK, batch_size=8, costs=(1.0,)), subject, device)
    assert not row.note
    # 32 images in 0.2 s.
    assert row.joules_per_image == pytest.approx(10 * 0.2 / 32)
    assert row.peak_memory == 1234


@pytest.mark.parametrize(
    ("side", "batch_size", "batches"), [(32, 1, 32), (32, 16, 2), (32, 257, 1), (224, 1, 8), (224, 3, 2), (224, 16, 1)]
)
def test_turns_have_fewer_large_images(side, batch_size, batches):
    assert cpu_ways.turn_batches(torch.empty(batch_size, 3, side, side)) == batches
