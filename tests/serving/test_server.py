"""A server's answers are the network's, under the thresholds of `submit`, exactly one for each image."""

import gc
import os
import threading

import pytest
import torch
from networks import assert_same_answers, lived_in, one_by_one, spread_thresholds

import eefast
from eefast.serving import Closed, Overloaded, Server

ENGINES = ["resident", "compact", "reference"]


def joined(answers, net):
    """Answers as the result of a batch."""
    numbers = [torch.tensor([getattr(a, name) for a in answers]) for name in ("exit", "confidence", "cost")]
    result = eefast.ExitResult(torch.stack([a.logits for a in answers]), *numbers)
    assert result.labels.tolist() == [a.label for a in answers]
    return result


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_of_many_threads_are_the_networks(small, serve, engine):
    net, x = small
    server = serve(eefast.accelerate(net, engine=engine))
    found = [None] * len(x)

    def client(first):
        for i in range(first, len(x), 7):
            image = x[i].clone()
            found[i] = server.submit(image)
            image.zero_()  # its memory is the caller's again

    clients = [threading.Thread(target=client, args=(first,)) for first in range(7)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    answers = [future.result(20) for future in found]
    assert_same_answers(joined(answers, net), one_by_one(net, x), net)
    assert len({a.exit for a in answers}) == net.num_exits + 1
    assert all(a.waited >= 0 and a.computed > 0 and not a.late for a in answers)


@pytest.mark.parametrize("engine", ENGINES)
def test_windows_of_rows_are_served(serve, engine):
    net = lived_in(eefast.zoo.eenet("eenet20-1d", 2, num_classes=4, input_shape=(2, 33)), 1).eval()
    x = torch.randn(9, 2, 33)
    spread_thresholds(net, x, 0.4)
    server = serve(eefast.accelerate(net, engine=engine))
    found = server.submit_all(list(x))
    assert_same_answers(joined([future.result(20) for future in found], net), net(x), net)
    with pytest.raises(ValueError, match=r"image has shape \(1, 2, 33\); expected \[C, L\], one window"):
        server.submit(x[:1]).result(20)


@pytest.mark.parametrize("engine", ["compact", "reference"])
def test_rules_in_python_are_served(small, serve, engine):
    net, x = small

    def sure(exit_index, logits, row, before, value):
        return logits, logits.softmax(dim=1).amax(dim=1)

    net = net.with_criterion(eefast.rules.PythonRule("sure", sure), [0.5] * net.num_exits).eval()
    server = serve(eefast.accelerate(net, engine=engine))
    found = server.submit_all(list(x))
    assert_same_answers(joined([future.result(20) for future in found], net), net(x), net)


def test_bytes_are_answered_as_in_a_batch(serve):
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12), normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    x = torch.randint(0, 256, (7, 3, 12, 12), dtype=torch.uint8)
    fast = eefast.accelerate(net)
    server = serve(fast)
    answers = [future.result(20) for future in server.submit_all(list(x))]
    assert torch.equal(joined(answers, net).logits, fast(x).logits)


@pytest.mark.parametrize("engine", ENGINES)
def test_settings_at_once_never_mix(small, serve, engine):
    """Also while another thread changes the network's thresholds, and with exit limits and profiles."""
    net, x = small
    rows = {"early": [-1.0, -1.0], "late": [2.0, 2.0], "middle": [2.0, -1.0]}
    before = net.thresholds.clone()
    net.profiles = rows
    server = serve(eefast.accelerate(net, engine=engine))
    expected = {"early": 0, "late": 2, "middle": 1}
    try:
        futures = []
        for i in range(60):
            name = list(rows)[i % 3]
            net.thresholds.copy_(torch.tensor(rows[name]))
            futures += [(expected[name], server.submit(x[i % 31]))]
            name = list(rows)[(i + 1) % 3]
            futures += [(expected[name], server.submit(x[i % 31], thresholds=rows[name]))]
            futures += [(expected[name], server.submit(x[i % 31], profile=name))]
            futures += [(1, server.submit(x[i % 31], profile="late", exit_limit=1))]
        assert [future.result(20).exit for _, future in futures] == [exit_index for exit_index, _ in futures]
    finally:
        net.thresholds.copy_(before)
        net.profiles = None


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_that_cannot_be_answered_fails_its_own_future(small, serve, engine):
    net, x = small
    server = serve(eefast.accelerate(net, engine=engine))
    wrong = {
        "image is a list; give a tensor": [1.0],
        "image has shape \\(1, 3, 12, 12\\); expected \\[C, H, W\\]": x[:1],
        "has shape \\(1, 4, 12, 12\\)": torch.zeros(4, 12, 12),
        "is torch.int64": x[0].long(),
        "has no normalization": x[0].to(torch.uint8),
    }
    futures = server.submit_all([*x[:3], *wrong.values(), torch.full_like(x[0], torch.nan), *x[3:6]])
    for text, future in zip(wrong, futures[3:], strict=False):
        with pytest.raises((TypeError, ValueError), match=text):
            future.result(20)
    answers = [future.result(20) for future in futures[:3] + futures[-3:]]
    assert_same_answers(joined(answers, net), one_by_one(net, x[:6]), net)
    assert futures[-4].result(20).exit == net.num_exits  # NaN never exits early


def test_changed_weights_answer_the_next_image(small, serve):
    _, x = small
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)), 3)
    server = serve(eefast.accelerate(net, engine="compact"))
    before = server.submit(x[0])
    lived_in(net, 4)
    answers = [future.result(20) for future in server.submit_all(list(x))]
    assert_same_answers(joined(answers, net), one_by_one(net, x), net)
    assert before.result(20).confidence != answers[0].confidence


def test_a_full_queue_refuses_at_once_and_loses_nothing(gated, serve):
    server = serve(gated.fast, max_queue=3)
    gated.shut(0)
    begun = server.submit(gated.image(1.0))
    assert gated.entered[0].wait(20)
    waiting = server.submit_all([gated.image(v) for v in (2.0, 3.0)])
    with pytest.raises(Overloaded, match="2 images wait, max_queue=3 may; send 2 again later"):
        server.submit_all([gated.image(4.0)] * 2)
    waiting.append(server.submit(gated.image(4.0)))
    with pytest.raises(Overloaded):
        server.submit(gated.image(5.0))
    assert waiting[0].cancel()  # makes room
    waiting.append(server.submit(gated.image(5.0)))
    gated.open()
    assert float(begun.result(20).logits[0]) == 1.0
    assert [float(future.result(20).logits[0]) for future in waiting[1:]] == [3.0, 4.0, 5.0]
    assert [values for stage, values in gated.seen] == [[1.0], [3.0, 4.0, 5.0]]


@pytest.mark.parametrize("drain", [None, 20.0, 0.0])
def test_closing_answers_what_waits_in_time(gated, drain):
    server = Server(gated.fast)
    gated.shut(1)
    hard = server.submit(gated.image(-0.5))
    assert gated.entered[1].wait(20)
    waiting = server.submit(gated.image(1.0))
    threading.Timer(0.1, gated.open).start()
    server.close(drain)
    with pytest.raises(Closed, match="make another one"):
        server.submit(gated.image(1.0))
    assert hard.result(0).exit == 1
    if drain == 0:
        with pytest.raises(Closed, match="before this image was answered"):
            waiting.result(0)
    else:
        assert waiting.result(0).exit == 0
    server.close()  # does nothing


def threads_of_servers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("eefast-serve")]


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_end_with_their_server(small, engine):
    before = len(threads_of_servers())
    fast = eefast.accelerate(small[0], engine=engine)
    with Server(fast) as server:
        assert len(threads_of_servers()) > before
    assert len(threads_of_servers()) == before
    server = Server(fast)
    del server
    gc.collect()
    assert len(threads_of_servers()) == before


def test_wrong_arguments_are_named(small, serve, monkeypatch):
    net, x = small
    fast = eefast.accelerate(net, engine="reference")
    with pytest.raises(TypeError, match=r"fast is a EarlyExitNet; give eefast\.accelerate"):
        Server(net)
    for words in ({"max_queue": 0}, {"workers": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Server(fast, **words)
    server = serve(fast)
    for words in ({"deadline": 0.0}, {"deadline": float("nan")}, {"thresholds": [0.5]}, {"profile": "no"}):
        with pytest.raises(ValueError, match=next(iter(words))):
            server.submit(x[0], **words)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(RuntimeError, match="spawn"):
        server.submit(x[0])
    monkeypatch.undo()
    assert server.submit(x[0]).result(20).exit in range(3)
