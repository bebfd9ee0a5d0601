"""The right answer: a batch answers as its images one by one, whatever is in it."""

import pickle
import warnings
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import eefast
from eefast import zoo
from eefast.heads import HEADS

CRITERIA = list(eefast.criteria.CRITERIA)
# Flattened heads need maps of the input's size, so only the first group of the 6n+2 networks has a place for them.
PLAIN = ("eenet20", "eenet32", "eenet44", "eenet56", "eenet110")
# Each kind of head, and each kind of block and stem; `make test-all` takes every network with every head.
FEW = {*(("eenet20", head) for head in HEADS), ("eenet8", "pool"), ("eenet18", "conv1"), ("eenet50", "bnpool")}
# The largest of them, where fewer images exit early.
LARGE = ("eenet50", 0.15)


def random_net(name, head, seed, criterion="learned", shape=(3, 16, 16), **more):
    net = zoo.eenet(name, 2, "fine", head, 10, shape, criterion=criterion, **more)
    return lived_in(net, seed)


@pytest.mark.parametrize(
    ("name", "head", "share"),
    [
        pytest.param(name, head, share, marks=[pytest.mark.slow] * ((name, head) not in FEW or (name, share) == LARGE))
        for name in zoo.names()
        for head in HEADS
        if head != "plain" or name in PLAIN
        for share in (0.4, 0.15)
    ],
)
@pytest.mark.sampled(8)
def test_batched_equals_one_by_one(name, head, share):
    index = zoo.names().index(name) + HEADS.index(head)
    seed = index if share == 0.4 else index + 101
    # Networks small enough to run 257 different images one by one; the others take batches of 33.
    different = 257 if (name, head) in (("eenet8", "pool"), ("eenet20", "pool")) else 33
    net = random_net(name, head, seed, CRITERIA[(index + seed) % len(CRITERIA)])
    x = images(different, (3, 16, 16), seed)
    spread_thresholds(net, x, share)
    alone = one_by_one(net, x)
    assert len(set(alone.exit_index.tolist())) == 3, "the thresholds should make every exit be taken"
    fast = eefast.accelerate(net, engine="compact")
    for n in (0, 1, 2, 3, 31, different):
        expected = eefast.ExitResult(*(part[:n] for part in alone))
        assert_same_answers(net(x[:n]), expected, net)
        assert_same_answers(fast(x[:n]), expected, net)


@pytest.fixture(scope="module")
def small():
    net = random_net("eenet20", "pool", 3)
    x = images(33, (3, 16, 16), 5)
    spread_thresholds(net, x, 0.4)
    return net, x


@pytest.fixture(scope="module")
def planned(small):
    """The small network in an engine, planned once for all examples."""
    return cache(lambda engine: eefast.accelerate(small[0], engine=engine))


@pytest.mark.parametrize("engine", ["reference", "compact", "resident"])
class TestEngines:
    @settings(max_examples=15, deadline=None)
    @given(data=st.data())
    def test_order_and_company_change_no_answer(self, small, planned, engine, data):
        net, x = small
        fast = planned(engine)
        rows = torch.tensor(data.draw(st.lists(st.integers(0, len(x) - 1), max_size=40)), dtype=torch.int64)
        whole = fast(x)
        wanted = eefast.ExitResult(*(part[rows] for part in whole))
        assert_same_answers(fast(x[rows]), wanted, net)
        cut = data.draw(st.integers(0, len(rows)))
        halves = fast(x[rows[:cut]]), fast(x[rows[cut:]])
        merged = eefast.ExitResult(*(torch.cat(parts) for parts in zip(*halves, strict=True)))
        assert_same_answers(merged, wanted, net)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("criterion", CRITERIA)
    @pytest.mark.sampled(12)
    def test_a_spoilt_image_survives_to_the_end_and_spoils_no_other(self, small, engine, criterion, value):
        net = small[0].with_criterion(criterion)
        x = small[1].clone()
        spread_thresholds(net, x, 0.4)
        clean = eefast.accelerate(net, engine=engine)(x)
        x[[0, 7, 32]] = value
        got = eefast.accelerate(net, engine=engine)(x)
        others = [i for i in range(33) if i not in (0, 7, 32)]
        assert_same_answers(
            eefast.ExitResult(*(p[others] for p in got)), eefast.ExitResult(*(p[others] for p in clean)), net
        )
        # Infinite inputs become NaN features at once, since a convolution subtracts infinities.
        assert got.logits[[0, 7, 32]].isnan().all()
        assert got.exit_index[[0, 7, 32]].tolist() == [net.num_exits] * 3
        assert got.cost[[0, 7, 32]].tolist() == [1.0] * 3

    @pytest.mark.parametrize("criterion", CRITERIA)
    @pytest.mark.sampled(6)
    def test_exactly_at_the_threshold_a_sample_goes_on(self, engine, criterion):
        net = random_net("eenet20", "pool", 8, criterion)
        # A head without weights is sure of the same thing for every image, in every engine to the last bit.
        for head in net.heads:
            for linear in (head.classifier, head.confidence):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        x = images(5, (3, 16, 16))
        with torch.no_grad():
            out = net.all_exits(x)[0]
        value = net.criterion.confidence(out.logits, out.confidence_logit)[0]
        towards = torch.tensor(-torch.inf if net.criterion.comparison == ">" else torch.inf)
        fast = eefast.accelerate(net, engine=engine)
        net.thresholds.fill_(float(value))
        assert fast(x).exit_index.tolist() == [2] * 5
        net.thresholds[1] = torch.nextafter(value, towards)
        if criterion != "entropy":  # log-softmax in C++ and PyTorch may differ in the last bit
            assert fast(x).exit_index.tolist() == [1] * 5
        net.thresholds[0] = towards
        assert fast(x).exit_index.tolist() == [0] * 5

    def test_no_sample_exits_and_every_sample_exits(self, small, engine):
        net, x = small
        kept = net.thresholds.clone()
        fast = eefast.accelerate(net, engine=engine)
        net.thresholds.fill_(1.0)
        assert fast(x).exit_index.tolist() == [2] * 33
        torch.testing.assert_close(fast(x).logits, net.plain()(x), rtol=1e-4, atol=1e-4)
        net.thresholds.fill_(0.0)
        assert fast(x).exit_index.tolist() == [0] * 33
        net.thresholds.copy_(kept)

    @pytest.mark.parametrize(
        ("spoil", "error", "message"),
        [
            (lambda x: x[0], ValueError, r"x has shape \(3, 16, 16\); expected \[N, 3, H, W\]; x\[None\] makes a b"),
            (lambda x: x[0, 0], ValueError, r"x has shape \(16, 16\); expected \[N, 3, H, W\]$"),
            (lambda x: x[:, :1], ValueError, r"x has shape \(33, 1, 16, 16\); expected \[N, 3, H, W\]"),
            (lambda x: x.double(), TypeError, r"x is torch.float64, the network torch.float32"),
            (lambda x: x.to("meta"), ValueError, "x is on meta, the network on cpu"),
            (lambda x: x.byte(), ValueError, "x is uint8, but this network has no normalization"),
            (lambda x: x.tolist(), TypeError, "x is a list; give a tensor"),
            (lambda x: x.long(), TypeError, "x is torch.int64; give normalised images as torch.float32$"),
            (lambda x: x > 0, TypeError, "x is torch.bool; give normalised images as torch.float32$"),
            (lambda x: x.cfloat(), TypeError, "x is torch.complex64; give normalised images as torch.float32$"),
        ],
    )
    @pytest.mark.sampled(10)
    def test_bad_images_are_refused_before_work_starts(self, small, engine, spoil, error, message):
        net, x = small
        with pytest.raises(error, match=message):
            eefast.accelerate(net, engine=engine)(spoil(x))

    def test_plain_heads_take_one_size_only(self, engine):
        net = random_net("eenet20", "plain", 0)
        with pytest.raises(ValueError, match=r"images of \(20, 16\); a network with plain heads takes \(16, 16\) only"):
            eefast.accelerate(net, engine=engine)(images(2, (3, 20, 16)))

    @pytest.mark.parametrize(
        "thresholds", [torch.tensor([0.5, torch.nan]), torch.tensor([0.5]), torch.tensor([0.5, 0.5]).double()]
    )
    def test_bad_thresholds_are_refused(self, small, engine, thresholds):
        net = small[0].with_criterion("learned")
        fast = eefast.accelerate(net, engine=engine)
        net.thresholds = thresholds
        count = rf"thresholds=.*, {thresholds.numel()} of {thresholds.dtype}, must be 2 float32 numbers"
        with pytest.raises(ValueError, match=count):
            fast(small[1])

    def test_uint8_images_are_normalised(self, engine):
        net = random_net("eenet20", "pool", 4, normalization=((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
        pixels = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        x = torch.stack(
            [(pixels[:, c] / 255 - m) / s for c, (m, s) in enumerate(zip(*net.normalization, strict=True))], dim=1
        )
        fast = eefast.accelerate(net, engine=engine)
        assert_same_answers(fast(pixels), one_by_one(net, x), net)


def test_training_mode_returns_all_exits(small):
    net, x = small
    net.train()
    with torch.no_grad():
        outs = net(x[:3])
    net.eval()
    assert [o.logits.shape for o in outs] == [(3, 10)] * 3
    for o in outs:
        torch.testing.assert_close(o.confidence, torch.sigmoid(o.confidence_logit), rtol=0, atol=0)


def test_heads_of_different_classes_are_refused():
    net = zoo.eenet("eenet20", 1)
    other = zoo.eenet("eenet20", 1, num_classes=7)
    with pytest.raises(ValueError, match=r"heads answer with \[10, 7\] classes"):
        eefast.EarlyExitNet(list(net.stages), [net.heads[0], other.heads[1]], input_shape=(3, 32, 32))
    with pytest.raises(ValueError, match="2 stages and 1 heads"):
        eefast.EarlyExitNet(list(net.stages), [net.heads[0]], input_shape=(3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_thresholds_and_costs_stay_float32(dtype):
    net = zoo.eenet("eenet20", 2, thresholds=(0.1, 1 / 3))
    exact = net.thresholds.clone(), net.cost.clone(), net.path_cost.clone()
    net.to(dtype)
    assert next(net.parameters()).dtype == dtype
    for now, before in zip((net.thresholds, net.cost, net.path_cost), exact, strict=True):
        assert now.dtype == torch.float32
        assert torch.equal(now, before)


def test_gradients_reach_every_parameter():
    net = zoo.eenet("eenet20", 2, head="conv1", input_shape=(1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outs = net.train()(images(4, (1, 8, 8)))
        sum(o.logits.square().sum() + o.confidence.sum() for o in outs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def normalised():
    return lived_in(zoo.eenet("eenet8", input_shape=(3, 8, 8), normalization=(MEAN, STD)), 4)


def pixels(n=6):
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def scaled(p):
    return (p / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_numbers_are_copied_to_the_device_once(normalised):
    """Copying them waits for all of a GPU's work."""
    with torch.inference_mode():
        first = normalised.prepare(pixels())
    with Operations() as found:
        assert torch.equal(normalised.prepare(pixels()), first)
    assert "div" in found.names
    assert "lift_fresh" not in found.names
    normalised.normalization = (STD, MEAN)
    assert not torch.equal(normalised.prepare(pixels()), first)
    again = pickle.loads(pickle.dumps(normalised))
    assert torch.equal(again.prepare(pixels()), normalised.prepare(pixels()))


@pytest.mark.gpu
def test_uint8_images_make_the_host_wait_for_nothing(normalised):
    net, x = normalised.cuda(), pixels().cuda()
    expected = net.prepare(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = net.prepare(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.bool])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("accelerated", [False, True])
def test_integer_pixels_must_be_uint8(normalised, dtype, autocast, accelerated):
    message = (
        rf"x is {dtype}; give pixels 0 … 255 as uint8, by x.to\(torch.uint8\) or normalised images as torch.float32"
    )
    module = eefast.accelerate(normalised) if accelerated else normalised
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(TypeError, match=message):
        module(pixels().to(dtype))


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("images_of", "told"),
    [
        (lambda p: p.float(), True),
        (lambda p: p / 255, True),
        (lambda p: p.float() - 128, True),
        (scaled, False),
        (lambda p: scaled(p) + 0.3, False),
        (lambda p: torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 2, False),
        (lambda p: torch.zeros(p.shape), False),
        (lambda p: torch.full(p.shape, torch.nan), False),
        (lambda p: torch.full(p.shape, torch.inf), False),
        (lambda p: p, False),
        (lambda p: p[:0].float(), False),
    ],
    ids=["0 … 255", "0 … 1", "-128 … 127", "right", "brighter", "noise", "zeros", "NaN", "inf", "uint8", "none"],
)
@pytest.mark.sampled(8)
def test_floats_on_another_scale_warn_once(normalised, caplog, images_of, told, accelerated):
    x = images_of(pixels())
    other = zoo.eenet("eenet8", input_shape=(3, 8, 8)).eval()
    other.load_state_dict(normalised.state_dict())
    expected = other(images_of(pixels())) if x.dtype != torch.uint8 else other(scaled(x))
    module = eefast.accelerate(normalised) if accelerated else normalised
    caplog.clear()
    for _ in range(5):
        got = module(x)
    assert_same_answers(
        eefast.ExitResult(*(p.nan_to_num() for p in got)), eefast.ExitResult(*(p.nan_to_num() for p in expected)), other
    )
    messages = [r.message for r in caplog.records if "give pixels 0 … 255 as uint8" in r.message]
    assert len(messages) == told
    other(pixels().float())  # without a normalization nothing is known of the scale
    assert len([r for r in caplog.records if "give pixels" in r.message]) == told


def test_only_the_first_images_are_looked_at(normalised, caplog):
    for _ in range(3):
        normalised(scaled(pixels()))
    normalised(pixels().float())
    assert not caplog.records


def test_a_normalization_to_pixels_takes_them(caplog):
    net = lived_in(zoo.eenet("eenet8", input_shape=(3, 8, 8), normalization=((0,) * 3, (1 / 255,) * 3)), 4)
    net(pixels().float())
    assert not caplog.records


class Failing(eefast.EarlyExitNet):
    @property
    def answer(self):
        return self.no_such_thing

    @property
    def fine(self):
        return self.num_exits


def test_an_attribute_error_in_a_property_is_seen(normalised, monkeypatch):
    net = Failing(list(normalised.stages), list(normalised.heads), input_shape=(3, 8, 8)).eval()
    fast = eefast.accelerate(net, engine="reference")
    for module in (net, fast):
        with pytest.raises(AttributeError, match="'Failing' object has no attribute 'no_such_thing'"):
            module.answer
        with pytest.raises(AttributeError, match="no attribute 'other'"):
            module.other
        assert module.fine == 2
        assert not hasattr(module, "other")

    def broken(*_):
        raise AttributeError("'Sequential' object has no attribute 'weight'")

    monkeypatch.setattr("eefast.api.build", broken)
    with torch.no_grad():
        next(net.parameters()).mul_(2)  # so that it is planned again
    for use in (fast.warmup, lambda: fast(images(1, (3, 8, 8))), lambda: eefast.accelerate(net)):
        with pytest.raises(AttributeError, match=r"^'Sequential' object has no attribute 'weight'$"):
            use()


@torch.no_grad()
def test_the_plain_network_ends_as_the_final_head():
    shape = (3, 8, 8)
    heads = [eefast.heads.ExitHead(kind, (4, 8, 8), 5, shape) for kind in ("pool", "bnpool")]
    net = lived_in(eefast.EarlyExitNet([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)], heads, input_shape=shape), 3)
    x = images(3, shape)
    assert torch.equal(net.plain()(x), net.all_exits(x)[-1].logits)
    assert not net.plain().training
    net.heads[1] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"the final head is a Linear, not an eefast\.heads\.ExitHead"):
        net.plain()


def test_limits_are_those_of_one_moment(normalised):
    net = normalised.with_criterion("learned", [0.25, 0.5])
    values, moment = net.limits()
    assert net.limits()[1] is moment, "an object that stays the same for as long as they do"
    net.thresholds[1] = 0.75
    assert values.tolist() == [0.25, 0.5]
    again, later = net.limits()
    assert again.tolist() == [0.25, 0.75]
    assert later is not moment


@torch.no_grad()
def test_first_exits_under_another_rule(normalised):
    x = images(7, (3, 8, 8))
    other = normalised.with_criterion("margin", [0.2, 0.1])
    got = normalised.first_exits(x, torch.tensor([0.2, 0.1]), other.criterion)
    assert_same_answers(got, other(x), other, 0.0)


def test_a_head_of_other_classes_is_named(normalised):
    net = normalised.with_criterion("learned", [2.0, 2.0])
    net.heads[1] = eefast.heads.ExitHead("pool", net.heads[1].feature_shape, 7, (3, 8, 8))
    message = "the head of exit 1 answers with 7 classes, the network was built for 10; .*with_criterion"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        net(images(2, (3, 8, 8)))


def test_images_of_another_size_are_noticed_once(caplog):
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 1)
    for side in (12, 14, 14, 15):
        net(images(2, (1, 12, side)))
    (record,) = caplog.records
    assert record.message.startswith("images of (12, 14), the network was made for (12, 12): it answers, but accuracy")
