"""`eefast.quantize`: networks stay near the float ones and behave like any other; bad input is refused."""

import copy
import logging
import pickle
from collections import Counter

import pytest
import torch
from networks import Stage, images, lived_in
from torch import nn
from torch.nn import functional as F

import eefast
from eefast.heads import HEADS, ExitHead
from eefast.qdq import QdqStage
from eefast.quantization.winograd_choice import logit_error
from eefast.quantized import QuantizedConvolution, QuantizedStage
from eefast.thresholds.outputs import collect, outcome

SHAPE = (3, 13, 7)
NORMALIZATION = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def eenet(head="pool", name="eenet20", seed=0, **more):
    return lived_in(eefast.zoo.eenet(name, 2, (1, 2), head, 4, SHAPE, **more), seed)


@torch.no_grad()
def logits(net, x):
    return torch.stack([out.logits for out in net.all_exits(net.prepare(x))])


def winograd_steps(net):
    return Counter(step.winograd for step in net.modules() if isinstance(step, QuantizedConvolution))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("winograd", [0, 1, 2])
@pytest.mark.sampled(6)
def test_logits_stay_near_those_of_the_float_network(head, winograd):
    net = eenet(head)
    x = images(64, SHAPE)
    quantized = eefast.quantize(net, x[:32], winograd=winograd)
    assert winograd_steps(quantized).keys() == {0, winograd}
    assert logit_error(logits(quantized, x[32:]), logits(net, x[32:])) < (0.06, 0.1, 0.2)[winograd]
    assert [h.kind for h in quantized.heads] == [h.kind for h in net.heads] == [head, head, "pool"]


def test_true_and_false_are_f_2_3_and_direct():
    net, x = eenet(), images(16, SHAPE)
    for flag in (False, True):
        ours, theirs = (eefast.quantize(net, x, winograd=w) for w in (flag, int(flag)))
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def preactivated():
    """Maps that may be negative: a residual stream that is normalised before each convolution, a pooled projection."""
    torch.manual_seed(0)

    def block(m, x):
        return x + m.b(F.relu(m.n(m.a(F.relu(m.m(x))))))

    def made(c):
        norms = {name: nn.BatchNorm2d(c) for name in "mn"}
        return Stage(block, a=nn.Conv2d(c, c, 3, padding=1), b=nn.Conv2d(c, c, 3, padding=1, bias=False), **norms)

    stages = [
        nn.Sequential(nn.Conv2d(3, 5, 5, padding=2), made(5)),
        nn.Sequential(nn.Identity(), made(5), nn.MaxPool2d(3, 2, 1), nn.Conv2d(5, 17, 1), made(17), nn.BatchNorm2d(17)),
    ]
    heads = [ExitHead("bnpool", (5, 13, 7), 4, SHAPE), ExitHead("pool", (17, 7, 4), 4, SHAPE)]
    return lived_in(eefast.EarlyExitNet(stages, heads, input_shape=SHAPE), seed=1)


@torch.no_grad()
def test_maps_that_may_be_negative_have_zero_points():
    net, x = preactivated(), images(64, SHAPE)
    quantized = eefast.quantize(net, x[:32], percentile=100)
    assert any(zero > 0 for stage in quantized.stages for zero in stage.zeros)
    assert logit_error(logits(quantized, x[32:]), logits(net, x[32:])) < 0.08
    for stage, float_stage in zip(quantized.stages, net.stages, strict=True):
        features = stage(x)
        off = (features - float_stage(x)).abs() / stage.scales[stage.output]
        assert off.mean() < 3
        x = float_stage(x)


def test_a_backbone_with_exits():
    backbone = eefast.surgery.backbones.backbone("torchvision:resnet18", 4, 3)
    net = lived_in(eefast.attach(backbone, ["layer1", "layer3"], input_shape=(3, 33, 31)), seed=0)
    x = images(32, (3, 33, 31))
    quantized = eefast.quantize(net, x[:16], winograd=False)
    assert quantized.name == "torchvision:resnet18"
    assert logit_error(logits(quantized, x[16:]), logits(net, x[16:])) < 0.08


def test_pixels_are_the_integers_of_the_image():
    net = eenet(normalization=NORMALIZATION)
    pixels = torch.randint(0, 256, (16, *SHAPE), dtype=torch.uint8)
    quantized = eefast.quantize(net, pixels, winograd=False)
    assert torch.equal(quantized.stages[0].input_integers(quantized.prepare(pixels)), pixels.float())
    from_floats = eefast.quantize(net, net.prepare(pixels), winograd=False)
    assert all(torch.equal(a, b) for a, b in zip(quantized.buffers(), from_floats.buffers(), strict=True))


def test_without_a_normalization_the_images_give_the_range():
    x = images(16, SHAPE).clamp(-1, 3)
    stage = eefast.quantize(eenet(), x, winograd=False).stages[0]
    q = stage.input_integers(x)
    assert (q.min(), q.max()) == (0, 255)
    assert stage.input_integers(torch.zeros(1, *SHAPE)).unique().item() == stage.fill(0)[0]


def test_the_result_behaves_like_any_network():
    net, x = eenet("bnpool", normalization=NORMALIZATION), images(32, SHAPE)
    before = copy.deepcopy(net.state_dict())
    net.train()
    quantized = eefast.quantize(net, x)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not quantized.training
    assert torch.equal(quantized.cost, net.cost)
    assert torch.equal(quantized.path_cost, net.path_cost)
    assert quantized.normalization == net.normalization
    assert "QuantizedConvolution" in str(quantized)
    expected = quantized(x)
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), quantized.float().to("cpu")):
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
    assert torch.equal(quantized.plain()(x), logits(quantized, x)[-1])
    other = quantized.with_criterion("entropy", [0.5, 0.4])
    assert torch.equal(other.cost, net.cost)
    assert torch.equal(logits(other, x), logits(quantized, x))
    half = logits(copy.deepcopy(quantized).half(), x.half())  # images of fewer bits
    assert logit_error(half, logits(quantized, x)) < 0.02
    accelerated = eefast.accelerate(quantized, engine="reference")
    assert all(torch.equal(a, b) for a, b in zip(accelerated(x), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_dtypes_are_quantised_in_float32(dtype):
    net = eenet().to(dtype)
    quantized = eefast.quantize(net, images(16, SHAPE))
    assert {p.dtype for p in quantized.parameters()} == {torch.float32}
    assert next(net.parameters()).dtype == dtype


def test_training_and_gradients_are_refused():
    quantized, x = eefast.quantize(eenet(), images(16, SHAPE)), images(3, SHAPE)
    assert not any(p.requires_grad for p in quantized.parameters())
    with pytest.raises(RuntimeError, match="train the float network"):
        quantized.train()(x)
    with pytest.raises(RuntimeError, match="train the float network"):
        quantized.eval()(x.requires_grad_())


@pytest.fixture
def calibrated():
    net, x = eenet(thresholds=[0.6, 0.55]), images(128, SHAPE)
    return net, x, logits(net, x)[-1].argmax(1)


def test_labels_give_thresholds_at_the_cost_of_the_float_network(calibrated, caplog):
    net, x, labels = calibrated
    quantized = eefast.quantize(net, x, labels)
    outputs, _ = collect(net, [(x, labels)])
    _, cost = outcome(outputs, labels, net.cost, "learned", net.thresholds.tolist())
    found, _ = collect(quantized, [(x, labels)])
    accuracy, new_cost = outcome(found, labels, net.cost, "learned", quantized.thresholds.tolist())
    assert new_cost <= cost + 1e-6
    assert accuracy >= outcome(found, labels, net.cost, "learned", [-1.0, -1.0])[0]  # all at the first exit cost less
    assert not torch.equal(quantized.thresholds, net.thresholds)
    quantized(x)
    assert not caplog.records


def test_bounds_are_kept(calibrated):
    net, x, labels = calibrated
    outcomes = {}
    for bound in ({"max_cost": 0.6}, {"min_accuracy": 0.9}, {"max_accuracy_drop": 0.02}):
        quantized = eefast.quantize(net, x, labels, **bound)
        found, _ = collect(quantized, [(x, labels)])
        outcomes[next(iter(bound))] = outcome(found, labels, net.cost, "learned", quantized.thresholds.tolist())
    last = float((found[-1].logits.argmax(1) == labels).float().mean())
    assert outcomes["max_cost"][1] <= 0.6
    assert outcomes["min_accuracy"][0] >= 0.9
    assert outcomes["max_accuracy_drop"][0] >= last - 0.02 - 1e-9


def test_thresholds_of_the_float_network_are_warned_of_once(caplog):
    x = images(16, SHAPE)
    quantized = eefast.quantize(eenet(thresholds=[0.7, float("inf")]), x, winograd=False)
    assert quantized.thresholds.tolist() == pytest.approx([0.7, float("inf")])
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "eefast"):
        quantized(x)
        quantized(x)
    assert [record.getMessage()[:57] for record in caplog.records] == [
        "the thresholds are those of the float network: the quanti"
    ]


def test_new_thresholds_are_not_warned_of(caplog):
    x = images(16, SHAPE)
    quantized = eefast.quantize(eenet(), x, winograd=False)
    quantized.thresholds.copy_(torch.tensor([0.3, 0.2]))
    quantized(x)
    quantized.with_criterion("entropy")(x)
    assert not caplog.records


def branching(m, x):
    return m.c(x) if x.sum() > 0 else m.c(-x)


def with_stage(stage, head=None, channels=4):
    heads = [head or ExitHead("pool", (channels, *SHAPE[1:]), 4, SHAPE)]
    return eefast.EarlyExitNet([nn.Sequential(nn.Identity(), stage)], heads, input_shape=SHAPE).eval()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (with_stage(Stage(branching, c=nn.Conv2d(3, 4, 3, padding=1))), r"stages\.0 cannot be quantised: not folded: "),
        (
            with_stage(nn.Sigmoid(), channels=3),
            "no convolution that torch.fx finds in the network keeps",
        ),
        (with_stage(nn.Identity(), channels=3), r"stages\.0 cannot be quantised: .*image itself"),
    ],
    ids=["branch", "no convolution", "identity"],
)
def test_what_cannot_be_quantised_is_named_with_its_path(net, message):
    with pytest.raises(ValueError, match=message):
        eefast.quantize(net, images(16, SHAPE))


@pytest.mark.parametrize(
    "stage",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU()),
        nn.Conv2d(3, 4, 3, stride=3),
        Stage(lambda m, x: torch.tanh(m.c(x)), c=nn.Conv2d(3, 4, 3, padding=1)),
    ],
    ids=["gelu", "stride 3", "tanh"],
)
def test_what_the_resident_engine_lacks_is_left_to_other_libraries(stage):
    made = eefast.quantize(with_stage(stage), images(16, SHAPE))
    assert isinstance(made.stages[0], QdqStage)


def test_a_head_that_cannot_be_quantised_is_named():
    net = eenet()
    net.heads[1].pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"heads\.1 cannot be quantised: .*pool"):
        eefast.quantize(net, images(16, SHAPE))


GOOD = images(16, SHAPE)
BROKEN = GOOD.clone()
BROKEN[3, 1, 2, 4], BROKEN[5, 0, 0, 0] = torch.nan, torch.inf
LABELS = torch.arange(16) % 4


@pytest.fixture(scope="module")
def float_net():
    return eenet()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"calibration_images": GOOD[:15]}, ValueError, "are 15; give at least 16"),
        ({"calibration_images": GOOD[:0]}, ValueError, "are 0; give at least 16"),
        ({"calibration_images": BROKEN}, ValueError, "2 of the calibration_images hold NaN or infinite"),
        ({"calibration_images": torch.zeros(16, *SHAPE)}, ValueError, "constant"),
        ({"calibration_images": torch.arange(16.0).view(16, 1, 1, 1).expand(16, *SHAPE)}, ValueError, "constant"),
        ({"calibration_images": GOOD[:, :2]}, ValueError, r"expected \[N, 3, H, W\]"),
        ({"calibration_images": GOOD[0]}, ValueError, r"expected \[N, 3, H, W\]"),
        ({"calibration_images": GOOD.numpy()}, TypeError, "give a tensor of images"),
        ({"calibration_images": GOOD.to(torch.uint8)}, ValueError, "no normalization"),
        ({"calibration_images": GOOD.long()}, TypeError, "int64"),
        ({"labels": LABELS[:15]}, ValueError, r"16 calibration_images need \[16\]"),
        ({"labels": LABELS[:, None]}, ValueError, r"need \[16\]"),
        ({"labels": LABELS.float()}, TypeError, "tensor of integers"),
        ({"labels": LABELS.tolist()}, TypeError, "list"),
        ({"labels": LABELS + 1}, ValueError, "from 1 to 4, but the network has 4 classes"),
        ({"labels": LABELS - 1}, ValueError, "from -1 to 2"),
        ({"percentile": 50}, ValueError, "percentile=50 must be in 90 … 100"),
        ({"percentile": float("nan")}, ValueError, "percentile=nan"),
        ({"winograd": "yes"}, ValueError, "winograd='yes'"),
        ({"max_cost": 0.5}, ValueError, "max_cost=0.5 needs labels"),
        ({"max_cost": 1.5, "labels": LABELS}, ValueError, "max_cost=1.5 must be in 0 … 1"),
        ({"max_cost": 0.5, "min_accuracy": 0.5, "labels": LABELS}, ValueError, "give one of them"),
        ({"net": nn.Identity()}, TypeError, "net is a Identity; give an eefast.EarlyExitNet"),
    ],
)
def test_bad_input_is_refused_before_work_starts(monkeypatch, float_net, arguments, error, message):
    monkeypatch.setattr(eefast.quantization.post_training, "float_stages", None)
    with pytest.raises(error, match=message):
        eefast.quantize(**{"net": float_net, "calibration_images": GOOD, **arguments})


def test_carried_features_on_rows_are_refused_before_work_starts():
    net = eefast.zoo.eenet("eenet18-1d", 1, input_shape=(3, 17), carry="features")
    with pytest.raises(ValueError, match=r"carry='features'\) on rows \(3, 17\)"):
        eefast.quantize(net, torch.rand(16, 3, 17))


def test_a_quantised_network_is_not_quantised_again():
    with pytest.raises(ValueError, match="quantised already"):
        eefast.quantize(eefast.quantize(eenet(), GOOD, winograd=False), GOOD)


@pytest.mark.parametrize("images_of", ["dark", "huge", "tiny"])
def test_extreme_images(images_of):
    """Maps of zeros after a ReLU, and of scales far from 1."""
    net = eenet()
    if images_of == "dark":
        with torch.no_grad():
            net.stages[0][0][1].bias.sub_(1e4)  # nothing passes the first ReLU
    else:
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.data *= 1e6 if images_of == "huge" else 1e-6
                break
    x = images(32, SHAPE)
    quantized = eefast.quantize(net, x[:16], percentile=100)
    assert logits(quantized, x[16:]).isfinite().all()
    expected = logits(net, x[16:])
    if images_of == "dark":
        assert isinstance(quantized.stages[0], QuantizedStage)
        assert not quantized.stages[0].integers(quantized.stages[0].input_integers(x))[1].any()
        torch.testing.assert_close(logits(quantized, x[16:]), expected, rtol=0, atol=0.1 * float(expected.abs().max()))
    else:
        assert logit_error(logits(quantized, x[16:]), expected) < 0.12
