"""Passes over layers made by hand: which layer takes an addition or a ReLU, the order of sections, maps used again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eefast.ops import Activation, Kind
from eefast.planning.errors import UnsupportedError
from eefast.planning.layer_passes import assign_maps, extend_joins, fuse, order_by_section
from eefast.planning.layers import ADDITION, Layer


def conv(source: int, target: int, kernel: int = 3, stride: int = 1, **more: int) -> Layer:
    return Layer(Kind.CONVOLUTION, source, target, kernel=kernel, stride=stride, padding=kernel // 2, **more)


def relu(source: int, target: int) -> Layer:
    return Layer(Kind.AFFINE, source, target, activation=Activation.RELU, weight=torch.ones(4), bias=torch.zeros(4))


def addition(first: int, second: int, target: int) -> Layer:
    return Layer(ADDITION, first, target, residual=second)


def leave(source: int, index: int = 0) -> Layer:
    return Layer(Kind.EXIT, source, index)


def brief(layers: list[Layer]) -> list[tuple[int, int, int, bool]]:
    return [(layer.source, layer.target, layer.residual, layer.activation) for layer in layers]


@pytest.mark.parametrize("summands", [(3, 4), (4, 3)])
def test_an_addition_and_its_relu_go_into_the_convolution_that_does_not_resize(summands: tuple[int, int]) -> None:
    """Values 1 → 2 → 3 on the main path, 1 → 4 by the projection."""
    layers = [conv(0, 1), conv(1, 2, stride=2), conv(2, 3), conv(1, 4, kernel=1, stride=2)]
    fused = fuse([*layers, addition(*summands, 5), relu(5, 6), leave(6)])
    assert brief(fused)[2:] == [(1, 4, -1, False), (2, 6, 4, True), (6, 0, -1, False)]


def test_of_two_convolutions_that_keep_the_size_the_larger_kernel_takes_the_addition() -> None:
    fused = fuse([conv(0, 1), conv(1, 2, kernel=1), conv(1, 3), addition(2, 3, 4), leave(4)])
    assert brief(fused)[1:] == [(1, 2, -1, False), (1, 4, 2, False), (4, 0, -1, False)]


def test_a_relu_of_a_value_with_other_readers_stays() -> None:
    layers = [conv(0, 1), relu(1, 2), conv(2, 3), addition(3, 1, 4), leave(4)]
    assert brief(fuse(layers))[1] == (1, 2, -1, True)


@pytest.mark.parametrize(
    "layers",
    [
        [conv(0, 1), addition(1, 0, 2), leave(2)],
        [conv(0, 1), conv(0, 2), conv(1, 4), conv(2, 5), addition(1, 2, 3), leave(3), leave(4, 1), leave(5, 2)],
        [conv(0, 1), conv(1, 2), relu(2, 3), addition(3, 1, 4), leave(4)],
    ],
    ids=["of the image", "of results with other readers", "of a ReLU"],
)
def test_additions_that_no_convolution_takes(layers: list[Layer]) -> None:
    with pytest.raises(UnsupportedError, match="an addition follows no convolution whose result is used only there"):
        fuse(layers)


def test_elsewhere_they_become_depthwise_convolutions_of_weight_one() -> None:
    layers = [conv(0, 1), conv(1, 2), relu(2, 3), addition(3, 1, 4), relu(4, 5), leave(5)]
    *_, total, _ = fuse(layers, [3, 4, 4, 4, 4, 4])
    assert brief([total]) == [(3, 5, 1, True)]
    assert (total.kind, total.groups, total.kernel) == (Kind.CONVOLUTION, 4, 1)
    assert (total.weight == 1).all()
    assert not total.bias.any()
    with pytest.raises(UnsupportedError, match="an addition follows no convolution"):
        fuse([conv(0, 1), addition(1, 0, 2), leave(2)], [3, 3, 3])


@pytest.mark.parametrize("kind", [Kind.SCALE, Kind.MEAN, Kind.AFFINE])
def test_activations_go_into_the_layer_before(kind: Kind) -> None:
    before = Layer(kind, 1, 2, weight=torch.full((4,), 2.0), bias=torch.zeros(4))
    fused = fuse([conv(0, 1), before, replace(relu(2, 3), activation=Activation.GELU), leave(3)])
    assert [(layer.kind, layer.activation) for layer in fused[1:-1]] == [(kind, Activation.GELU)]
    # One that has an activation takes no other.
    twice = [conv(0, 1), relu(1, 2), replace(relu(2, 3), activation=Activation.SILU), leave(3)]
    assert [layer.activation for layer in fuse(twice)] == [Activation.RELU, Activation.SILU, Activation.NONE]


def join(sources: list[int], first: int, width: int) -> list[Layer]:
    """The concatenation of values of `width` channels, which writes the values from `first` on."""
    return [
        Layer(Kind.JOIN, source, first + i, residual=first + i - 1 if i else -1, channel=i * width)
        for i, source in enumerate(sources)
    ]


def norm(source: int, target: int, channels: int) -> Layer:
    return Layer(Kind.AFFINE, source, target, weight=torch.ones(channels), bias=torch.ones(channels))


@pytest.mark.parametrize(("width", "shared"), [(16, True), (4, False)])
def test_a_longer_concatenation_writes_into_the_shorter_ones_map(width: int, shared: bool) -> None:
    """Values 1 and 2 are joined as 4; 1, 2 and the convolution of that as 9, where channels fill whole blocks."""
    first, second = join([1, 2], 3, width), join([1, 2, 6], 7, width)
    layers = [
        conv(0, 1), conv(0, 2), *first, norm(4, 5, 2 * width), conv(5, 6), *second, norm(9, 10, 3 * width), leave(10),
    ]  # fmt: skip
    channels = [3, width, width, *[2 * width] * 3, width, *[3 * width] * 4]
    kept = extend_joins(layers, channels)
    joins = [(layer.source, layer.residual, layer.channel) for layer in kept if layer.kind == Kind.JOIN]
    if not shared:
        assert kept == layers
        return
    assert joins == [(1, -1, 0), (2, 3, 16), (6, 4, 32)]
    assert [channels[value] for value in (3, 4, 9)] == [48, 48, 48]
    placed = assign_maps(order_by_section(kept), channels, (5, 6))
    targets = [layer.target for layer in placed.layers if layer.kind == Kind.JOIN]
    assert len(set(targets)) == 1
    assert placed.maps[targets[0]] == (48, 0)
    # The joined map is in use from its first part to its last reader.
    between = [layer for layer in placed.layers[2:-2] if layer.kind != Kind.JOIN]
    assert all(layer.target != targets[0] for layer in between)


@pytest.mark.parametrize("reader", [conv(4, 5), leave(4, 1)], ids=["convolution", "exit"])
def test_a_concatenation_that_others_read_whole_keeps_its_map(reader: Layer) -> None:
    layers = [conv(0, 1), conv(0, 2), *join([1, 2], 3, 16), reader, *join([1, 2, 1], 6, 16), conv(8, 9), leave(9)]
    assert extend_joins(layers, [3, 16, 16, 32, 32, 16, 48, 48, 48, 16]) == layers


def test_maps_of_one_pixel_are_kept_apart() -> None:
    """Value 2, the mean of value 1, has its channels and its section, but not its size."""
    mean, gate = Layer(Kind.MEAN, 1, 2), conv(2, 3, kernel=1)
    layers = [conv(0, 1), mean, gate, Layer(Kind.SCALE, 1, 4, residual=3), conv(4, 5), leave(5)]
    placed = assign_maps(order_by_section(layers), [3, 4, 4, 4, 4, 4], (5, 6), pooled={2, 3})
    first, pooled, gated, scaled, last, _ = placed.layers
    assert len({first.target, pooled.target, gated.target}) == 3
    assert scaled.target == scaled.source == first.target
    assert last.target not in (pooled.target, gated.target, first.target)


def test_layers_that_resize_come_first_in_their_section() -> None:
    shortcut, total = conv(1, 4, 1, 2), conv(3, 5, residual=4)
    ordered = order_by_section([conv(0, 1), conv(1, 2, 3, 2), conv(2, 3), leave(1), shortcut, total, leave(5, 1)])
    assert [layer.section for layer in ordered] == [0, 0, 1, 1, 1, 1, 1]
    assert [layer.target for layer in ordered] == [1, 0, 2, 4, 3, 5, 1]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([conv(0, 1), conv(1, 2, stride=2), conv(1, 3, residual=2), leave(3)], "joins maps of different sections"),
        ([conv(0, 1), conv(1, 2, 3, 2), conv(2, 3), conv(1, 4, 1, 2, residual=3), leave(4)], "result of later"),
        ([conv(0, 1), leave(1), conv(1, 2, stride=2)], "the final exit does not come last"),
        ([conv(0, 1), leave(1), conv(1, 2)], "the final exit does not come last"),
    ],
)  # fmt: skip
def test_orders_that_the_engine_cannot_run(layers: list[Layer], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        order_by_section(layers)


def test_maps_are_used_again_once_nothing_reads_them() -> None:
    """A chain needs two maps; a residual is overwritten by the sum."""
    chain = [conv(0, 1), *(conv(i, i + 1) for i in range(1, 7)), conv(7, 8, residual=6), leave(8)]
    lowered = assign_maps(order_by_section(chain), [3] + [4] * 8, (5, 6))
    assert lowered.maps == ((3, -1), (4, 0), (4, 0))
    assert lowered.sizes == ((5, 6),)
    *_, last, _ = lowered.layers
    assert last.target == last.residual != last.source
    for layer in lowered.layers[:-2]:
        assert layer.target != layer.source


def test_maps_of_other_sizes_and_channels_are_kept_apart() -> None:
    layers = [conv(0, 1), conv(1, 2), conv(2, 3, stride=2), conv(3, 4), leave(4)]
    lowered = assign_maps(order_by_section(layers), [3, 4, 8, 8, 8], (5, 6))
    assert lowered.maps == ((3, -1), (4, 0), (8, 0), (8, 1), (8, 1))
    assert lowered.sizes == ((5, 6), (3, 3))


def test_maps_of_integers_are_shared_only_by_values_of_one_zero_point() -> None:
    """Values 1 … 5 in turn, each read once: two maps would do, but the third and the fourth value have other zeros."""
    layers = order_by_section([conv(0, 1), conv(1, 2), conv(2, 3), conv(3, 4), conv(4, 5), leave(5)])
    plain = assign_maps(layers, [3, 4, 4, 4, 4, 4], (5, 7))
    assert [layer.target for layer in plain.layers] == [1, 2, 1, 2, 1, 0]
    placed = assign_maps(layers, [3, 4, 4, 4, 4, 4], (5, 7), [0, 0, 0, 9, 8, 0])
    assert [layer.target for layer in placed.layers] == [1, 2, 3, 4, 1, 0]
    assert placed.maps == ((3, -1, 0), (4, 0, 0), (4, 0, 0), (4, 0, 9), (4, 0, 8))


def test_a_residual_of_another_zero_point_is_not_overwritten() -> None:
    layers = order_by_section([conv(0, 1), conv(1, 2), conv(2, 3, residual=1), leave(3)])
    assert assign_maps(layers, [3, 4, 4, 4], (5, 7), [0, 7, 0, 7]).layers[2].target == 1
    assert assign_maps(layers, [3, 4, 4, 4], (5, 7), [0, 7, 0, 6]).layers[2].target == 3


def test_an_exit_whose_head_resizes_would_come_too_late() -> None:
    """The head of exit 0 halves value 1 to value 2; the next stage goes on from value 1."""
    layers = [conv(0, 1), conv(1, 2, kernel=2, stride=2), leave(2), conv(1, 3), leave(3, 1)]
    with pytest.raises(UnsupportedError, match=r"the head of exit 0 resizes its maps, so it would run after layers"):
        order_by_section(layers)
