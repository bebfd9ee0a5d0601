"""Backbones with exits attached: without early exits they answer bit for bit as before, and nothing is doubled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torchvision
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torchvision.models import vgg
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, ResNet

import eefast
from eefast.heads import ExitHead
from eefast.surgery.attachment import attach, new_parameters

SHAPE = (3, 64, 64)
SMALL = (3, 17, 15)


def small_convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(12, 16, 2), CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)], num_classes=7)


def small_vgg() -> nn.Module:
    """VGG-11 without the hundred million weights of its first two linears, which would take the time of all others."""
    with torch.device("meta"):
        net = vgg.VGG(nn.Identity())
    net.features = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
    net.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 7))
    return net


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


@torch.no_grad()
def assert_answers_of(net: eefast.EarlyExitNet, backbone: nn.Module, x: Tensor) -> None:
    """The final exit alone answers bit for bit as the backbone."""
    none_exits = net.with_criterion("max_probability", [float("inf")] * net.num_exits).eval()
    assert torch.equal(none_exits(x).logits, backbone.eval()(x))
    assert torch.equal(net.plain().eval()(x), backbone(x))


def test_the_final_exit_answers_as_the_backbone(case):
    backbone, net, ends_in_pooling = case
    assert_answers_of(net, backbone, images(3, SHAPE, 1))
    assert all(type(head) is ExitHead for head in net.heads)
    pixels = net.heads[-1].feature_shape[1:]
    assert (pixels != (1, 1)) == ends_in_pooling, "the final head pools what the backbone pooled"


@torch.no_grad()
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


class Custom(nn.Module):
    """A forward given by the test around a few layers; most tests change one thing about it."""

    def __init__(self, forward: Callable[..., Tensor] | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward or plain
        self.first, self.norm, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.second, self.third = nn.Conv2d(8, 8, 3, 2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plain(m: Custom, x: Tensor) -> Tensor:
    return m.fc(torch.flatten(m.pool(m.third(m.second(m.relu(m.norm(m.first(x)))))), 1))


def in_place(m: Custom, x: Tensor) -> Tensor:
    """Statements whose values are never read, and additions that other names of the same map see."""
    x = m.second(m.first(x))
    same = m.relu(x)
    x += m.third(x)
    m.relu(x)
    x = m.fc(m.pool(same).view(same.size(0), -1) * 2)
    return x


def checked(m: Custom, x: Tensor) -> Tensor:
    """What torch.fx cannot trace."""
    if x.shape[-1] < 4:
        raise ValueError("too small")
    return plain(m, x)


def residual(m: Custom, x: Tensor) -> Tensor:
    x = m.second(m.first(x))
    return m.fc(m.pool(x + m.third(x)).flatten(1))


def make(forward: Callable[..., Tensor] | None = None, **layers: nn.Module) -> Custom:
    return lived_in(Custom(forward, **layers), 5)


@pytest.mark.parametrize("forward", [plain, in_place, checked, residual])
@pytest.mark.parametrize("exits", [[], ["first"], ["first", "second"]])
def test_however_it_is_written(forward, exits):
    backbone = make(forward)
    net = attach(backbone, exits, input_shape=SMALL)
    x = images(33, SMALL)
    for n in (1, 3, 33):
        assert_answers_of(net, backbone, x[:n].clone())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_answers_of(other, backbone, x.clone())
        assert other.state_dict().keys() == net.state_dict().keys()


ENDS = {
    "fixed window": lambda m, x: m.fc(F.avg_pool2d(m.third(m.second(m.first(x))), (8, 7)).view(x.size(0), -1)),
    "batch size from its shape": lambda m, x: m.fc(m.pool(m.third(m.second(m.first(x)))).reshape(x.shape[0], 8)),
    "mean": lambda m, x: m.fc(m.third(m.second(m.first(x))).mean([-2, -1])),
    "one map, unpooled": lambda m, x: m.fc(m.third(m.second(m.first(x)))[:, :, 0, 0]),
    "maximum": lambda m, x: m.fc(F.adaptive_max_pool2d(m.third(m.second(m.first(x))), 1).flatten(1)),
    "activation after the mean": lambda m, x: m.fc(torch.tanh(m.pool(m.third(m.second(m.first(x))))).flatten(1)),
    "norm after the mean": lambda m, x: m.fc(m.extra(m.pool(m.third(m.second(m.first(x)))).flatten(1))),
    "two linears": lambda m, x: m.fc(m.relu(m.extra2(m.third(m.second(m.first(x))).view(-1, 8 * 56)))),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_end_is_kept(end):
    backbone = make(ENDS[end], extra=nn.BatchNorm1d(8, affine=False), extra2=nn.Linear(8 * 56, 8))
    net = attach(backbone, ["first"], input_shape=SMALL)
    x = images(33, SMALL)
    assert_answers_of(net, backbone, x)
    assert (net.heads[-1].feature_shape == (8, 8, 7)) == (end in ("batch size from its shape", "mean"))
    spread_thresholds(net, x, 0.4)
    assert_same_answers(eefast.accelerate(net, engine="compact")(x), one_by_one(net, x), net)


@pytest.mark.parametrize(
    ("backbone", "exits"),
    [
        (ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), ["layer1", "layer2"]),
        (
            ConvNeXt([CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 1)], num_classes=7),
            ["features.1.0", "features.2"],
        ),
        (make(checked), ["first", "second"]),
        (make(in_place), ["first", "second"]),
    ],
    ids=["resnet", "convnext", "chain", "in place"],
)
@pytest.mark.parametrize("head", ["pool", "bnpool", "conv1"])
def test_accelerated_it_answers_as_the_reference(backbone, exits, head):
    shape = (3, 33, 32)
    net = lived_in(attach(backbone, exits, head=head, input_shape=shape, criterion="entropy"), 7)
    x = images(33, shape)
    spread_thresholds(net, x, 0.4)
    expected = one_by_one(net, x)
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    fast = eefast.accelerate(net, engine="compact")
    for n in (0, 1, 3, 33):
        assert_same_answers(fast(x[:n]), eefast.ExitResult(*(part[:n] for part in expected)), net)


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


def dropping(m: Custom, x: Tensor) -> Tensor:
    x = F.dropout(m.first(x), 0.5, training=m.training)
    return m.fc(F.dropout(m.pool(m.second(x)).flatten(1), 0.5, m.training))


@pytest.mark.parametrize("copied", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("mode", [True, False])
def test_dropout_as_a_function_follows_the_mode_that_it_was_traced_in_and_the_other(copied, mode):
    backbone = make(dropping).train(mode)
    net = copied(attach(backbone, ["first"], input_shape=SMALL))
    x = torch.ones(3, *SMALL)
    assert_answers_of(net.eval(), backbone, x)
    assert (net.stages[1](net.stages[0](x)) != 0).all()
    net.train()
    features = net.stages[1](net.stages[0](x))
    assert not torch.equal(features, net.stages[1](net.stages[0](x))), "dropout inside of a stage"
    assert (net.heads[1].pool(features) == 0).any(), "dropout after the pooling"


def test_heads_get_their_gradients_where_the_next_stage_works_in_place():
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        backbone = make(relu=nn.ReLU(inplace=inplace))
        net = attach(backbone, ["norm"], head="conv1", input_shape=SMALL).train()
        sum(out.logits.square().sum() for out in net(images(3, SMALL))).backward()
        gradients.append([p.grad for _, p in net.named_parameters() if p.grad is not None])
        assert_answers_of(net, backbone, images(3, SMALL))
    assert len(gradients[0]) == len(list(net.parameters())) - 4, "all but the two confidence rows"
    assert all(map(torch.equal, *gradients))


def test_dtype_and_optional_arguments_of_the_backbone():
    class Optional(Custom):
        def forward(self, x: Tensor, mask: Tensor | None = None, features_only: bool = False) -> Tensor:
            x = self.first(x) if mask is None else self.first(x * mask)
            return x if features_only else self.fc(self.pool(self.third(x)).flatten(1))

    backbone = lived_in(Optional(), 1).bfloat16()
    net = attach(backbone, ["first"], input_shape=SMALL)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert_answers_of(net, backbone, images(3, SMALL).bfloat16())


@torch.no_grad()
def test_a_state_dict_goes_into_a_network_attached_alike():
    net = attach(make(), ["first"], head="bnpool", input_shape=SMALL)
    other = attach(Custom().eval(), ["first"], head="bnpool", input_shape=SMALL)
    other.load_state_dict(net.state_dict())
    x = images(3, SMALL)
    assert_same_answers(other(x), net(x), net, 0.0)


RESNET = ResNet(BasicBlock, [1, 2, 1, 1], num_classes=7)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ("layer1", r"exits='layer1' must be a list of names: exits=\['layer1'\]"),
        (["layer1", "layer2.3"], r"no module 'layer2.3'; take 'layer2.\d' or 'layer"),
        (["stem"], "no module 'stem'; take one of backbone.named_modules"),
        (["layer2", "layer1"], r"order in which they run; write exits=\['layer1', 'layer2'\]"),
        (["layer2.1", "layer2"], "'layer2.1' is at the same place as another exit"),
        (["layer1", "layer1"], "'layer1' is at the same place as another exit"),
        (
            ["layer2.0.conv1"],
            "after 'layer2.0.conv1' the backbone still needs what 'layer1' returned; take 'layer2.0'",
        ),
        (["layer2.0.downsample"], "after 'layer2.0.downsample' .* what 'layer2.0.bn2' returned; take 'layer2.0'"),
        (["layer1.0.relu"], "'layer1.0.relu' is called 2 times"),
        (["fc"], r"'fc' returns shape \[N, 7\], but an exit needs maps"),
        (["layer4"], "after what 'layer4' returned only the classifier has weights"),
        (["avgpool"], "after what 'avgpool' returned only the classifier has weights"),
    ],
)
def test_exits_that_do_not_fit(exits, message):
    with pytest.raises(ValueError, match=message):
        attach(RESNET, exits, input_shape=(3, 32, 32))


def softmax(m: Custom, x: Tensor) -> Tensor:
    return m.last(plain(m, x))


def unlike_in_training(m: Custom, x: Tensor) -> Tensor:
    return plain(m, x * 2 if m.training else x)


def neither_traced_nor_a_chain(m: Custom, x: Tensor) -> Tensor:
    return plain(m, x * 2 if x.mean() > 0 else x * 3)


def unlike_in_training_and_not_traced(m: Custom, x: Tensor) -> Tensor:
    return checked(m, x * 2 if m.training else x)


def unused(m: Custom, x: Tensor) -> Tensor:
    return m.fc(m.pool(m.first(x)).flatten(1))


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        (
            make(softmax, last=nn.Softmax(1)),
            {},
            r"logits come from 'last', Softmax\(dim=1\); they must be the output of",
        ),
        (make(lambda m, x: [plain(m, x)]), {}, r"returns a list; wrap it in a module that returns logits \[N, K\]"),
        (make(lambda m, x: m.first(x)), {}, r"returns shape \(2, 8, 15, 13\); wrap it"),
        (Custom(fc=nn.Linear(8, 5, bias=False)), {}, r"'fc' has no bias; give it one: backbone.fc.bias = nn.Parameter"),
        (
            make(),
            {"num_classes": 9},
            r"num_classes=9, but .* 5; first replace its last layer 'fc' by nn.Linear\(8, 9\)",
        ),
        (make(), {"input_shape": (17, 15)}, r"input_shape=\(17, 15\) must be \(C, H, W\)"),
        (make(), {"input_shape": (1, 17, 15)}, r"input_shape=\(1, 17, 15\): the backbone cannot take such images \("),
        (make(), {"head": "round"}, "head='round' is unknown"),
        (make(), {"criterion": "luck"}, "criterion='luck' is unknown"),
        (make(unused), {"exits": ["second"]}, "'second' is called 0 times"),
        (make(unlike_in_training), {}, "in training mode the backbone computes"),
        (make(unlike_in_training_and_not_traced), {}, "'first' receives something other than"),
        (
            make(neither_traced_nor_a_chain),
            {},
            "cannot be cut: torch.fx cannot trace it .*'first' receives something other than",
        ),
    ],
)
def test_backbones_and_arguments_that_do_not_fit(backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach(backbone, **{"exits": ["first"], "input_shape": SMALL, **arguments})


def test_maps_that_are_channels_last_are_refused_with_their_shape():
    swin = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [2, 2], num_classes=7)
    with pytest.raises(ValueError, match=r"'features.1' returns shape \[N, 8, 8, 16\], but"):
        attach(swin, ["features.1"], input_shape=(3, 32, 32))


def test_what_tracing_does_not_see_is_noticed():
    class Counting(Custom):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x * self.calls)

    backbone = lived_in(Counting(), 1).eval()
    with pytest.raises(ValueError, match=r"off the whole one's; it computes something that torch.fx does not see"):
        attach(backbone, ["first"], input_shape=SMALL)


def lazy(m: Custom) -> nn.Module:
    m.second = nn.LazyConv2d(8, 3)
    return m


def on_meta(m: Custom) -> nn.Module:
    m.second.to("meta")
    return m


def sparse(m: Custom) -> nn.Module:
    m.fc.weight = nn.Parameter(m.fc.weight.detach().to_sparse())
    return m


def complex_weights(m: Custom) -> nn.Module:
    m.first = nn.Conv2d(3, 8, 3, dtype=torch.complex64)
    return m


def fake(m: Custom) -> nn.Module:
    with FakeTensorMode():
        m.second = nn.Conv2d(8, 8, 3)
    return m


def subclassed(m: Custom) -> nn.Module:
    m.second.weight = nn.Parameter(TwoTensor(m.second.weight.detach(), m.second.weight.detach()))
    return m


def quantized_buffer(m: Custom) -> nn.Module:
    m.register_buffer("table", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    return m


def scripted_inside(m: Custom) -> nn.Module:
    m.second = torch.jit.script(m.second)
    return m


def accelerated(m: Custom) -> nn.Module:
    return eefast.accelerate(attach(m, ["first"], input_shape=SMALL))


def dynamically_quantized(m: Custom) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(m, {nn.Linear})


class DistributedDataParallel(nn.Module):
    """In place of PyTorch's, which needs other processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lazy, "backbone.second.weight has no shape yet; run the backbone on one image first"),
        (on_meta, r"backbone.second.weight is on the meta device, without values; give it some, by .to_empty"),
        (sparse, r"backbone.fc.weight has layout torch.sparse_coo; make it dense by .to_dense\(\)"),
        (complex_weights, "the backbone cannot take such images"),
        (fake, "backbone.second.weight is a FakeTensor; attach exits to the backbone with plain tensors first"),
        (subclassed, "backbone.second.weight is a TwoTensor; attach exits to the backbone with plain tensors first"),
        (quantized_buffer, "backbone.table is quantized; attach exits first, then quantize the result"),
        (dynamically_quantized, "backbone.fc is a quantized Linear; attach exits first"),
        (scripted_inside, "backbone.second is a ScriptModule, which cannot be cut; give the module that it was made"),
        (lambda m: torch.jit.trace(m, images(2, SMALL)), "the backbone is a ScriptModule, which cannot be cut"),
        (lambda m: attach(m, ["first"], input_shape=SMALL), r"has exits already \(EarlyExitNet\); give one without"),
        (accelerated, r"the backbone has exits already \(Accelerated\); give one without, such as net.plain\(\)"),
        (lambda m: nn.Sequential(attach(m, [], input_shape=SMALL)), "backbone.0 has exits already"),
        (DistributedDataParallel, "the backbone is a DistributedDataParallel; attach exits to its module first"),
        (lambda m: m.forward, "backbone is a method; give an nn.Module that maps images to logits"),
    ],
)
def test_what_is_no_plain_module_of_plain_tensors_is_refused_before_any_work(change, message):
    backbone = change(make())
    if isinstance(backbone, nn.Module):
        backbone.register_forward_pre_hook(lambda *_: pytest.fail("it ran")) if change is lazy else None
    with pytest.raises(ValueError, match=message):
        attach(backbone, ["first"], input_shape=SMALL)


@pytest.mark.parametrize("change", [fake, lazy])
def test_a_network_of_odd_tensors_is_refused_as_well(change):
    stage = change(make()).second
    with pytest.raises(ValueError, match=r"a parameter is a FakeTensor; build the|has no shape yet"):
        eefast.EarlyExitNet([stage], [ExitHead("pool", (8, 6, 6), 5, SMALL)], input_shape=(8, 9, 9))


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
