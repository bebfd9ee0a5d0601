"""Backbones with exits attached: without early exits they answer bit for bit as before, and nothing is doubled."""

from __future__ import annotations

import pytest
import torch
import torchvision
from custom_backbones import SMALL, Custom, assert_answers_of, checked, in_place, make, residual
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import Tensor, nn
from torchvision.models import vgg
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import eefast
from eefast.heads import ExitHead
from eefast.surgery.attachment import attach, new_parameters

SHAPE = (3, 64, 64)


def small_convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(12, 16, 2), CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)], num_classes=7)


def small_vgg() -> nn.Module:
    """VGG-11 without the hundred million weights of its first two linears, which would take the time of all others."""
    with torch.device("meta"):
        net = vgg.VGG(nn.Identity())
    net.features = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
    net.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 7))
    return net


def small_vit() -> nn.Module:
    return VisionTransformer(64, 16, 3, 2, 24, 48, num_classes=7)


def small_swin() -> nn.Module:
    return SwinTransformer([4, 4], 12, [2, 2, 2], [2, 2, 4], [4, 4], num_classes=7)


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    small = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, **small)


def timm_swin() -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    small = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (2, 2, 2), "num_heads": (2, 2, 4)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, **small)


# Backbone, exits, and whether it ends in average pooling and one linear, which is then the final head's.
BACKBONES = (
    ("resnet18", ["layer1", "layer2.1"], True),
    ("resnet50", ["layer1.1"], True),
    ("regnet_y_400mf", ["trunk_output.block1", "trunk_output.block3.block3-1"], True),
    ("efficientnet_b0", ["features.2", "features.4.1"], True),
    ("densenet121", ["features.denseblock1", "features.transition2"], True),
    ("mobilenet_v3_small", ["features.3", "features.8"], False),
    (small_convnext, ["features.1", "features.3"], False),
    (small_vgg, ["features.3", "features.13", "features.14"], False),
    ("timm resnet18d", ["layer1", "layer2.1"], True),
    ("timm mobilenetv3_small_050", ["blocks.1", "blocks.3.1"], False),
    ("timm convnext_atto", ["stages.0", "stages.1.blocks.0"], False),
    ("timm efficientnet_lite0", ["blocks.1", "blocks.3.2"], True),
    (small_vit, ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"], False),
    (small_swin, ["features.1", "features.3"], True),
    (timm_vit, ["blocks.0", "blocks.1"], False),
    pytest.param((timm_swin, ["layers.0", "layers.1"], False), marks=pytest.mark.slow),
)


@pytest.fixture(scope="module", params=BACKBONES, ids=lambda case: str(getattr(case[0], "__name__", case[0])))
def case(request):
    name, exits, ends_in_pooling = request.param
    if callable(name):
        backbone = name()
    elif name.startswith("timm "):
        timm = pytest.importorskip("timm", reason="timm is not installed")
        backbone = timm.create_model(name[5:], num_classes=7, drop_rate=0.2)
    else:
        backbone = torchvision.models.get_model(name, weights=None, num_classes=7)
    lived_in(backbone, 3)
    return backbone, attach(backbone, exits, input_shape=SHAPE), ends_in_pooling


@pytest.mark.sampled(6)
def test_the_final_exit_answers_as_the_backbone(case):
    backbone, net, ends_in_pooling = case
    assert_answers_of(net, backbone, images(3, SHAPE, 1))
    assert all(type(head) is ExitHead for head in net.heads)
    pixels = net.heads[-1].feature_shape[1:]
    assert (pixels != (1, 1)) == ends_in_pooling, "the final head pools what the backbone pooled"


@torch.no_grad()
@pytest.mark.sampled(7)
def test_every_exit_is_taken(case):
    _, net, _ = case
    x = images(5, SHAPE, 2)
    for i in range(net.num_exits):
        net.thresholds.fill_(float("inf"))
        net.thresholds[i] = -1.0
        assert net(x).exit_index.tolist() == [i] * 5
    assert net.cost.diff().min() > 0
    assert net.cost[-1] == 1


@torch.no_grad()
def test_in_training_mode_all_exits_answer(case):
    _, net, _ = case
    x = images(3, SHAPE, 3)
    net.train()
    outputs = net(x)
    again = net(x)
    net.eval()
    assert [out.logits.shape for out in outputs] == [(3, 7)] * (net.num_exits + 1)
    # Only what draws random numbers answers twice differently: dropout and its kin.
    assert torch.equal(outputs[0].logits, again[0].logits) or any(map(_is_random, net.stages[0].modules()))


def _is_random(module: nn.Module) -> bool:
    return "Drop" in type(module).__name__ or "Stochastic" in type(module).__name__


def test_nothing_is_doubled_and_nothing_lost(case):
    backbone, net, _ = case
    old = {id(p) for p in backbone.parameters()}
    new = {id(p) for _, p in new_parameters(net)}
    assert {id(p) for p in net.parameters()} == old | new
    assert not old & new
    assert len(net.state_dict().keys()) == len(
        [*backbone.state_dict(), *new_parameters(net), *net.heads[:-1].buffers(), "thresholds"]
    )
    names = {name for name, _ in new_parameters(net)}
    assert {f"heads.{net.num_exits}.confidence.weight", "heads.0.classifier.weight"} < names
    assert f"heads.{net.num_exits}.classifier.weight" not in names


ACCELERATED = {
    "resnet": (ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), ["layer1", "layer2"]),
    "convnext": (
        ConvNeXt([CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 1)], num_classes=7),
        ["features.1.0", "features.2"],
    ),
    "chain": (make(checked), ["first", "second"]),
    "in place": (make(in_place), ["first", "second"]),
}
TRANSFORMERS = {
    "vit": (small_vit(), ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]),
    "swin": (small_swin(), ["features.1", "features.3"]),
}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        pytest.param(name, head, marks=[pytest.mark.slow] * (head != "pool" and name not in ("chain", "in place")))
        for name in ACCELERATED
        for head in ("pool", "bnpool", "conv1")
    ],
)
def test_accelerated_it_answers_as_the_reference(name, head):
    (backbone, exits), shape = ACCELERATED[name], (3, 33, 32)
    net = lived_in(attach(backbone, exits, head=head, input_shape=shape, criterion="entropy"), 7)
    x = images(33, shape)
    spread_thresholds(net, x, 0.4)
    expected = one_by_one(net, x)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    fast = eefast.accelerate(net, engine="compact")
    for n in (0, 1, 3, 33):
        assert_same_answers(fast(x[:n]), eefast.ExitResult(*(part[:n] for part in expected)), net)


@pytest.mark.parametrize(
    ("name", "head"),
    [("vit", "token"), ("swin", "pool"), pytest.param("vit", "bnpool", marks=pytest.mark.slow)],
)
def test_accelerated_transformers_answer_as_the_reference(name, head):
    backbone, exits = TRANSFORMERS[name]
    net = lived_in(attach(backbone, exits, head=head, input_shape=SHAPE, criterion="entropy"), 7)
    x = images(33, SHAPE)
    spread_thresholds(net, x, 0.4)
    expected = one_by_one(net, x)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    fast = eefast.accelerate(net, engine="compact", stages="pytorch")
    for n in (0, 1, 33):
        assert_same_answers(fast(x[:n]), eefast.ExitResult(*(part[:n] for part in expected)), net)


@torch.no_grad()
def test_heads_read_the_mean_of_the_tokens_or_the_first():
    """After the blocks that torch's hooks see."""
    backbone, exits = TRANSFORMERS["vit"]
    seen = []
    hook = backbone.get_submodule(exits[1]).register_forward_hook(lambda module, given, out: seen.append(out))
    x = images(3, SHAPE)
    backbone.eval()(x)
    hook.remove()
    for head, read in (("pool", lambda tokens: tokens.mean(1)), ("token", lambda tokens: tokens[:, 0])):
        net = attach(backbone, exits, head=["pool", head], input_shape=SHAPE).eval()
        logits = net(x, thresholds=[2.0, -1.0]).logits
        torch.testing.assert_close(logits, net.heads[1].classifier(read(seen[0])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("vit", "conv1", r"head='conv1' reads maps, but 'encoder.layers.encoder_layer_0' returns tokens; choose one"),
        ("swin", "token", r"head='token' reads tokens, but here the map is \(16, 16\); choose head='pool'"),
    ],
)
def test_heads_that_do_not_fit_are_refused(name, head, message):
    with pytest.raises(ValueError, match=message):
        attach(*TRANSFORMERS[name], head=head, input_shape=SHAPE)


@torch.no_grad()
def test_backbone_and_network_are_trained_together():
    backbone = make()
    net = attach(backbone, ["second"], input_shape=SMALL)
    x = images(3, SMALL)
    before = net.plain()(x)
    for weight in (backbone.first.weight, backbone.fc.weight):
        weight.mul_(1.5)
        after = net.plain()(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, backbone(x))
        before = after


def test_the_backbone_stays_as_it_is():
    backbone = make().train()
    backbone.norm.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    flags = [m.training for m in backbone.modules()]
    net = attach(backbone, ["first"], input_shape=SMALL)
    assert [m.training for m in backbone.modules()] == flags
    assert not any(m._forward_hooks for m in backbone.modules())
    assert before.keys() == backbone.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert net.training
    assert not attach(backbone.eval(), ["first"], input_shape=SMALL).training
    assert not any(m.training for m in attach(backbone, ["first"], input_shape=SMALL).modules())


@torch.no_grad()
def test_a_state_dict_goes_into_a_network_attached_alike():
    net = attach(make(), ["first"], head="bnpool", input_shape=SMALL)
    other = attach(Custom().eval(), ["first"], head="bnpool", input_shape=SMALL)
    other.load_state_dict(net.state_dict())
    x = images(3, SMALL)
    assert_same_answers(other(x), net(x), net, 0.0)


@torch.no_grad()
def test_data_parallel_backbones_and_second_names_are_cut():
    backbone = make(residual)
    x = images(3, SMALL)
    net = attach(nn.DataParallel(backbone), ["module.first"], input_shape=SMALL)
    assert torch.equal(net.plain()(x), backbone(x))
    backbone.layers = nn.ModuleList([backbone.first, backbone.second])
    net = attach(backbone, ["layers.0", "layers.1"], input_shape=SMALL)
    assert net.num_exits == 2
    assert torch.equal(net.plain()(x), backbone(x))
    with pytest.raises(ValueError, match=r"no module 'first.0'; take 'module\.first\.0'"):
        attach(nn.DataParallel(make(residual, first=nn.Sequential(nn.Conv2d(3, 8, 3)))), ["first.0"], input_shape=SMALL)


@torch.no_grad()
def test_parts_of_other_dtypes_stay_what_they_are():
    class Mixed(Custom):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(self.third(self.second(self.first(x).bfloat16()))).flatten(1).double())

    backbone = lived_in(Mixed(), 1)
    backbone.second.bfloat16(), backbone.third.bfloat16(), backbone.fc.double()
    net = attach(backbone, ["second"], input_shape=SMALL)
    assert [m.weight.dtype for m in (backbone.first, backbone.second, backbone.fc)] == [
        torch.float32, torch.bfloat16, torch.float64,
    ]  # fmt: skip
    assert net.heads[0].classifier.weight.dtype == torch.bfloat16
    assert len(net(images(3, SMALL)).logits) == 3


@torch.no_grad()
def test_what_the_caller_has_set_does_not_reach_the_network():
    backbone = make()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            net = attach(backbone, ["first"], input_shape=SMALL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(t.device.type, t.dtype) for t in [*net.parameters(), net.cost, net.thresholds]} == {("cpu", torch.float32)}
    assert_answers_of(net, backbone, images(3, SMALL))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"head": "round"}, "head='round' is unknown"), ({"criterion": "luck"}, "criterion='luck' is unknown")],
)
def test_unknown_heads_and_criteria_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        attach(make(), ["first"], input_shape=SMALL, **arguments)


class Table(nn.Module):
    converts: bool

    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.float() if self.converts else x + 0


@pytest.mark.parametrize("converts", [True, False])
def test_a_first_parameter_of_integers_is_refused(converts):
    table = Table()
    table.converts = converts
    backbone = make(first=nn.Sequential(table, nn.Conv2d(3, 8, 3)))
    with pytest.raises(ValueError, match=r"stages\.0\.first\.0\.numbers is torch\.int64; .* so make it a float"):
        attach(backbone, ["first"], input_shape=SMALL)


class _Frozen(nn.Module):
    """A layer that was frozen by inference mode, as some users write it."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*channels, 3, padding=1)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("layer", [_Frozen, lambda *channels: nn.Conv2d(*channels, 3, padding=1)])
def test_every_gradient_mode_around_and_inside_of_the_backbone(context, layer):
    x = images(5, (3, 16, 12))
    with context():
        parts = layer(3, 4), layer(4, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7)
        backbone = nn.Sequential(*parts).eval()
        net = attach(backbone, ["0"], input_shape=(3, 16, 12))
        spread_thresholds(net, x, 0.4)
        fast = eefast.accelerate(net, engine="compact")
    for run_in in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with run_in():
            assert_same_answers(fast(x), one_by_one(net, x), net)
    with torch.no_grad():
        assert_same_answers(net(x), one_by_one(net, x), net)


class Residual(nn.Module):
    """A network on rows [N, C, L], as those of torchvision are on images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(6, 16, 7, 2, 3), nn.BatchNorm1d(16)
        self.maxpool = nn.MaxPool1d(3, 2, 1)
        self.layer1 = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv1d(16, 32, 3, 2, 1), nn.BatchNorm1d(32), nn.ReLU())
        self.avgpool, self.fc = nn.AdaptiveAvgPool1d(1), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = x + self.layer1(x)
        return self.fc(torch.flatten(self.avgpool(self.layer2(x)), 1))


def plain_rows() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(6, 16, 5, padding=2), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "exits"), [(Residual, ["maxpool"]), (plain_rows, ["1", "2"])], ids=["residual", "sequential"]
)
def test_backbones_on_rows(backbone, exits) -> None:
    torch.manual_seed(0)
    made = backbone().eval()
    net = eefast.attach(made, exits, head="conv1", input_shape=(6, 77))
    assert [len(cost.feature_shape) for cost in net.stage_costs] == [2] * (len(exits) + 1)
    net.thresholds.fill_(2)
    for length in (77, 40):
        x = torch.randn(5, 6, length)
        assert torch.allclose(net(x).logits, made(x), atol=1e-6)
    # Each exit answers what is left to it: noise in front of a linear is enough to split five rows.
    net.thresholds.fill_(0.5)
    result = net(x)
    for engine in ("compact", "auto"):
        fast = eefast.accelerate(net, engine=engine)(x)
        assert torch.equal(fast.exit_index, result.exit_index)
        assert torch.allclose(fast.logits, result.logits, atol=1e-5)


def test_an_exit_after_something_that_is_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'6' returns shape \[N, 24\], but an exit needs maps \[N, C, L\]"):
        eefast.attach(plain_rows().eval(), ["6"], input_shape=(6, 77))
    with pytest.raises(ValueError, match=r"input_shape=\(6,\) must be \(C, H, W\) or, of rows, \(C, L\)"):
        eefast.attach(plain_rows().eval(), ["1"], input_shape=(6,))
