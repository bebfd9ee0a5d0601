"""Trials of a cut backbone, and what they promise: the whole backbone's answers at all image and batch sizes."""

import copy
from contextlib import nullcontext, suppress

import pytest
import torch
import torchvision
from custom_backbones import SMALL, Custom
from networks import images, lived_in
from torch import Tensor, nn
from torch.nn import functional as F

import eefast
from eefast.surgery.attachment import attach
from eefast.surgery.trial import averages, check_answers

SHAPE = (3, 32, 32)
SIZES = ((32, 32), (44, 36), (33, 65), (24, 17))
BATCHES = (1, 2, 5)


class Net(nn.Module):
    """first → second (half the size) → third (a quarter) → 8 features → 5 logits, by a function of the test's."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool, self.window, self.fc = nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(8), nn.Linear(8, 5)
        self.position = nn.Parameter(torch.linspace(-1, 1, 8 * 32 * 32).view(1, 8, 32, 32))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.run(self, x)

    def body(self, x):
        return self.third(self.second(self.first(x)))


def squeezed(m, x):
    return m.fc(m.pool(m.body(x)).squeeze())


def squeezed_twice(m, x):
    return m.fc(m.pool(m.body(x)).squeeze(-1).squeeze(-1))


def height_as_window(m, x):
    x = m.body(x)
    return m.fc(F.avg_pool2d(x, x.shape[2]).flatten(1)[:, :8])


def whole_map_as_window(m, x):
    x = m.body(x)
    return m.fc(F.avg_pool2d(x, x.shape[2:]).flatten(1))


def fixed_window(m, x):
    return m.fc(F.avg_pool2d(m.body(x), 8).flatten(1)[:, :8])


def fixed_window_as_module(m, x):
    return m.fc(m.window(m.body(x)).mean((2, 3)))


def window_of_a_size(m, x):
    x = m.body(x)
    return m.fc(F.avg_pool2d(x, 8, ceil_mode=True)[:, :, 0, 0])


def cropped(m, x):
    return m.fc(m.body(x)[:, :, :8, :8].mean((2, 3)))


def interpolated(m, x):
    return m.fc(F.interpolate(m.body(x), (8, 8)).mean((2, 3)))


def maximum_and_mean(m, x):
    x = m.body(x)
    return m.fc(x.mean((2, 3)) + x.amax((2, 3)) * 0.1)


def sum_over_a_fixed_size(m, x):
    return m.fc(m.body(x).sum((2, 3)) / 64)


def sum_over_its_size(m, x):
    x = m.body(x)
    return m.fc(x.sum((2, 3)) / (x.shape[2] * x.shape[3]))


def positions(m, x):
    x = m.first(x)
    height, width = x.shape[-2:]
    x = x + F.interpolate(m.position, size=(height, width), mode="bilinear")
    return m.fc(m.third(m.second(x)).mean((2, 3)))


def positions_of_one_size(m, x):
    return m.fc(m.third(m.second(m.first(x) + m.position)).mean((2, 3)))


def ramp(m, x):
    x = m.first(x)
    x = x * torch.arange(x.shape[-1], device=x.device) / x.shape[-1]
    return m.fc(m.third(m.second(x)).mean((2, 3)))


def masked(m, x):
    x = m.first(x)
    mask = torch.ones_like(x[:, :1]).tril()
    return m.fc(m.third(m.second(x * mask)).mean((2, 3)))


def size_by_batch(m, x):
    """The height of a map is 2 where there are two images."""
    x = m.body(x)
    y = F.adaptive_avg_pool2d(x, (2, 3))
    height, n = y.shape[2:][0], y.shape[0]
    return m.fc(y.reshape(n, 8, height * 3).mean(2) * height)


def reshaped(m, x):
    x = m.body(x)
    n, c, h, w = x.shape
    return m.fc(x.view(n, c, h * w).mean(-1))


def padded(m, x):
    x = m.first(x)
    x = F.pad(x, (0, x.shape[3] % 7, 0, x.shape[2] % 5))
    return m.fc(m.third(m.second(x)).mean((2, 3)))


def not_traced(m, x):
    if x.shape[-1] < 4:
        raise ValueError("too small")
    return m.fc(torch.flatten(m.pool(m.body(x)), 1))


TAKEN = [
    squeezed, squeezed_twice, height_as_window, whole_map_as_window, fixed_window, fixed_window_as_module,
    window_of_a_size, cropped, interpolated, maximum_and_mean, sum_over_a_fixed_size, sum_over_its_size, positions,
    positions_of_one_size, ramp, masked, size_by_batch, reshaped, padded, not_traced,
]  # fmt: skip
AVERAGES = {
    squeezed_twice, cropped, interpolated, whole_map_as_window, sum_over_its_size, positions, positions_of_one_size,
    ramp, masked, reshaped, padded, not_traced,
}  # fmt: skip


def check(backbone, net, size, n, engines):
    """Every engine answers as the whole backbone, or takes no such images, as the backbone does."""
    x = images(n, (3, *size), n)
    with torch.no_grad():
        try:
            expected = backbone(x).reshape(n, -1)
        except RuntimeError:
            expected = None
    for engine, fast in engines.items():
        if expected is None:
            with pytest.raises(RuntimeError):
                fast(x)
            continue
        got = fast(x).logits
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            got, expected, rtol=0, atol=1e-4 * max(scale, 1), msg=lambda m, e=engine: f"{e}: {m}"
        )


def engines_of(net, names=("reference", "compact", "resident", "auto")):
    net = net.with_criterion("max_probability", [2.0] * net.num_exits).eval()  # every image goes to the end
    found = {"net": net}
    for engine in names:
        with suppress(ValueError) if engine == "resident" else nullcontext():
            found[engine] = eefast.accelerate(net, engine=engine)
    return found


@pytest.mark.parametrize("run", TAKEN)
@pytest.mark.sampled(8)
def test_small_backbones(run):
    backbone = lived_in(Net(run), 3)
    net = attach(backbone, ["first", "second"][: 1 if run is positions_of_one_size else 2], input_shape=SHAPE)
    measured = {squeezed, fixed_window, whole_map_as_window, ramp}
    engines = engines_of(net, ["reference", "compact", "resident", *["auto"] * (run in measured)])
    assert (net.heads[-1].feature_shape[1:] != (1, 1)) == (run in AVERAGES)
    for size in SIZES:
        for n in BATCHES:
            check(backbone, net, size, n, engines)


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("resnet18", ["layer1", "layer3"]),
        ("mobilenet_v2", ["features.3"]),
        ("squeezenet", []),
        ("googlenet", ["maxpool2"]),
        ("shufflenet_v2_x0_5", ["stage2"]),
        ("densenet", ["features.transition1"]),
    ],
)
@pytest.mark.sampled(3)
def test_backbones_of_torchvision(name, exits):
    models = torchvision.models
    if name == "densenet":
        backbone = models.DenseNet(8, (2, 2), 8, num_classes=5)
    elif name == "googlenet":
        backbone = models.googlenet(weights=None, num_classes=5, aux_logits=False, init_weights=False)
    elif name == "squeezenet":
        backbone = models.squeezenet1_1(num_classes=8)
        backbone.classifier = nn.Sequential(backbone.classifier, nn.AvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        exits = ["features.3"]
    else:
        backbone = models.get_model(name, weights=None, num_classes=5)
    backbone = lived_in(backbone, 5)
    net = attach(backbone, exits, input_shape=(3, 64, 64))
    engines = engines_of(net, ["compact"])
    for size, n in (((64, 64), 5), ((96, 64), 1), ((71, 83), 2)):
        check(backbone, net, size, n, engines)


def branch_on_size(m, x):
    if x.shape[-1] > 40:
        return m.fc(m.pool(m.third(m.second(m.first(m.window(x))))).flatten(1))
    return m.fc(torch.flatten(m.pool(m.body(x)), 1))


def value_of_a_buffer(m, x):
    return m.fc(m.body(x).mean((2, 3)) * m.first[1].running_var[0].item())


def value_of_a_weight(m, x):
    return m.fc(m.body(x).mean((2, 3)) * m.scale.item())


def made_of_a_weight(m, x):
    weight = m.first[0].weight / m.first[0].weight.norm()
    x = F.conv2d(x, weight, padding=1)
    return m.fc(m.third(m.second(m.first[2](m.first[1](x)))).mean((2, 3)))


def rows_for_every_quarter(m, x):
    x = F.adaptive_avg_pool2d(m.body(x), 2)
    return m.fc(x.permute(0, 2, 3, 1).reshape(-1, 8))


def two_images_only(m, x):
    return m.fc(m.pool(m.body(x)).view(2, 8))


@pytest.mark.parametrize(
    ("run", "exits", "message"),
    [
        (branch_on_size, ["first"], r"the cut backbone .*to images of \(49, 42\).*; build|.*torch.fx does not see"),
        (
            value_of_a_buffer,
            ["first"],
            "with other weights the cut backbone's logits are .* off the whole one's; it comp",
        ),
        (rows_for_every_quarter, ["first"], "the backbone returns 8 rows for 2 images"),
        (two_images_only, ["first"], "the backbone takes a batch of 2 images, but not of 1"),
    ],
)
def test_what_would_be_right_for_the_trial_only_is_refused(run, exits, message):
    backbone = lived_in(Net(run), 3)
    with pytest.raises(ValueError, match=message):
        attach(backbone, exits, input_shape=SHAPE)


@pytest.mark.parametrize("run", [value_of_a_weight, made_of_a_weight])
@torch.no_grad()
def test_what_is_computed_from_weights_follows_them(run):
    backbone = lived_in(Net(run), 3)
    net = attach(backbone, ["second"], input_shape=SHAPE)
    x = images(2, SHAPE)
    for _ in range(2):
        assert torch.equal(net.plain()(x), backbone(x))
        backbone.scale.mul_(1.5)
        backbone.first[0].weight[0].mul_(1.5)


def constants(m, x):
    x = m.first(x) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]).view(1, 8, 1, 1)
    return m.fc(m.third(m.second(x)).mean((2, 3)))


def test_constants_of_the_forward_are_not_put_into_the_backbone():
    backbone = lived_in(Net(constants), 3)
    before = set(vars(backbone)), set(dict(backbone.named_buffers()))
    net = attach(backbone, ["first"], input_shape=SHAPE)
    assert (set(vars(backbone)), set(dict(backbone.named_buffers()))) == before
    check(backbone, net, (40, 36), 2, engines_of(net))


def test_what_tracing_does_not_see_is_noticed():
    class Counting(Custom):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x * self.calls)

    backbone = lived_in(Counting(), 1).eval()
    with pytest.raises(ValueError, match=r"off the whole one's; it computes something that torch.fx does not see"):
        attach(backbone, ["first"], input_shape=SMALL)


class Pool(nn.Module):
    """A function as a module."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


POOLS = {
    "module": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), True),
    "mean": (Pool(lambda x: x.mean((2, 3))), True),
    "window of its size": (Pool(lambda x: F.avg_pool2d(x, x.shape[2:]).flatten(1)), True),
    "window of one size": (Pool(lambda x: F.avg_pool2d(x, (5, 4)).flatten(1)), False),
    "squeezed": (Pool(lambda x: x.mean((2, 3), keepdim=True).squeeze()), False),
    "up to 40 pixels": (Pool(lambda x: x[:, :, :40].mean((2, 3))), False),
    "maximum": (Pool(lambda x: x.amax((2, 3))), False),
    "sum": (Pool(lambda x: x.sum((2, 3)) / 20), False),
    "activation after it": (Pool(lambda x: torch.tanh(x.mean((2, 3)))), False),
    "square maps": (Pool(lambda x: x.mean((2, 3)) * x.shape[2] / x.shape[3] * 4 / 5), False),
    "one row": (Pool(lambda x: x.mean((2, 3))[:1]), False),
    "four dimensions": (nn.AdaptiveAvgPool2d(1), False),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("pool", POOLS)
def test_what_averages_at_every_size(pool, device):
    module, expected = POOLS[pool]
    assert averages(module, torch.zeros(2, 8, 5, 4, device=device)) is expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole, x: whole(x), None),
        (lambda whole, x: whole(x)[0], r"for images of \(6, 6\) the cut backbone's logits are of shape \(5,\), unlike"),
        (lambda whole, x: whole(x) + (x.shape[3] == 7), r"for images of \(4, 7\) the cut backbone's logits are 1 off"),
        (lambda whole, x: whole(x) * torch.nan, r"for images of \(6, 6\) the cut .* nan off"),
        (lambda whole, x: whole(x) * 1.001, None),
        (lambda whole, x: whole(x) * 1.1, r"for images of \(6, 6\) the cut .* off the whole one's; it computes"),
        (
            lambda whole, x: whole(x[:, :, :6, :6].view(-1, 3, 6, 6)),
            r"for images of \(4, 7\) .*and the whole one does not",
        ),
    ],
    ids=["same", "one row", "a size", "NaN", "rounding", "other", "fails"],
)
def test_answers_of_the_cut_backbone_are_compared(change, message):
    whole = lived_in(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)), 1)
    batches = [images(2, (3, 6, 6), 1), images(1, (3, 4, 7), 2)]
    with torch.no_grad():
        answers = [(x, whole(x)) for x in batches]
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            check_answers(Pool(lambda x: change(whole, x)), whole, answers)


@torch.no_grad()
def test_what_does_not_follow_the_weights_is_noticed():
    whole = lived_in(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)), 1)
    kept = copy.deepcopy(whole)
    x = images(2, (3, 6, 6), 1)
    with pytest.raises(ValueError, match=r"with other weights the cut backbone's logits are .* off the whole one's"):
        check_answers(kept, whole, [(x, whole(x))])


@torch.no_grad()
def test_what_is_nan_in_both_is_the_same():
    whole = lived_in(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)), 1)
    whole[2].bias[1] = torch.nan
    x = images(2, (3, 6, 6), 1)
    check_answers(Pool(whole), whole, [(x, whole(x))])
