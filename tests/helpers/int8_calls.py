"""Quantised networks and single stages as arguments of `eefast::resident_int8`."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import torch
from quantized_networks import Steps, image_constants, network
from torch import Tensor

import eefast
from eefast.ops import Kind
from eefast.planning import layer_passes
from eefast.planning.integer_lowering import Values, lower_integers
from eefast.planning.layers import IntegerLayer, Lowered
from eefast.planning.packing import program

op = torch.ops.eefast.resident_int8.default

NAMES = (
    *("images", "steps", "maps", "groups", "weights", "packed", "thresholds", "image"),
    *("criterion", "num_classes", "threads", "seconds"),
)


def tables(lowered: Lowered, group: int = 1) -> tuple[Tensor, ...]:
    """The op's arguments between the images and the thresholds."""
    n = len(lowered.sizes)
    p = program(lowered, (0,) * n, (group,) * n, False, {})
    return p.steps, p.maps, p.groups, p.weights, p.packed


def network_tables(net: eefast.EarlyExitNet, group: int = 1) -> tuple[tuple[Tensor, ...], Tensor]:
    lowered = lower_integers(net)
    assert lowered.image is not None
    return tables(lowered, group), lowered.image


class Exposed:
    """The first steps of a stage of images, and one exit whose logits say what the last of their maps holds.

    rows: [K + 1, C, H, W] of 0 and ±1, so that sums of integers are exact: the identity, or random ones for large maps.
    """

    def __init__(self, steps: Steps, value: int, shape: tuple[int, int, int], height: int, width: int) -> None:
        made, channels = Values(shape[0]), steps.channels[value]
        first = Steps(steps.r, shape[0], image=steps.image)
        first.steps, first.scales, first.zeros = (
            steps.steps[:value],
            steps.scales[: value + 1],
            steps.zeros[: value + 1],
        )
        seen = made.append(first.stage(), 0, "the stage")
        features = channels * height * width
        generator = torch.Generator().manual_seed(features)
        small = features <= 300
        rows = torch.eye(features) if small else torch.randint(-1, 2, (41, features), generator=generator).float()
        self.rows = torch.cat([rows, rows[:1]]).view(-1, channels, height, width)
        self.num_classes = len(rows)
        bias = torch.zeros(len(self.rows))
        made.layers.append(IntegerLayer(Kind.EXIT, seen, 0, kernel=1, weight=self.rows, bias=bias))
        ordered = layer_passes.order_by_section(made.layers)
        placed = layer_passes.assign_maps(ordered, made.channels, shape[1:], made.zeros)
        self.lowered, self.image = Lowered(placed.layers, placed.maps, placed.sizes, made.image), steps.image
        assert self.lowered.sizes[-1] == (height, width)

    def arguments(self, images: Tensor, group: int = 1, threads: int = 1) -> tuple[Any, ...]:
        some = torch.empty(0), self.image, "learned", self.num_classes, threads
        return (images, *tables(self.lowered, group), *some)

    def expected(self, integers: Tensor) -> Tensor:
        """The logits for the integers [N, C, H, W] of the map."""
        return integers.flatten(1).double() @ self.rows.flatten(1)[:-1].double().t()


CHANNELS, KERNELS = (1, 3, 5, 17, 65), (1, 3, 3, 3, 5)
ALGORITHMS = ("", " F(2,3)", " F(2×2)")


def random_steps(seed: int) -> tuple[Steps, tuple[int, int, int], str]:
    """A chain of 2 … 6 steps of any kind on images of any odd size; what it is, for a failure's name."""
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = r.choice((1, 3, 5)), r.randrange(1, 34, 2), r.randrange(1, 34, 2)
    steps = Steps(generator, shape[0], image=image_constants(shape[0], None))
    kernel, extreme = r.choice(KERNELS), r.choice((1.0,) * 8 + (1e-6, 40.0))
    steps.convolution(r.choice(CHANNELS), kernel, r.choice((1, 2)), relu=r.random() < 0.6)
    named = [f"{shape}", f"stem {kernel}"]
    for _ in range(r.randint(1, 5)):
        kind, relu = r.choice(("convolution", "convolution", "block", "affine", "pool")), r.random() < 0.6
        fast = r.choice((0, 0, 1, 2)) if steps.zeros[-1] == 0 else 0
        if kind == "convolution":
            kernel, stride = r.choice(KERNELS), r.choice((1, 2))
            fast = fast if (kernel, stride) == (3, 1) else 0
            steps.convolution(r.choice(CHANNELS), kernel, stride, relu=relu, winograd=fast, scale=extreme)
            kind += f" {kernel}/{stride} -> {steps.channels[-1]}" + ALGORITHMS[fast]
        elif kind == "block":
            steps.basic(r.choice((steps.channels[-1], r.choice(CHANNELS))), r.choice((1, 2)), winograd=fast)
            kind += f" -> {steps.channels[-1]}" + ALGORITHMS[fast]
        elif kind == "affine":
            steps.affine(relu)
        else:
            windows = ((3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 1, 1))
            fits = [window for window in windows if min(steps.sizes(*shape[1:])[-1]) + 2 * window[2] >= window[0]]
            steps.max_pool(*r.choice(fits))
        named.append(kind)
    return steps, shape, ", ".join(named)


@lru_cache(maxsize=1)
def _victim() -> dict[str, Any]:
    """Arguments of a network with every kind of step, five images."""
    net = network(3, (3, 9, 9), blocks="pool", width=17)
    (steps, image), x = network_tables(net, 2), torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    values = (x, *steps, net.thresholds, image, "learned", 7, 2, None)
    return dict(zip(NAMES, values, strict=True))


def victim() -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in _victim().items()}
