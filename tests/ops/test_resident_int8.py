"""`eefast::resident_int8`: the C++ kernels and the reference against the quantised stages, integer by integer."""

from __future__ import annotations

import math
import os
import platform
import sys
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from int8_calls import Exposed, network_tables, op, random_steps, victim
from networks import assert_same_answers, images, one_by_one, spread_thresholds
from quantized_networks import NORMALIZATION, Steps, image_constants, network
from torch import Tensor, nn

import eefast
from eefast import ops
from eefast.ops.library import SCHEMAS
from eefast.ops.resident_int8 import reference

HAS_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("eefast::resident_int8", "CPU")
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the C++ library has no INT8 kernels")
WAYS = [pytest.param(op, marks=needs_kernels, id="cpp"), pytest.param(reference, id="reference")]
CHANNELS = (1, 3, 5, 17, 65)


def images_of(steps: Steps, n: int, shape: tuple[int, int, int], of_bytes: bool = False) -> Tensor:
    if of_bytes:
        return torch.randint(0, 256, (n, *shape), generator=steps.r, dtype=torch.uint8)
    return 2 * torch.randn(n, *shape, generator=steps.r)


@torch.no_grad()
def check_values(way: Any, steps: Steps, shape: tuple[int, int, int], n: int, threads: int, group: int) -> None:
    """Every value of the stage, exposed one by one, is the stage's, integer by integer."""
    stage, x = steps.stage(), images_of(steps, n, shape, of_bytes=n % 2 == 1)
    values = stage.integers(x.float() if x.dtype == torch.uint8 else stage.input_integers(x))
    for value in range(1, len(values)):
        exposed = Exposed(steps, value, shape, *values[value].shape[2:])
        found = way(*exposed.arguments(x, group, threads))
        wrong = (found[0].double() != exposed.expected(values[value])).sum()
        assert wrong == 0, f"value {value} of {len(values)}: {wrong} of {found[0].numel()} logits"
        assert found[2].tolist() == [0] * n


# The reference is made of the same functions as the stage.
CHAINS = [*product(range(60), WAYS[:1]), *product(range(12), WAYS[1:])]


@pytest.mark.parametrize(
    ("seed", "way"), [pytest.param(i, *w.values, marks=w.marks, id=f"{i}-{w.id}") for i, w in CHAINS]
)
@pytest.mark.sampled(40)
def test_random_chains(seed: int, way: Any) -> None:
    steps, shape, name = random_steps(seed)
    print(name)
    check_values(way, steps, shape, n=(3, 1, 31, 2)[seed % 4], threads=1 + seed % 2, group=(1, 2, 8)[seed % 3])


SIDES = [1, 2, 3, 5, 7, 8, 13, 14, 15, 16, 17, 28, 31, 33]


@needs_kernels
@pytest.mark.parametrize("width", SIDES)
@pytest.mark.parametrize("window", ["3/1", "F(2,3)", "F(2×2)", "3/2", "1/1", "1/2", "5/1", "5/2"])
@pytest.mark.sampled(28)
def test_convolutions_of_every_width(window: str, width: int) -> None:
    """From and to few, odd and many channels, with and without a residual."""
    winograd = {"F(2,3)": 1, "F(2×2)": 2}.get(window, 0)
    kernel, stride = (3, 1) if winograd else map(int, window.split("/"))
    height = SIDES[(SIDES.index(width) * 5 + 3) % len(SIDES)]
    for i, (inputs, outputs) in enumerate(product(CHANNELS, CHANNELS)):
        if (i + width) % 4:  # a quarter of the pairs at every width
            continue
        steps = Steps(torch.Generator().manual_seed(i), 3, image=image_constants(3, None))
        steps.convolution(inputs, 1, relu=winograd > 0 or bool(i % 3))
        other = steps.convolution(outputs, 1, stride, relu=bool(i % 2), source=1)
        steps.convolution(outputs, kernel, stride, source=1, residual=other, winograd=winograd)
        steps.convolution(outputs, kernel, relu=False, source=3, winograd=winograd)
        check_values(op, steps, (3, height, width), 2, 1 + i % 2, 1 + i % 3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_stems(channels: int, stride: int, kernel: int, way: Any) -> None:
    constants = torch.stack([torch.linspace(20, 60, channels), torch.linspace(-30, 300, channels)])
    for size in ((1, 1), (7, 14), (33, 5)):
        steps = Steps(torch.Generator().manual_seed(kernel), channels, image=constants)
        steps.convolution(17, kernel, stride, relu=False)
        for n in (1, 2):
            check_values(way, steps, (channels, *size), n, 1, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-6, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("winograd", [0, 1, 2])
def test_maps_of_zeros_and_extreme_scales(scale: float, winograd: int, way: Any) -> None:
    """Sums of up to 2^31 · scale are limited to 0 … 255, and all-zero maps stay what their biases make of them."""
    steps = Steps(torch.Generator().manual_seed(0), 3, image=image_constants(3, None))
    steps.convolution(17, scale=0.0 if scale == 0 else 1.0)
    steps.convolution(65, winograd=winograd)
    cast(Any, steps.steps[1]).scale.fill_(scale)
    steps.convolution(5, residual=-1, winograd=winograd)
    check_values(way, steps, (3, 9, 7), 2, 1, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("winograd", [0, 1, 2])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums(sign: int, winograd: int, way: Any) -> None:
    """All weights ±127 and all integers 255, over 2^24: sums are exact, their float32 is rounded half to even."""
    steps = Steps(torch.Generator().manual_seed(0), 1, image=torch.tensor([[0.0], [255.0]]))
    steps.convolution(130, 1)
    steps.convolution(3, winograd=winograd)
    first, second = cast(list[Any], steps.steps)
    first.scale.copy_(torch.tensor(1e9))
    first.weight.fill_(127)
    second.weight.fill_(127 * sign)
    sums = 127 * 255 * 130 * 9
    for bias in (-sums, sums, -sums + 2**22 - 6):
        second.bias[:, :] = torch.tensor([sign * bias, sign * bias + 2, sign * bias + 4])
        second.scale.copy_(torch.tensor([sign / 2**20, sign / 2**22, sign / 3.0]))
        check_values(way, steps, (1, 5, 7), 1, 1, 1)


NETWORKS: list[dict[str, Any]] = [
    {},
    {"blocks": "pre-activation", "criterion": "entropy"},
    {"blocks": "pool", "width": 17, "shape": (1, 28, 28), "criterion": "max_probability"},
    {"head": "bnpool", "normalization": NORMALIZATION, "winograd": (0,), "criterion": "margin"},
    {"head": "conv1", "classes": 1},
    {"head": "conv2", "width": 5, "exits": 1, "classes": 100, "winograd": (2,)},
    {"head": "conv3", "shape": (5, 7, 5)},
    {"head": "plain", "shape": (3, 7, 6), "width": 3},
    {"head": "plain", "blocks": "pre-activation", "shape": (1, 5, 9), "width": 5, "winograd": (2,)},
    {"head": "bnpool", "blocks": "pre-activation", "shape": (3, 15, 14), "width": 33, "exits": 4},
]


def network_and_images(case: int, n: int) -> tuple[eefast.EarlyExitNet, Tensor]:
    net = network(case, **NETWORKS[case])
    x = images(n, net.input_shape, case)
    spread_thresholds(net, x, 0.4)
    return net, x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", range(len(NETWORKS)), ids=str)
@pytest.mark.sampled(8)
def test_networks(case: int, way: Any) -> None:
    """Every sample takes the exit that the network says, with its logits up to the rounding of the float32 heads."""
    net, x = network_and_images(case, 31)
    steps, image = network_tables(net, 1 + case % 3)
    more = net.thresholds, image, net.criterion.name, net.num_classes, 1 + case % 2
    with torch.no_grad():
        wanted = one_by_one(net, x)
        logits, confidence, exits = way(x, *steps, *more)
    assert len(exits.unique()) > 1
    assert_same_answers(eefast.ExitResult(logits, exits, confidence, net.cost[exits]), wanted, net, 1e-5)
    if net.normalization is not None:
        pixels = torch.randint(0, 256, x.shape, dtype=torch.uint8)
        prepared = net.prepare(pixels)
        for a, b in zip(way(pixels, *steps, *more), way(prepared, *steps, *more), strict=True):
            assert torch.equal(a, b)


@needs_kernels
def test_the_answer_depends_on_the_sample_only() -> None:
    net, x = network_and_images(2, 257)
    more = net.thresholds, network_tables(net)[1], net.criterion.name, net.num_classes
    wanted = op(x, *network_tables(net)[0], *more, 1)
    assert len(wanted[2].unique()) == 3
    for group, threads in product((1, 2, 3, 8, 64), (1, 2, 3, 8)):
        steps = network_tables(net, group)[0]
        assert all(map(torch.equal, op(x, *steps, *more, threads), wanted))
        for size, start in product((0, 1, 3, 31), (0, 17, 226)):
            part = slice(start, start + size)
            found = op(x[part], *steps, *more, threads)
            assert all(torch.equal(a, b[part]) for a, b in zip(found, wanted, strict=True))
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[::2]
    found = op(strided, *network_tables(net)[0], *more, 2)
    assert all(torch.equal(a, b[::2]) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [0, 1, 7])
def test_images_with_nan_exit_last_with_nan(case: int, way: Any) -> None:
    net, x = network_and_images(case, 9)
    steps, image = network_tables(net, 4)
    more = net.thresholds, image, net.criterion.name, net.num_classes, 1
    wanted, spoilt = way(x, *steps, *more), x.clone()
    spoilt[2, -1, -1, -1] = spoilt[5] = math.nan
    spoilt[7, 0, 0, 0], spoilt[8] = math.inf, -math.inf
    found = way(spoilt, *steps, *more)
    for row in (2, 5):
        assert found[2][row] == net.num_exits
        assert found[0][row].isnan().all()
        assert found[1][row].isnan()
    others = [0, 1, 3, 4, 6]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(found, wanted, strict=True))
    # An infinite pixel is as large as the largest one, or as small.
    limited = spoilt.clamp(-1e6, 1e6)
    for a, b in zip(found, way(limited, *steps, *more), strict=True):
        assert torch.equal(a[[7, 8]], b[[7, 8]])


@needs_kernels
def test_seconds_are_added() -> None:
    net, x = network_and_images(0, 31)
    steps, image = network_tables(net)
    seconds = torch.zeros(len(steps[2]), dtype=torch.float64)
    arguments = (x, *steps, net.thresholds, image, "learned", net.num_classes, 1)
    assert all(map(torch.equal, op(*arguments, seconds), op(*arguments)))
    assert (seconds > 0).all()


# Instruction sets


def test_int8_instruction_set_is_the_best_allowed() -> None:
    wanted, found = os.environ.get("EEFAST_ISA"), ops.int8_instruction_set()
    if ops.CPP_MISSING:
        assert found == "none"
    elif wanted in ("portable", "avx2"):
        assert found == wanted
    elif sys.platform == "linux" and platform.machine() == "x86_64" and "ATEN_CPU_CAPABILITY" not in os.environ:
        flags = Path("/proc/cpuinfo").read_text().split()
        names = {"avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "avx2": "avx2"}
        best = next((name for flag, name in names.items() if flag in flags), "portable")
        # Not every compiler knows AVX-VNNI.
        assert found == best or (best, found) == ("avx_vnni", "avx2")


# As an op of PyTorch


@pytest.mark.parametrize("n", [0, 3])
def test_opcheck(n: int) -> None:
    arguments = victim()
    arguments["images"] = arguments["images"][:n]
    torch.library.opcheck(op, tuple(arguments.values()))
    bytes_ = (10 * arguments["images"]).to(torch.uint8)
    torch.library.opcheck(op, tuple((arguments | {"images": bytes_}).values()))


def test_compiles_and_exports_as_one_node() -> None:
    arguments = victim()
    x, *rest = arguments.values()

    class Network(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return ops.resident_int8.run(x, *rest)

    wanted = Network()(x)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Network(), (x,), dynamic_shapes={"x": {0: batch}})
    assert [n.target for n in exported.graph.nodes if n.op == "call_function" and "getitem" not in n.name] == [op]
    assert all(map(torch.equal, exported.module()(x[:2]), (part[:2] for part in wanted)))
    assert all(map(torch.equal, torch.compile(Network(), fullgraph=True, backend="aot_eager")(x), wanted))


def test_gradients_are_refused() -> None:
    arguments = victim()
    arguments["images"].requires_grad_()
    with pytest.raises(ValueError, match=r"images requires grad.*torch\.no_grad"):
        ops.resident_int8.run(*arguments.values())


WRONG: dict[str, tuple[str, Any, str]] = {
    "dtype": ("images", lambda x: x.double(), r"images is torch.float64; convert it with .to\(torch.float32\)"),
    "channels": ("images", lambda x: x[:, :2], r"images has 2 channels; expected 3"),
    "rank": ("images", lambda x: x[0], r"images has shape \[3, 9, 9\]; expected \[N, C, H, W\]"),
    "maps": ("maps", lambda x: x[:, :2], r"maps has shape \[\d+, 2\]; expected \[M, 3\]"),
    "weights": ("weights", lambda x: x.float(), r"weights is torch.float32; convert it with .to\(torch.float64\)"),
    "image": ("image", lambda x: x[:, :2], r"image has shape \[2, 2\]; expected \[2, 3\]"),
    "image dtype": ("image", lambda x: x.double(), r"image is torch.float64; convert it with .to\(torch.float32\)"),
    "classes": ("num_classes", lambda x: 0, r"num_classes = 0; expected 1 or more"),
    "no exit": ("steps", lambda x: x[:-1], r"steps ends with no final exit"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_of_the_reference(wrong: str) -> None:
    name, change, message = WRONG[wrong]
    arguments = victim()
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        reference(*arguments.values())


@pytest.mark.parametrize("winograd", [1, 2, 4, -1])
def test_wrong_winograd_steps_of_the_reference(winograd: int) -> None:
    arguments = victim()
    arguments["steps"][0, 8] = winograd
    with pytest.raises(RuntimeError, match=r"steps\[0\] = .*: there is no Winograd convolution for this window"):
        reference(*arguments.values())


def test_the_schemas_in_cpp_are_these() -> None:
    header = (Path(eefast.__file__).parents[1] / "csrc" / "schemas.h").read_text()
    joined = "".join(header.replace('"\n', "").split('"'))
    joined = " ".join(joined.split())
    for name in ("resident_int8(", "int8_instruction_set("):
        (schema,) = (text for text in SCHEMAS if text.startswith(name))
        assert " ".join(schema.split()) in joined
