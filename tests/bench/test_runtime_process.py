"""Processes of peers that crash, raise or hang: that is said of the one, and the others are measured."""

import os
import signal
import time
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace

# At the end, where none of its modules hides one of the tests'.
import cpu_runs
import pytest
import runtime_process
import torch
from networks import images, lived_in
from peers import EAGER
from runtime_process import ANSWER_SECONDS, TURN_SECONDS, PeerError, RuntimeProcess, Setting
from subjects import Network, Subject

from eefast import zoo
from eefast.thresholds.outputs import collect

SHAPE = (1, 12, 12)
WORK = cpu_runs.CpuWork(Network("eenet20", SHAPE, 10, ()), 8, (1.0,), 1)
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


@pytest.fixture(scope="module")
def subject():
    net, x = lived_in(zoo.eenet("eenet20", 2, input_shape=SHAPE), 5), images(16, SHAPE)
    return Subject(net, x, collect(net, [(x, torch.zeros(len(x)))])[0])


@pytest.mark.usefixtures("waits")
def test_a_process_is_restarted_for_all_but_the_peer_that_ended_it(subject, tmp_path):
    right, wrong, ends = peer("right"), peer("raises", raises), peer("killed", killed)
    with torch.no_grad():
        expected = subject.net.plain()(subject.images)
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


def test_the_others_are_measured_where_one_hangs(subject, waits, monkeypatch):
    monkeypatch.setattr(cpu_runs, "ROUNDS", 2)
    monkeypatch.setattr(cpu_runs, "TURN_IMAGES", 8)
    monkeypatch.setattr(cpu_runs, "TURN_SECONDS", 0.001)
    late = partial(sleeps_when_timed, sign=waits.sign)
    peers = (
        *(peer("right"), peer("raises", raises), peer("sleeps", partial(sleeps, sign=waits.sign))),
        *(peer("sleeps when timed", late, "elsewhere"), peer("beside it", family="elsewhere")),
    )
    with cpu_runs.started(peers) as workers, cpu_runs.saved(subject) as folder:
        cpu_runs.open_everywhere(workers, folder)
        lost = workers["here"]._process
        rows = {row.provider: row for row in cpu_runs.measure(WORK, subject, workers, peers)}
        # Asked again by the next process, since another peer hung and ended the first one.
        assert workers["here"].ends == 1
        assert lost.exitcode == -signal.SIGKILL

        workers["here"].open(folder)
        with pytest.raises(PeerError, match="not asked again: no answer within 180 s"):
            workers["here"].answer(peers[2], SETTING)
    assert waits.limits == {ANSWER_SECONDS, TURN_SECONDS + 10 * cpu_runs.TURN_SECONDS}
    assert rows["right"].images_per_s[1] > 0
    assert rows["right"].best_static == "right"
    assert rows["raises"].note == "RuntimeError: no such kernel"
    assert rows["sleeps"].note == "no answer within 180 s, so its process was killed"
    assert rows["sleeps when timed"].note == "no answer within 60 s, so its process was killed"
    assert rows["beside it"].note.startswith("it lost its process to sleeps when timed (no answer within 60 s")
    assert not any(row.images_per_s for name, row in rows.items() if name != "right")
