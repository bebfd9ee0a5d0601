"""The bench of whole networks: thresholds give the cost asked for, and only right answers get a speed."""

import json
import os
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from networks import images, lived_in

from eefast import zoo
from eefast.calibrate import collect, exits_taken

# At the end, where none of its modules hides one of the tests'.
sys.path.append(str(Path(__file__).parent.parent / "bench"))

import throughput_cpu
from peers import PEERS, Peer, eager
from prepared import Network, check, mix_of_cost, thresholds
from report import show
from rows import environment

SHAPE = (1, 12, 12)


@pytest.fixture(scope="module")
def subject():
    net = lived_in(zoo.eenet("eenet20", 2, input_shape=SHAPE), 5)
    x = images(64, SHAPE)
    outputs, _ = collect(net, [(x, torch.zeros(len(x)))])
    return throughput_cpu.Subject(net, x, outputs)


@pytest.mark.parametrize("wanted", [0.5, 0.3, 0.2])
def test_thresholds_give_the_cost_asked_for(subject, wanted):
    cost = subject.net.cost
    mix = mix_of_cost(cost.tolist(), wanted)
    assert sum(mix) == pytest.approx(1)
    taken = exits_taken(subject.outputs, subject.net.criterion, thresholds(subject.outputs, mix))
    assert float(cost[taken].mean()) == pytest.approx(wanted, abs=1.5 / len(taken))


def test_cost_goes_from_the_first_exit_to_none(subject):
    cost = subject.net.cost.tolist()
    assert mix_of_cost(cost, 1) == (0, 0, 1)
    assert mix_of_cost(cost, 0.5 * cost[0]) == pytest.approx((1, 0, 0))
    assert thresholds(subject.outputs, (0, 0, 1)) == [float("inf")] * 2
    assert exits_taken(subject.outputs, subject.net.criterion, [float("inf")] * 2).tolist() == [2] * 64


def wrong_logits(net):
    plain = eager.prepare(net)
    return lambda x: plain(x) + torch.arange(net.num_classes)


def wrong_exits(net):
    def run(x):
        result = net(x)
        return result._replace(exit_index=(result.exit_index + 1) % 3)

    return run


def ends(net):
    os._exit(7)


def test_only_right_answers_get_a_speed(subject, monkeypatch):
    monkeypatch.setattr(throughput_cpu, "ROUNDS", 2)
    monkeypatch.setattr(throughput_cpu, "TURN_SECONDS", 0.001)
    right = replace(eager.PEER, name="right", family="here")
    peers = (
        right,
        replace(right, name="wrong logits", prepare=wrong_logits),
        Peer("wrong exits", wrong_exits, str, False, "here"),
        replace(right, name="missing", needs=("a_package_that_nobody_has",)),
        replace(right, name="ends", prepare=ends, family="elsewhere"),
    )
    work = throughput_cpu.Work(Network("eenet20", SHAPE, 10, ()), 8, (0.3,))
    with throughput_cpu.started(peers) as workers, throughput_cpu.saved(subject) as folder:
        throughput_cpu.open_everywhere(workers, folder)
        rows = {row.provider: row for row in throughput_cpu.measure(work, subject, workers, peers)}
    assert rows["right"].images_per_s[1] > 0
    assert rows["right"].realised_ratio == pytest.approx(1)
    assert rows["right"].best_static == "right"
    assert rows["right"].exits == (0, 0, 64)
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


def ready(peer):
    reason = f"needs {' and '.join(peer.needs)}: pip install 'eefast[bench]'"
    return pytest.param(
        peer, id=peer.name, marks=pytest.mark.skipif(not all(map(find_spec, peer.needs)), reason=reason)
    )


# torch.compile takes longer than all the others; those with variables need processes of their own.
@pytest.mark.parametrize("peer", [ready(p) for p in PEERS if p.family != "torch.compile" and not p.variables])
@torch.no_grad()
def test_a_peer_agrees_with_the_reference(subject, peer):
    for cost in (1,) if peer.static else (1, 0.5, 0.25):
        prepared = throughput_cpu.make_case(subject, 16, cost).prepared
        try:
            run = peer.prepare(prepared.net)
        except ValueError as error:
            if "AVX512-BF16" not in str(error) and "C++ kernels are" not in str(error):
                raise
            pytest.skip(str(error))  # what this machine lacks, in the engine's own words
        batches = [x.contiguous(memory_format=peer.memory_format) for x in prepared.batches]
        found = [run(x) for x in batches]
        if peer.static:
            logits, taken = torch.cat(found), torch.full((64,), 2)
        else:
            logits, taken = (torch.cat([getattr(r, name) for r in found]) for name in ("logits", "exit_index"))
        checked, note = check(prepared, peer.static, logits, taken, peer.dtype)
        assert checked, note
        if not peer.static:
            prepared.net.thresholds.fill_(-1)
            assert run(batches[0]).exit_index.tolist() == [0] * 16, "it must follow thresholds that change"
    assert peer.describe()
