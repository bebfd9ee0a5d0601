"""The resident CUDA kernel on the CPU: every thread a fiber, in many orders, against the op's plain PyTorch."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exit_cases import CRITERIA
from exit_chains import spread
from networks import images, lived_in, spread_thresholds
from resident_cases import Answer, check, exits_of, expected, forced, never, small
from rule_cases import cases, in_float64, random_rule
from simt_build import build
from torch import Tensor

from eefast import ops, rules, zoo
from eefast.model import EarlyExitNet
from eefast.planning.lowering import lower
from eefast.planning.packing import cuda_program
from eefast.rules import Rule

pytestmark = pytest.mark.skipif(ops.CUDA_MISSING is not None, reason=f"CUDA kernels: {ops.CUDA_MISSING}")

UNWRITTEN = -12345.0  # no run produces it
PIXELS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
HALF, BFLOAT = torch.float16, torch.bfloat16


class Batch(ctypes.Structure):
    """`Batch` of csrc/cuda/resident.h."""

    _fields_ = [
        ("images", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("pixel", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("normalization", ctypes.c_void_p),
        ("next", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("confidence", ctypes.c_void_p),
        ("exits", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = build("resident")
    loaded.resident.restype = ctypes.c_char_p
    return loaded


class Kernel:
    """The emulated kernel with one network's weights, packed."""

    def __init__(self, library: ctypes.CDLL, net: EarlyExitNet, dtype: torch.dtype = HALF):
        self.library, self.net = library, net
        self.lowered = lower(net)
        self.program = cuda_program(self.lowered, dtype, torch.device("cpu"))

    def __call__(
        self, x: Tensor, thresholds: Tensor, grid: int = 2, order: int = 0, drop: int = 0, norm: Tensor | None = None,
        rule: Tensor | None = None,
    ) -> Answer:  # fmt: skip
        p, net = self.program, self.net
        tables = p.steps, p.maps, p.groups, p.packed
        last = net.criterion.name if rule is None else "carried", net.num_classes, p.bfloat16, rule
        network = ops.resident_network(x, *tables, thresholds, *last)
        # One row more on either side: a wrong image number lands there.
        rows = len(x) + 2
        out = torch.full((rows, net.num_classes), UNWRITTEN), torch.full((rows,), UNWRITTEN), torch.full((rows,), -9)
        queue = torch.zeros(1, dtype=torch.int32)
        batch = Batch(
            x.data_ptr(), x.stride(), PIXELS[x.dtype], *x.shape, None if norm is None else norm.data_ptr(),
            queue.data_ptr(), *(o[1:].data_ptr() for o in out),
        )  # fmt: skip
        fault = self.library.resident(ctypes.c_void_p(network.data_ptr()), ctypes.byref(batch), grid, order, drop)
        for o, unwritten in zip(out, (UNWRITTEN, UNWRITTEN, -9), strict=True):
            assert (o[[0, -1]] == unwritten).all()
        return Answer(*(o[1:-1] for o in out), fault.decode() if fault else None)


NETWORKS = {
    "8 layers": lambda: small(1, 10, (3, 32, 32), "pool", 0),
    "8 layers, 28×28": lambda: small(1, 10, (1, 28, 28), "bnpool", 1),
    "8 layers, odd": lambda: small(1, 256, (3, 13, 19), "bnpool", 2),
    "8 layers, tiny": lambda: small(1, 1, (2, 5, 3), "pool", 3),
    "8 layers, head convolution": lambda: small(1, 33, (3, 15, 16), "conv1", 4),
    "14 layers": lambda: small(2, 100, (3, 32, 32), "pool", 5),
    "eenet20": lambda: lived_in(zoo.eenet("eenet20", 5, "linear", "bnpool", input_shape=(3, 32, 32)), 6),
    **{
        f"eenet8, {f} filters": (
            lambda f=f: lived_in(zoo.eenet("eenet8", 2, "linear", "pool", filters=f, input_shape=(1, 28, 28)), 7)
        )
        for f in (2, 4, 8, 16)
    },
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.sampled(5)
def test_every_exit_in_turn(library: ctypes.CDLL, name: str) -> None:
    net = NETWORKS[name]()
    dtype = BFLOAT if "odd" in name or "8 filters" in name else HALF
    kernel = Kernel(library, net, dtype)
    for at in range(net.num_exits + 1):
        x = images(1 + at % 2, net.input_shape, at)
        limits = forced(net, at)
        got = kernel(x, limits)
        assert (got.exits == at).all()
        check(got, expected(net, exits_of(kernel.lowered, x, dtype), limits), dtype)


def free(criterion: str, dtype: torch.dtype, library: ctypes.CDLL) -> tuple[Kernel, Tensor, Tensor, Answer]:
    net = small(1, 10, (3, 32, 32), "pool", 11).with_criterion(criterion).eval()
    x = images(9, net.input_shape, 12)
    spread_thresholds(net, x, 0.4)
    kernel = Kernel(library, net, dtype)
    want = expected(net, exits_of(kernel.lowered, x, dtype), net.thresholds)
    assert len(want.exits.unique()) == 3
    return kernel, x, net.thresholds, want


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.sampled(4)
def test_free_exits(library: ctypes.CDLL, criterion: str, dtype: torch.dtype) -> None:
    kernel, x, thresholds, want = free(criterion, dtype, library)
    check(kernel(x, thresholds), want, dtype)


@pytest.mark.parametrize("criterion", ["learned", "entropy"])
def test_thresholds_of_each_image(library: ctypes.CDLL, criterion: str) -> None:
    """NaN lets an image exit, whatever its confidence; an image of NaN too."""
    kernel, x, thresholds, _ = free(criterion, HALF, library)
    never_, always = never(kernel.net), forced(kernel.net, 0)
    x[7] = torch.nan
    at_second = torch.tensor([float(never_[0]), torch.nan])
    limits = torch.stack([thresholds, never_, always, torch.full_like(never_, torch.nan), at_second] * 2)[: len(x)].T
    exits = exits_of(kernel.lowered, x, HALF)
    for table in (limits, limits.contiguous()):
        got = kernel(x, table)
        want = [int(expected(kernel.net, exits, column).exits[i]) for i, column in enumerate(table.T)]
        assert got.exits.tolist() == [
            next((k for k in range(exit_index) if table[k, i].isnan()), exit_index) for i, exit_index in enumerate(want)
        ]
        assert got.logits[7].isnan().all()


@pytest.mark.parametrize("grid", [1, 2, 3, 12])
@pytest.mark.sampled(2)
def test_any_order_and_number_of_blocks_gives_the_same_bits(library: ctypes.CDLL, grid: int) -> None:
    kernel, x, thresholds, _ = free("learned", HALF, library)
    first = kernel(x[:7], thresholds)
    assert first.fault is None
    for order in (1, 2):
        assert kernel(x[:7], thresholds, grid, order).same_bits(first)
    alone = [kernel(x[i : i + 1], thresholds, 1) for i in range(7)]
    for name in ("logits", "confidence", "exits"):
        assert torch.equal(torch.cat([getattr(a, name) for a in alone]), getattr(first, name))


def test_no_answers_without_images(library: ctypes.CDLL) -> None:
    kernel, x, thresholds, _ = free("learned", HALF, library)
    assert kernel(x[:0], thresholds).fault is None


def test_the_comparison_is_strict(library: ctypes.CDLL) -> None:
    net = small(1, 10, (3, 16, 16), "pool", 20)
    x, kernel = images(1, net.input_shape, 20), Kernel(library, net)
    confidence = kernel(x, forced(net, 0)).confidence[0]
    for at, exit_index in ((confidence, 2), (confidence.nextafter(torch.tensor(-1.0)), 0)):
        limits = never(net)
        limits[0] = at
        assert kernel(x, limits).exits.tolist() == [exit_index]


def test_not_a_number_stays_to_the_end(library: ctypes.CDLL) -> None:
    net = small(1, 10, (3, 16, 16), "pool", 21)
    kernel, x = Kernel(library, net), images(4, net.input_shape, 21)
    x[1, 0, 7, 7] = torch.nan
    limits = torch.full((2,), -1.0)
    got = kernel(x, limits)
    assert got.exits.tolist() == [0, 2, 0, 0]
    assert got.logits[1].isnan().all()
    check(got, expected(net, exits_of(kernel.lowered, x, HALF), limits), HALF)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, BFLOAT, torch.uint8])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_images_of_every_kind(library: ctypes.CDLL, dtype: torch.dtype, layout: str) -> None:
    net = small(1, 10, (3, 14, 11), "pool", 22)
    kernel = Kernel(library, net)
    x, norm = images(2, (3, 14, 11), 22), None
    if dtype == torch.uint8:
        x = (x.clamp(-2, 2) * 50 + 100).byte()
        norm = torch.tensor([[0.01, 0.02, 0.03], [-1.0, -2.0, 0.5]])
    x = x.to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "cropped":
        x = F.pad(x, (2, 3, 1, 1))[:, :, 1:15, 2:13]
    same = x.float() if norm is None else x.float() * norm[0, :, None, None] + norm[1, :, None, None]
    limits = never(net)
    check(kernel(x, limits, norm=norm), expected(net, exits_of(kernel.lowered, same, HALF), limits), HALF)


def of_rule(outputs: Tensor, rule: Rule, limits: Tensor, near: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, number, exit by the formula in float64; which images are farther than `near` from every limit."""
    logits, number, _ = map(torch.from_numpy, in_float64(outputs, rule))
    found = (number[:-1] > limits[:, None]).long()
    exits = torch.where(found.any(0), found.argmax(0), len(limits))
    best = logits.topk(2).values
    sure = (number[:-1] - limits[:, None]).abs() > near
    if any(row[7] for row in rule.rows):
        sure = sure & (best[..., 0] - best[..., 1] > near).all(0)
    everyone = torch.arange(len(exits))
    return logits[exits, everyone], number[exits, everyone], exits, sure.all(0)


RULES = {case.name: case.rule for case in cases(3)} | {f"table {seed}": random_rule(3, seed) for seed in (6, 9)}


def carrying(library: ctypes.CDLL, rule: Rule, count: int, dtype: torch.dtype) -> tuple[Kernel, Tensor, Tensor, Tensor]:
    """A kernel, images, what its exits say of them, thresholds by which a third exits at every exit."""
    net = small(1, 10, (3, 8, 8), "pool", 11)
    kernel, x = Kernel(library, net, dtype), images(count, net.input_shape, 12)
    outputs = torch.stack([torch.cat([a, b[:, None]], 1) for a, b in exits_of(kernel.lowered, x, dtype)], 1)
    return kernel, x, outputs, torch.tensor([1.5, 1.5] if rule.name == "patience" else spread(outputs, rule))


SLOW = ("carried", "fitted", "table 9")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RULES]
)
def test_rules_by_their_formula(library: ctypes.CDLL, name: str) -> None:
    """One block answers 14 images, so that each finds what the one before has left."""
    rule = RULES[name]
    kernel, x, outputs, limits = carrying(library, rule, 14, HALF)
    allowed = max(1.0, float(outputs.abs().max())) * 4 * torch.finfo(HALF).eps
    logits, number, exits, sure = of_rule(outputs, rule, limits, allowed)
    got = kernel(x, limits, grid=1, order=1, rule=rule.table())
    assert got.fault is None
    assert int(sure.sum()) >= 4
    assert torch.equal(got.exits[sure], exits[sure])
    assert len(exits[sure].unique()) > 1
    torch.testing.assert_close(got.logits[sure].double(), logits[sure], rtol=0, atol=allowed)
    torch.testing.assert_close(got.confidence[sure].double(), number[sure], rtol=0, atol=3 * allowed)


ONE_COLUMN = [
    pytest.param(
        name, dtype, marks=[] if (name, dtype) in (("entropy", HALF), ("margin", BFLOAT)) else pytest.mark.slow
    )
    for name in CRITERIA
    for dtype in (HALF, BFLOAT)
]


@pytest.mark.parametrize(("criterion", "dtype"), ONE_COLUMN)
def test_one_column_is_the_criterion_of_that_name(library: ctypes.CDLL, criterion: str, dtype: torch.dtype) -> None:
    rule, sign = rules.stateless(criterion, 2), -1 if criterion == "entropy" else 1
    kernel, x, _, limits = carrying(library, rule, 4, dtype)
    x[2] = torch.nan
    named = Kernel(library, kernel.net.with_criterion(criterion).eval(), dtype)(x, sign * limits)
    found = kernel(x, limits, rule=rule.table())
    assert replace(found, confidence=sign * found.confidence).same_bits(named)


def test_rules_in_any_order_with_any_number_of_blocks(library: ctypes.CDLL) -> None:
    rule = RULES["vote"]
    kernel, x, _, limits = carrying(library, rule, 5, HALF)
    first = kernel(x, limits, rule=rule.table())
    for grid, order in ((1, 1), (12, 3)):
        assert kernel(x, limits, grid, order, rule=rule.table()).same_bits(first)


def test_rules_and_images_with_a_nan(library: ctypes.CDLL) -> None:
    """Such an image goes to the end, unless its threshold is NaN, and changes nothing for the next one."""
    rule = RULES["vote"]
    kernel, x, _, limits = carrying(library, rule, 9, HALF)
    good = kernel(x, limits, grid=1, rule=rule.table())
    x[2], x[5] = torch.nan, torch.nan
    of_each = limits[:, None].repeat(1, 9)
    of_each[1, 5] = torch.nan
    got, others = kernel(x, of_each, grid=1, rule=rule.table()), [0, 1, 3, 4, 6, 7, 8]
    assert got.exits[[2, 5]].tolist() == [2, 1]
    assert got.confidence[[2, 5]].isnan().all()
    for a, b in ((got.logits, good.logits), (got.confidence, good.confidence), (got.exits, good.exits)):
        assert torch.equal(a[others], b[others])


def barriers() -> list[int]:
    source = (Path(__file__).parents[2] / "csrc" / "cuda" / "resident.cuh").read_text().splitlines()
    return [number for number, line in enumerate(source, 1) if "__syncthreads();" in line]


@pytest.mark.parametrize("line", barriers())
def test_every_barrier_is_needed(library: ctypes.CDLL, line: int) -> None:
    """These tests can fail: without this barrier some order of threads changes an answer."""
    net = small(1, 10, (3, 32, 32), "pool", 30)
    kernel, x = Kernel(library, net), images(4, net.input_shape, 30)
    spread_thresholds(net, x, 0.4)
    good = kernel(x, net.thresholds)
    assert any(not kernel(x, net.thresholds, 1, order, line).same_bits(good) for order in range(1, 9))


REFUSED = {
    "classes": (lambda: small(1, 300, (3, 8, 8), "pool", 0), r"num_classes = 300; on CUDA expected at most 256"),
    "large images": (lambda: small(1, 10, (3, 33, 8), "pool", 0), r"images of 3×33×8; on CUDA expected at most 8×32"),
    "plain head": (
        lambda: lived_in(zoo.eenet("eenet20", 1, [1], "plain", input_shape=(3, 8, 8)), 0),
        r"steps\[3\] = .*: on CUDA exits take the mean of a map",
    ),
    "wide maps": (
        lambda: lived_in(zoo.eenet("eenet8", 2, filters=32, input_shape=(1, 8, 8)), 0),
        r"on CUDA a map has at most 64 channels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_refuses(name: str) -> None:
    make, message = REFUSED[name]
    net = make()
    p = cuda_program(lower(net), HALF, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=message):
        ops.resident_network(
            images(1, net.input_shape), p.steps, p.maps, p.groups, p.packed, net.thresholds, "learned",
            net.num_classes, False,
        )  # fmt: skip
