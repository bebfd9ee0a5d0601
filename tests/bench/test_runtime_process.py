"""Processes of peers that crash, raise or hang: that is said of the one, and the others are measured."""

import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace

# At the end, where none of its modules hides one of the tests'.
import cpu_ways
import network_runs
import pytest
import runtime_process
import torch
from peers import EAGER
from runtime_process import ANSWER_SECONDS, TURN_SECONDS, PeerError, RuntimeProcess, Setting
from subjects import Network
from summary import failures
from workloads import Workload

import eefast

SHAPE = (1, 12, 12)
WORK = Workload(Network("eenet20", SHAPE, 10, ()), 8, (1.0,), 1)
SETTING = Setting((float("inf"),) * 2, 8, 2)


def raises(net):
    raise RuntimeError("no such kernel")


def killed(net):
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(net, sign):
    sign.touch()
    time.sleep(1000)


def sleeps_when_timed(net, sign):
    run, seen = EAGER.prepare(net), []

    def answered_then_asleep(x):
        seen.append(x)
        if len(seen) > 2:
            sleeps(net, sign)
        return run(x)

    return answered_then_asleep


def peer(name, prepare=EAGER.prepare, family="here"):
    return replace(EAGER, name=name, prepare=prepare, family=family)


@pytest.fixture
def waits(monkeypatch, tmp_path):
    """A file that a peer makes before it falls asleep, and the limits until when the parent would wait for others.

    Until there is such a file there is time, however busy the machine is.
    """
    found, poll = SimpleNamespace(sign=tmp_path / "asleep", limits=set()), Connection.poll

    def poll_until_asleep(connection, limit):
        found.limits.add(limit)
        while not poll(connection, 0.05):
            if found.sign.exists():
                found.sign.unlink()
                return False
        return True

    monkeypatch.setattr(Connection, "poll", poll_until_asleep)
    return found


@pytest.mark.usefixtures("waits")
@pytest.mark.slow
def test_a_process_is_restarted_for_all_but_the_peer_that_ended_it(subject, tmp_path):
    right, wrong, ends = peer("right"), peer("raises", raises), peer("killed", killed)
    with torch.no_grad():
        expected = subject.net.plain()(subject.images[:16])
    process = RuntimeProcess((right, wrong, ends), 1)
    try:
        runtime_process.save(tmp_path, subject.net, subject.images)
        process.open(tmp_path)
        process.answer(right, SETTING)
        with pytest.raises(PeerError, match="RuntimeError: no such kernel"):
            process.answer(wrong, SETTING)
        assert process.ends == 0, "an exception is no reason to restart"
        with pytest.raises(PeerError, match="its process has ended, exit code -9"):
            process.answer(ends, SETTING)
        assert process.ends == 1
        with pytest.raises(PeerError, match=r"lost its process to killed \(its process has ended, exit code -9\)"):
            process.seconds(right, SETTING, [0], 0.001)
        with pytest.raises(PeerError, match="not asked again: its process has ended"):
            process.answer(ends, SETTING)
        torch.testing.assert_close(process.answer(right, SETTING).logits, expected, rtol=0, atol=1e-4)
        assert process.seconds(right, SETTING, [0], 0.001) > 0

        with pytest.raises(PeerError, match="missing"):
            process.open(tmp_path / "missing")
        with pytest.raises(PeerError, match="could not open the network"):
            process.answer(right, SETTING)  # no answers with the previous network
        process.open(tmp_path)  # with the next network it may try again
        with pytest.raises(PeerError, match=r"^its process has ended, exit code -9$"):
            process.answer(ends, SETTING)
        assert process.ends == 2
    finally:
        process.close()


@pytest.mark.slow
def test_the_others_are_measured_where_one_hangs(subject, waits, monkeypatch):
    monkeypatch.setattr(network_runs, "ROUNDS", 2)
    monkeypatch.setattr(cpu_ways, "TURN_IMAGES", 8)
    monkeypatch.setattr(cpu_ways, "TURN_SECONDS", 0.001)
    late = partial(sleeps_when_timed, sign=waits.sign)
    peers = (
        *(peer("right"), peer("raises", raises), peer("sleeps", partial(sleeps, sign=waits.sign))),
        *(peer("sleeps when timed", late, "elsewhere"), peer("beside it", family="elsewhere")),
    )
    with closing(cpu_ways.started(peers)) as device:
        device.open(subject)
        here = device.processes["here"]
        lost = here._process
        rows = {row.provider: row for row in network_runs.measure(WORK, subject, device)[0]}
        # Asked again by the next process, since another peer hung and ended the first one.
        assert here.ends == 1
        assert lost.exitcode == -signal.SIGKILL

        device.open(subject)
        with pytest.raises(PeerError, match="not asked again: no answer within 180 s"):
            here.answer(peers[2], SETTING)
    assert waits.limits == {ANSWER_SECONDS, TURN_SECONDS + 10 * cpu_ways.TURN_SECONDS}
    assert rows["right"].images_per_s[1] > 0
    assert rows["right"].best_static == "right"
    assert rows["raises"].note == "RuntimeError: no such kernel"
    assert rows["sleeps"].note == "no answer within 180 s, so its process was killed"
    assert rows["sleeps when timed"].note == "no answer within 60 s, so its process was killed"
    assert rows["beside it"].note.startswith("it lost its process to sleeps when timed (no answer within 60 s")
    assert not any(row.images_per_s for name, row in rows.items() if name != "right")


def test_a_process_tells_its_peak_memory(subject, tmp_path, monkeypatch):
    runtime_process.save(tmp_path, subject.net, subject.images)
    process = runtime_process.Server({EAGER.name: EAGER})
    process.open(str(tmp_path))
    monkeypatch.setattr(runtime_process, "peak_memory", lambda run, device: (run(), {"cpu": 1234}[device]))
    answer = process.answer(EAGER.name, Setting((0.5, 0.5), 16, 4))
    assert answer.peak_memory == 1234
    torch.testing.assert_close(answer.logits, subject.outputs[-1].logits, rtol=1e-4, atol=1e-4)


def test_a_peer_that_is_calibrated_gets_the_images(subject):
    def by_images(net, images):
        assert torch.equal(images, subject.images)
        return EAGER.prepare(net)

    calibrated = replace(peer("calibrated", by_images), calibrated=True)
    server = runtime_process.Server({calibrated.name: calibrated}, subject.net, subject.images)
    with torch.no_grad():
        expected = subject.net.plain()(subject.images[:16])
    found = server.answer(calibrated.name, SETTING)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("seconds", "warm"), [(0.7, [0.05, 0.05]), (0.9, [0.05])])
def test_only_short_turns_warm_up_again(seconds, warm, monkeypatch):
    """`least` is a tenth of a second, of which the half is to warm up."""
    asked = []
    monkeypatch.setattr(
        runtime_process, "mean_seconds", lambda run, least, clock=None: (asked.append(least), seconds)[1]
    )
    server = runtime_process.Server({EAGER.name: EAGER}, eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE).eval())
    server.images = torch.zeros(8, *SHAPE)
    for _ in range(2):
        assert server.seconds(EAGER.name, SETTING, [0], 0.1, "process_time") == seconds
    assert [least for least in asked if least != 0.1] == warm
    assert asked.count(0.1) == 2


@pytest.mark.parametrize(
    ("error", "note", "fails"),
    [
        (RuntimeError("WRONG: not those\nof integers"), "WRONG: not those\nof integers", True),
        (PeerError("no answer"), "no answer", False),
        (RuntimeError("no memory\nat all"), "RuntimeError: no memory", False),
    ],
)
def test_a_wrong_answer_fails_the_command(error, note, fails):
    assert runtime_process.note_of(error) == note
    assert failures([{"provider": "eefast", "note": note}]) == fails
