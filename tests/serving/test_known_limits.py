"""Limits of a frozen network: they hold until thresholds, engine or mode change, in whatever way."""

import pytest
import torch
from networks import lived_in

import eefast
from eefast.serving import Overloaded
from eefast.serving.known_limits import KnownLimits


@pytest.fixture
def fast():
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12), num_classes=5), 3)
    return eefast.accelerate(net, frozen=True, engine="resident")


def known_of(fast):
    engine, limits, _ = fast.ready()
    return KnownLimits(fast, engine, limits)


def replaced(net):
    net.thresholds = net.thresholds + 0.25


CHANGES = {
    "in place": lambda net: net.thresholds.add_(0.25),
    "unseen": lambda net: net.thresholds.data[1:].add_(0.25),
    "through numpy": lambda net: net.thresholds.numpy().__iadd__(0.25),
    "replaced": replaced,
    "training": lambda net: net.train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_they_hold_until_something_changes(fast, change):
    known = known_of(fast)
    assert known.hold()
    change(fast.net)
    assert not known.hold()


def test_they_hold_again_with_the_same_numbers(fast):
    known = known_of(fast)
    fast.net.thresholds.add_(0.25)
    fast.net.thresholds.copy_(known.limits)
    assert known.hold()
    assert known.limits.tolist() == fast.ready()[1].tolist()


def test_single_images_follow_thresholds_and_name_what_is_wrong(fast, serve):
    server, x = serve(fast, max_queue=50), torch.zeros(3, 12, 12)
    for first, at in [(2.0, 2), (2.0, 2), (-1.0, 0), (2.0, 2), (-1.0, 0), (-1.0, 0)]:
        fast.net.thresholds.fill_(first)
        assert server.submit(x).result(20).exit == at
    assert server.submit(x.clone().requires_grad_(), 1000.0).result(20).exit == 0
    for wrong, text in [(x[:2], "expected"), (x[None], "one image"), (x.long(), "is torch.int64"), ([1.0], "a list")]:
        with pytest.raises((TypeError, ValueError), match=text):
            server.submit(wrong).result(20)
    with pytest.raises(ValueError, match=r"deadline=0\.0 must be above 0"):
        server.submit(x, 0.0)
    with pytest.raises(Overloaded):
        server.submit_all([x] * 51)
    fast.net.train()
    with pytest.raises(RuntimeError, match="eval mode"):
        server.submit(x)
