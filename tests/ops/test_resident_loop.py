"""Images that come one by one: the answers are the ops', bit for bit; who goes first; deadlines, ends and errors."""

import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
import torch
from networks import images, lived_in, spread_thresholds

import eefast
from eefast.ops.resident_loop import ResidentLoop, available

pytestmark = pytest.mark.skipif(not available, reason="loops are C++ threads")
SHAPE = (3, 12, 12)


class Opened:
    """A loop of an engine. groups: images that go together, in every section, instead of the planned ones."""

    def __init__(self, engine, workers=1, groups=None, shape=SHAPE):
        program, net, rule = engine.program, engine.net, engine.rule_of(None)
        sizes = program.groups if groups is None else torch.full_like(program.groups, groups)
        self.engine = engine
        self.loop = ResidentLoop(
            (program.steps, program.maps, sizes, program.packed), shape, net.num_exits,
            engine.plan.criterion if rule is None else "carried", net.num_classes, program.bfloat16, program.image,
            rule, workers,
        )  # fmt: skip

    def put(self, x, limits, ticket=0, deadline=inf):
        self.loop.put(x, limits, ticket, time.perf_counter(), deadline)

    def taken(self, count):
        """(ticket, exit, label, confidence, logits) of the next images, in the order of their answers."""
        found = []
        while len(found) < count:
            figures, logits = self.loop.take(0.0)
            assert len(figures)
            for (ticket, label, at, confidence, began, ended), row in zip(figures.tolist(), logits, strict=True):
                assert at < 0 or began <= ended <= time.perf_counter()
                found.append((int(ticket), int(at), int(label), confidence, row))
        assert len(found) == count
        return found


@pytest.fixture
def opened():
    made = []

    def open_loop(*arguments, **options):
        made.append(Opened(*arguments, **options))
        return made[-1]

    yield open_loop
    for one in made:
        one.loop.free()


@pytest.fixture(scope="module")
def floats():
    """(resident engine with two early exits, thresholds, 31 images of which some exit at each)."""
    net, x = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, num_classes=5), 3), images(31, SHAPE)
    spread_thresholds(net, x, 0.4)
    fast = eefast.accelerate(net, engine="resident")
    return fast.engine, fast.ready()[1], x


def engine_of(kind):
    """(engine, thresholds, images) of networks in which other code runs."""
    net, x = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, num_classes=5), 3), images(31, SHAPE)
    if kind == "carries":
        net = net.with_criterion("patience")
    spread_thresholds(net, x, 0.4)
    if kind in ("integers", "bytes"):
        net.normalization = ((0.5,) * 3, (0.3,) * 3)
        net = eefast.quantize(net, x)
        if kind == "bytes":
            x = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    fast = eefast.accelerate(net, engine="resident")
    return fast.engine, fast.ready()[1], x


def in_order(found):
    return sorted(found, key=lambda answer: answer[0])


def assert_same(found, expected):
    assert [ticket for ticket, *_ in found] == list(range(len(found)))
    assert [at for _, at, *_ in found] == expected.exit_index.tolist()
    assert [label for _, _, label, *_ in found] == expected.labels.tolist()
    assert torch.tensor([confidence for *_, confidence, _ in found]).equal(expected.confidence)
    assert torch.equal(torch.stack([row for *_, row in found]), expected.logits)


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_answers_have_the_bits_of_the_op(floats, opened, workers, groups):
    """All at once, and one by one."""
    engine, limits, x = floats
    loop, expected = opened(engine, workers, groups), engine.run(x, limits)
    loop.put(x, limits)
    assert_same(in_order(loop.taken(31)), expected)
    for i in range(31):
        loop.put(x[i : i + 1], limits, 31 + i)
    found = in_order(loop.taken(31))
    assert_same([(ticket - 31, *rest) for ticket, *rest in found], expected)
    assert list(loop.loop.counts) == [0] * 4
    assert set(expected.exit_index.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("kind", ["carries", "integers", "bytes"])
def test_rules_that_carry_and_integers(opened, kind):
    engine, limits, x = engine_of(kind)
    loop = opened(engine, 2)
    loop.put(x, limits)
    assert_same(in_order(loop.taken(31)), engine.run(x, limits))


def test_a_nan_for_which_there_are_no_integers(opened):
    engine, limits, x = engine_of("integers")
    x = x.clone()
    x[3, 0, 0, 0] = nan
    loop = opened(engine)
    loop.put(x[:7], limits)
    found = in_order(loop.taken(7))
    assert found[3][1] == engine.net.num_exits
    assert found[3][4].isnan().all()
    assert [at for _, at, *_ in found[:3]] == engine.run(x[:3], limits).exit_index.tolist()


def test_every_image_has_its_limits_and_its_layout(floats, opened):
    engine, limits, x = floats
    given = torch.stack([limits, torch.tensor([2.0, nan]), torch.tensor([-1.0, -1.0]), torch.tensor([2.0, 2.0])], 1)
    loop, strided = opened(engine), x[:4].contiguous(memory_format=torch.channels_last)
    loop.put(strided, given)
    strided.zero_()  # the caller's again
    given.clone().zero_()
    assert_same(in_order(loop.taken(4)), engine.run(x[:4], given))
    loop.put(x[:1], given[:, 3:], 4)
    assert loop.taken(1)[0][1] == 2


def exits_of(wanted):
    """Limits with which images take these exits."""
    return torch.tensor([[nan if at <= i else 2.0 for at in wanted] for i in range(2)])


def test_easy_images_go_before_hard_ones_that_came_earlier(floats, opened):
    engine, _, x = floats
    loop = opened(engine, groups=1)
    loop.put(x[:3], exits_of([2, 1, 0]))
    assert [ticket for ticket, *_ in loop.taken(3)] == [2, 1, 0]


def test_in_a_long_queue_images_are_carried_to_their_exits_one_by_one(floats, opened):
    """Until no more than three wait."""
    engine, _, x = floats
    loop, wanted = opened(engine, groups=1), [2, 0, 1] * 10
    loop.put(x[:30], exits_of(wanted))
    found = [(ticket, at) for ticket, at, *_ in loop.taken(30)]
    assert found[:20] == list(enumerate(wanted))[:20]
    assert sorted(found) == list(enumerate(wanted))


def test_an_arrival_goes_first_between_any_two_steps(opened):
    """While one thread carries a large image through the final stage, which it would not leave otherwise.

    Again where the machine was so busy that the large one was answered before the other one came.
    """
    shape = (3, 96, 96)
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=shape, num_classes=5), 3)
    engine = eefast.accelerate(net, engine="resident").engine
    loop, x, found = opened(engine, groups=1, shape=shape), images(2, shape), []
    while found[-2:] != [1, 0]:
        assert len(found) < 2000
        # As if it came later, so that it is never one that has been there for long.
        loop.loop.put(x[:1], exits_of([2]), len(found), time.perf_counter() + 1000, inf)
        while loop.loop.counts[3] == 0 and sum(loop.loop.counts):  # until it has passed both early exits
            time.sleep(0)
        loop.put(x[1:], exits_of([0]), len(found) + 1)
        found += [ticket % 2 for ticket, *_ in loop.taken(2)]


def test_an_image_that_came_long_ago_goes_before_all_others(opened):
    """While it is carried through the final stage easy ones come; the loop knows how long an image takes."""
    shape = (3, 96, 96)
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=shape, num_classes=5), 3)
    engine = eefast.accelerate(net, engine="resident").engine
    loop, x = opened(engine, groups=1, shape=shape), images(2, shape)
    loop.put(x[:1], exits_of([2]))
    loop.taken(1)
    for i in range(1, 21, 2):
        loop.loop.put(x[:1], exits_of([2]), i, time.perf_counter() - 1000, inf)
        while loop.loop.counts[3] == 0 and sum(loop.loop.counts):  # until it has passed both early exits
            time.sleep(0)
        loop.put(x[1:], exits_of([0]), i + 1)
        assert [ticket for ticket, *_ in loop.taken(2)] == [i, i + 1]


def test_an_image_with_a_deadline_goes_even_before_one_that_came_long_ago(opened):
    """As `test_an_arrival_goes_first_between_any_two_steps`, which says why it may take several times."""
    shape = (3, 96, 96)
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=shape, num_classes=5), 3)
    engine = eefast.accelerate(net, engine="resident").engine
    loop, x, found = opened(engine, groups=1, shape=shape), images(2, shape), []
    loop.put(x, exits_of([2, 2]))
    loop.taken(2)
    while found[-2:] != [1, 0]:
        assert len(found) < 2000
        loop.loop.put(x[:1], exits_of([2]), 2 + len(found), time.perf_counter() - 1000, inf)
        while loop.loop.counts[3] == 0 and sum(loop.loop.counts):  # until it has passed both early exits
            time.sleep(0)
        loop.put(x[1:], exits_of([0]), 3 + len(found), time.perf_counter() + 1000)
        found += [ticket % 2 for ticket, *_ in loop.taken(2)]


def test_answers_without_deadlines_are_gathered_and_others_are_not(floats, opened):
    """Where the last ones were taken just before."""
    engine, _, x = floats
    loop = opened(engine)
    spans = {inf: [], 1000.0: []}
    for i in range(2000):
        # Other processes may take the time of all of the first ones.
        if i >= 60 and min(spans[1000.0]) < 4e-4:
            break
        deadline = list(spans)[i % 2]
        loop.put(x[:1], exits_of([0]), 2 * i, time.perf_counter() + deadline)
        loop.taken(1)
        last = time.perf_counter()
        loop.put(x[:1], exits_of([0]), 2 * i + 1, time.perf_counter() + deadline)
        loop.taken(1)
        spans[deadline].append(time.perf_counter() - last)
    # One may look shorter, where this thread was interrupted between its answer and the clock.
    assert statistics.median(spans[inf]) >= 4e-4 > min(spans[1000.0])


@pytest.mark.parametrize(("seconds", "exits"), [(-1.0, [0] * 7), (1e-6, [0] * 7), (1000.0, [2] * 7)])
def test_a_deadline_makes_images_exit_where_they_still_can(floats, opened, seconds, exits):
    engine, _, x = floats
    loop = opened(engine)
    loop.put(x[:7], exits_of([2] * 7), 0, time.perf_counter() + seconds)
    found = in_order(loop.taken(7))
    assert [at for _, at, *_ in found] == exits
    assert_same(found, engine.run(x[:7], exits_of(exits)))


def test_images_that_wait_for_a_deadline_are_answered_by_the_exit_that_they_passed(floats, opened):
    """Of a hundred hard images with a deadline after a moment, none goes on for long, and none is lost."""
    engine, _, x = floats
    loop = opened(engine, 2)
    ones = x[:1].repeat(100, 1, 1, 1)
    loop.put(ones, exits_of([2] * 100), 0, time.perf_counter() + 2e-3)
    found = in_order(loop.taken(100))
    for at, row in ((at, row) for _, at, _, _, row in found):
        assert torch.equal(row, engine.run(x[:1], exits_of([at])).logits[0])
    assert list(loop.loop.counts) == [0] * 4


def test_images_that_came_too_late_hurry_no_others(floats, opened):
    engine, _, x = floats
    loop = opened(engine)
    for i in range(20):
        loop.put(x[:1], exits_of([2]), i, time.perf_counter() - 3600)
    assert {at for _, at, *_ in loop.taken(20)} == {0}
    loop.put(x[:1], exits_of([2]), 20, time.perf_counter() + 10)
    assert loop.taken(1)[0][1] == 2


def test_what_is_cancelled_comes_back_without_an_answer(floats, opened):
    engine, limits, x = floats
    loop = opened(engine, groups=1)
    loop.put(x.repeat(3, 1, 1, 1), limits)
    loop.loop.cancel(92)
    loop.loop.cancel(92)
    loop.loop.cancel(1000)
    found = in_order(loop.taken(93))
    assert [ticket for ticket, *_ in found] == list(range(93))
    assert [at for _, at, *_ in found[:62]] == engine.run(x, limits).exit_index.tolist() * 2
    assert found[92][1] in (-1, int(engine.run(x[30:31], limits).exit_index))  # it may have had its answer


@pytest.mark.parametrize("drop", [False, True])
def test_a_closed_loop_takes_no_more_and_ends(floats, opened, drop):
    engine, limits, x = floats
    loop = opened(engine, 2)
    loop.put(x, limits)
    loop.loop.close(drop)
    loop.loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.put(x, limits, 31)
    found = in_order(loop.taken(31))
    expected = engine.run(x, limits).exit_index.tolist()
    assert [ticket for ticket, *_ in found] == list(range(31))
    assert all(at == wanted or (drop and at == -1) for (_, at, *_), wanted in zip(found, expected, strict=True))
    assert len(loop.loop.take(0.0)[0]) == 0


def test_wrong_arguments_are_named(floats, opened):
    engine, limits, x = floats
    loop = opened(engine)
    wrong = {
        "images has shape": (x[:, :2], limits),
        "images is Double": (x.double(), limits),
        "limits has shape": (x, limits[:1]),
        "limits is Double": (x, limits.double()),
    }
    for text, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=text):
            loop.put(*arguments)
    with pytest.raises(RuntimeError, match=r"workers = 0; expected 1 …"):
        opened(engine, 0)
    part = replace(engine.program_part(1, 2))
    with pytest.raises(RuntimeError, match="expected a whole network"):
        ResidentLoop(
            (part.steps, part.maps, part.groups, part.packed), (int(part.maps[0, 0]), 12, 12), 1, "learned", 5, False,
            None, None, 1,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="there is no loop 0"):
        torch.ops.eefast.resident_loop_take(0, 0.0)


def test_free_wakes_whoever_waits_for_answers(floats):
    opened, taken = Opened(floats[0]), []
    waiting = threading.Thread(target=lambda: taken.append(opened.loop.take(0.0)), daemon=True)
    waiting.start()
    time.sleep(0.1)
    opened.loop.free()
    waiting.join(10)
    assert not waiting.is_alive()
    assert [len(figures) for figures, _ in taken] == [0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_free_in_a_forked_process_waits_for_no_threads(floats):
    opened = Opened(floats[0])
    child = os.fork()
    if child == 0:
        opened.loop.free()
        os._exit(7)
    ended, end = (0, 0), time.monotonic() + 10
    while ended == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
        ended = os.waitpid(child, os.WNOHANG)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    opened.loop.free()
    assert os.waitstatus_to_exitcode(ended[1]) == 7
    assert ended[0] == child


TOO_MANY = """
import resource, sys
from pathlib import Path
import torch
from networks import lived_in
from test_resident_loop import SHAPE, Opened
import eefast
net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, num_classes=5), 3)
engine = eefast.accelerate(net, engine="resident").engine
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)  # threads have stacks of 8 MB
try:
    Opened(engine, workers=400)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by what Linux says is used")
def test_threads_that_cannot_be_started_are_an_error():
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", TOO_MANY], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"thread \d+ of 400 could not be started|no memory could be had", done.stdout), done.stdout
