"""Heads: shapes, layers and dtypes of every kind, and what is said of kinds that are not there."""

import pytest
import torch
from networks import images, lived_in
from torch import nn

from eefast.heads import HEADS, ExitHead, kinds_of, shortest

SHAPE, INPUT = (4, 6, 5), (3, 6, 5)


@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_returns_logits_and_a_confidence_per_sample(kind):
    head = lived_in(ExitHead(kind, SHAPE, 7, INPUT), 1)
    out = head(images(3, SHAPE))
    assert (out.logits.shape, out.confidence.shape, out.confidence_logit.shape) == ((3, 7), (3,), (3,))
    assert torch.equal(out.confidence, torch.sigmoid(out.confidence_logit))
    read = {"plain": 120, "depthwise": 8} | {f"{name}{k}": 4 << k for name in ("strided", "deep") for k in (1, 2, 3)}
    assert head.num_features == read.get(kind, 4)
    assert repr(head).startswith(f"ExitHead(\n  kind={kind!r}")


@torch.no_grad()
def test_the_rows_read_the_same_features():
    head = lived_in(ExitHead("pool", SHAPE, 7, INPUT), 1)
    x = images(3, SHAPE)
    pooled = x.mean((2, 3))
    out = head(x)
    torch.testing.assert_close(out.logits, head.classifier(pooled))
    torch.testing.assert_close(out.confidence_logit, head.confidence(pooled)[:, 0])


@pytest.mark.parametrize(
    ("kind", "convolutions", "norms"),
    [("pool", 0, 0), ("bnpool", 0, 1), ("plain", 0, 0), ("conv1", 1, 1), ("conv2", 2, 2), ("conv3", 3, 3)],
)
def test_layers_of_every_kind(kind, convolutions, norms):
    head = ExitHead(kind, SHAPE, 7, INPUT)
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == convolutions
    assert sum(isinstance(m, nn.BatchNorm2d) for m in head.modules()) == norms
    assert all((m.in_channels, m.out_channels, m.kernel_size, m.bias) == (4, 4, (3, 3), None) for m in convs)


@torch.no_grad()
def test_a_depthwise_head_pixel_by_pixel():
    """As T-RecX has it, in NumPy's words: the odd row and column of the map are left out."""
    head = lived_in(ExitHead("depthwise", (4, 5, 7), 3, (3, 5, 7)), 1).double()
    x = images(2, (4, 5, 7)).double()
    wide, deep, _ = head.convs
    mixed = torch.einsum("oc,nchw->nohw", wide.weight[:, :, 0, 0], x) + wide.bias[:, None, None]
    halved = torch.empty(2, 8, 2, 3, dtype=torch.float64)
    for row in range(2):
        for column in range(3):
            window = mixed[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            halved[:, :, row, column] = (window * deep.weight[:, 0]).sum((2, 3)) + deep.bias
    pooled = halved.clamp(min=0).mean((2, 3))
    torch.testing.assert_close(head(x).logits, pooled @ head.classifier.weight.T + head.classifier.bias)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4, 5, 7), (4, 1, 2), (3, 9)])
def test_a_strided_head_keeps_every_other_pixel_of_whole_convolutions(shape):
    rows = len(shape) == 2
    head = lived_in(ExitHead("strided3", shape, 3, shape), 1)
    x = seen = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    convolve = torch.conv1d if rows else torch.conv2d
    for conv, norm, _ in head.convs:
        assert conv.weight.shape == (2 * seen.shape[1], seen.shape[1], *[3] * (len(shape) - 1))
        seen = norm(convolve(seen, conv.weight, padding=1)[(..., *[slice(None, None, 2)] * (len(shape) - 1))]).relu()
    pooled = seen.flatten(2).mean(2)
    torch.testing.assert_close(head(x).logits, pooled @ head.classifier.weight.T + head.classifier.bias)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4, 5, 7), (3, 9)])
def test_a_deep_head_has_a_convolution_more_for_each_size(shape):
    head, strided = (lived_in(ExitHead(kind, shape, 3, shape), 1) for kind in ("deep2", "strided2"))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    assert [m[0].stride[0] for m in head.convs] == [2, 1, 2, 1]
    for i in (0, 1):
        strided.convs[i].load_state_dict(head.convs[2 * i].state_dict())
        more, seen = head.convs[2 * i + 1], strided.convs[: i + 1](x)
        assert more[0].weight.shape == (seen.shape[1], seen.shape[1], *[3] * (len(shape) - 1))
        nn.init.dirac_(more[0].weight)  # passes maps on as they are; they are at least 0
        more[1].reset_running_stats()
        more[1].eps = 0
        more[1].reset_parameters()
    strided.classifier.load_state_dict(head.classifier.state_dict())
    torch.testing.assert_close(head(x).logits, strided(x).logits)


@pytest.mark.parametrize("shape", [(4, 1, 5), (4, 5, 1)])
def test_a_depthwise_head_needs_two_rows_and_columns(shape):
    with pytest.raises(
        ValueError, match=r"halves a map of at least 2×2, but here the map is \(\d, \d\); place the exits"
    ):
        ExitHead("depthwise", shape, 7, INPUT)


def test_kinds_of_all_heads_and_of_each():
    assert kinds_of("conv1", 3) == ["conv1"] * 3
    assert kinds_of(("pool", "conv1"), 2) == ["pool", "conv1"]
    assert kinds_of("conv1", 0) == []
    assert [shortest(kinds) for kinds in (["pool"] * 3, ["pool", "conv1"])] == ["pool", ["pool", "conv1"]]
    with pytest.raises(
        ValueError, match=r"head=\['pool'\] has 1 kinds for 2 early exits; give one for each, or one name"
    ):
        kinds_of(["pool"], 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_confidences_are_float32_in_every_dtype(dtype):
    out = ExitHead("pool", SHAPE, 7, INPUT).to(dtype)(images(3, SHAPE).to(dtype))
    assert (out.logits.dtype, out.confidence.dtype, out.confidence_logit.dtype) == (dtype, torch.float32, torch.float32)


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="head='conv4' is unknown; choose one of pool, bnpool, plain, conv1, conv2, co"
    ):
        ExitHead("conv4", SHAPE, 7, INPUT)


@pytest.mark.parametrize("shape", [(4, 6, 4), (4, 3, 5), (4, 1, 1)])
def test_flattening_needs_maps_of_the_size_of_the_images(shape):
    with pytest.raises(ValueError, match=r"input's size \(6, 5\), but here the map is .*; place the exits earlier or"):
        ExitHead("plain", shape, 7, INPUT)
