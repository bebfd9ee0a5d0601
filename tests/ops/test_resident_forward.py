"""`eefast::resident_forward` in C++ against float64 networks; answers depend on the sample and nothing else."""

from __future__ import annotations

import copy
import math
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from exit_cases import CRITERIA, LAYOUTS, expected_confidence, layout
from networks import images, lived_in
from resident_calls import lowered, network, op, tables, victim
from torch import Tensor, nn

import eefast
from eefast import ops, zoo
from eefast.checkpoint.loading import load
from eefast.data.mnist import mnist_test
from eefast.ops.resident_forward import reference as reference_op
from eefast.ops.resident_steps import COLUMNS
from eefast.planning.folding import fold_stage

needs_cpp = pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")

needs_bfloat16 = pytest.mark.skipif(
    ops.instruction_set() != "avx512_bf16", reason=f"no AVX512-BF16, but {ops.instruction_set()}"
)

ALGORITHMS = (0, 2, 4)
TOLERANCE = {0: 1e-5, 2: 5e-5, 4: 5e-5}
"""Largest difference of logits ÷ largest logit, for direct convolution and for Winograd's tiles of 2 and 4."""
MARGIN = 1e-5
HELPERS = str(Path(__file__).parents[1] / "helpers")
SHIPPED = Path(eefast.__file__).parent / "assets" / "eenet-mnist"


def run(
    net: eefast.EarlyExitNet, x: Tensor, program: tuple[Tensor, ...], threads: int = 1, limits: Tensor | None = None,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    limits = net.thresholds if limits is None else limits
    return ops.resident_forward.run(x, *program, limits, net.criterion.name, net.num_classes, bfloat16, threads)


def forced(net: eefast.EarlyExitNet, exit_index: int) -> Tensor:
    """Thresholds at which every sample exits at one exit."""
    always, never = (-1.0, 2.0) if net.criterion.comparison == ">" else (math.inf, -1.0)
    return torch.tensor([always if i == exit_index else never for i in range(net.num_exits)])


def everywhere(net: eefast.EarlyExitNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [exits, N, K] and confidences [exits, N] of all exits, in float64."""
    with torch.no_grad():
        outputs = copy.deepcopy(net).double().all_exits(x.double())
    rows = [torch.cat([out.logits, out.confidence_logit[:, None].double()], 1) for out in outputs]
    values = [[expected_confidence(row, net.criterion.name) for row in out.numpy()] for out in rows]
    return torch.stack(rows)[..., :-1], torch.tensor(values, dtype=torch.float64)


def first_exits(net: eefast.EarlyExitNet, values: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """The exit that each sample takes by `values` [exits, N], and whether a confidence on the way is at the edge."""
    above = net.criterion.comparison == ">"
    exits, edge = [], []
    for row in values.T.tolist():
        leaves = [v > t if above else v < t for v, t in zip(row, limits.tolist(), strict=False)] + [True]
        exits.append(leaves.index(True))
        edge.append(any(abs(v - t) < MARGIN for v, t in zip(row[: exits[-1] + 1], limits.tolist(), strict=False)))
    return torch.tensor(exits), torch.tensor(edge)


def check(
    net: eefast.EarlyExitNet, found: tuple[Tensor, ...], exact: tuple[Tensor, Tensor], limits: Tensor, tolerance: float
) -> None:
    """Exits equal except next to a threshold, where few may be; logits and confidence of the exit taken exact."""
    logits, confidence, exits = found
    wanted, edge = first_exits(net, exact[1], limits)
    assert int(edge.sum()) <= len(edge) // 50
    assert torch.equal(exits[~edge], wanted[~edge])
    samples = torch.arange(len(exits))
    assert (logits - exact[0][exits, samples]).abs().max() <= tolerance * exact[0].abs().max()
    # The entropy changes log K times as fast as the logits do; the others no faster.
    slope = (math.log(net.num_classes) + 1) * float(exact[0].abs().max()) + 1
    assert (confidence - exact[1][exits, samples]).abs().max() <= tolerance * slope


# name, further arguments, early exits' share, images
NETWORKS = [
    ("eenet8", {"input_shape": (1, 28, 28)}, 0.4, 50),
    ("eenet8", {"input_shape": (3, 29, 31), "filters": 16, "num_classes": 1}, 0.4, 31),
    ("eenet8", {"input_shape": (3, 7, 5), "filters": 5, "num_classes": 1000}, 0.4, 31),
    ("eenet20", {"input_shape": (3, 32, 32), "head": "bnpool"}, 0.4, 16),
    ("eenet20", {"input_shape": (1, 28, 28), "head": "plain", "num_exits": 1}, 0.4, 16),
    ("eenet20", {"input_shape": (3, 7, 5), "head": "conv1", "placement": "linear", "num_classes": 1}, 0.4, 31),
    ("eenet20", {"input_shape": (3, 29, 29), "head": "conv2", "num_exits": 3, "placement": "linear"}, 0.3, 16),
    ("eenet20", {"input_shape": (2, 9, 14), "head": "conv3", "num_exits": 3, "placement": "linear"}, 0.3, 31),
    ("eenet20", {"input_shape": (3, 11, 18), "head": "strided3", "placement": (0, 2, 5)}, 0.3, 31),
    ("eenet20", {"input_shape": (3, 18, 11), "head": "deep2", "placement": (0, 4)}, 0.3, 31),
    ("eenet110", {"input_shape": (3, 32, 32), "num_exits": 8}, 0.1, 16),
    ("eenet18", {"input_shape": (3, 40, 40), "placement": "linear"}, 0.4, 5),
    ("eenet34", {"input_shape": (3, 64, 64), "num_classes": 1000, "placement": "linear"}, 0.4, 5),
    ("eenet50", {"input_shape": (3, 32, 32)}, 0.4, 5),
]
DEEPER = ("eenet110", "eenet34")
"""Networks of the same layers as others here, only more of them."""


def network_cases() -> Iterator[Any]:
    for name, arguments, *rest in NETWORKS:
        shape = "x".join(map(str, arguments["input_shape"]))
        marks = [pytest.mark.slow] if name in DEEPER else []
        yield pytest.param(name, arguments, *rest, marks=marks, id=f"{name}-{shape}")


@needs_cpp
@pytest.mark.parametrize(("name", "arguments", "share", "n"), list(network_cases()))
@pytest.mark.sampled(5)
def test_networks_match_float64(name: str, arguments: dict[str, Any], share: float, n: int) -> None:
    """Every exit of every network, then free exits; criteria, groups and threads take turns."""
    case = [a for _, a, *_ in NETWORKS].index(arguments)
    # With one class the other criteria always say the same.
    criterion = "learned" if arguments.get("num_classes") == 1 else CRITERIA[case % len(CRITERIA)]
    net, x = network(name, case, n, share, criterion, **arguments)
    exact = everywhere(net, x)
    assert len(first_exits(net, exact[1], net.thresholds)[0].unique()) > 1
    for algorithm in ALGORITHMS:
        lowered.cache_clear()  # the weights of EENet-50, packed for every algorithm, take gigabytes
        tables_ = tables(net, algorithm, 1 + (case + algorithm) % 4)
        for limits in (net.thresholds, *(forced(net, i) for i in range(net.num_exits + 1))):
            check(net, run(net, x, tables_, 1 + case % 3, limits), exact, limits, TOLERANCE[algorithm])


@needs_cpp
@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_match_float64(criterion: str) -> None:
    shape = (3, 12, 12)
    net, x = network("eenet20", 5, 257, 0.3, criterion, num_exits=3, placement="linear", input_shape=shape)
    exact = everywhere(net, x)
    assert len(first_exits(net, exact[1], net.thresholds)[0].unique()) == 4
    for algorithm in ALGORITHMS:
        check(net, run(net, x, tables(net, algorithm)), exact, net.thresholds, TOLERANCE[algorithm])


@needs_cpp
def test_trained_network_on_real_images() -> None:
    net = load(SHIPPED).eval()
    x = net.prepare(mnist_test()[0][:200])
    exact = everywhere(net, x)
    assert len(first_exits(net, exact[1], net.thresholds)[0].unique()) > 1
    for algorithm in ALGORITHMS:
        check(net, run(net, x, tables(net, algorithm, 4), 2), exact, net.thresholds, TOLERANCE[algorithm])


@pytest.mark.parametrize("head", ["pool", "plain", "conv1"])
def test_reference_matches_float64(head: str) -> None:
    net, x = network("eenet20", 2, 31, num_exits=1, head=head, input_shape=(3, 9, 11))
    found = reference_op(x, *tables(net), net.thresholds, net.criterion.name, net.num_classes)
    check(net, found, everywhere(net, x), net.thresholds, 1e-5)


def small_net(seed: int = 1, **arguments: Any) -> tuple[eefast.EarlyExitNet, Tensor]:
    return network("eenet20", seed, 257, **{"placement": "linear", "input_shape": (3, 13, 11), **arguments})


def assert_same_bits(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@needs_cpp
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_answer_depends_on_the_sample_only(algorithm: int) -> None:
    """Bitwise the same in any batch, at any place, with any number of threads, in any group, every time."""
    net, x = small_net()
    wanted = run(net, x, tables(net, algorithm))
    assert len(wanted[2].unique()) == 3
    for group, threads in zip((1, 2, 3, 4, 5, 6, 7, 8, 64, 8), (2, 3, 4, 5, 6, 7, 8, 1, 1, 4), strict=True):
        assert_same_bits(run(net, x, tables(net, algorithm, group), threads), wanted)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    for group in (1, 4):
        tables_ = tables(net, algorithm, group)
        assert_same_bits(run(net, x[order], tables_, 2), tuple(part[order] for part in wanted))
        for size, start, threads in product((0, 1, 3, 31), (0, 226), (1, 2, 8)):
            part = slice(start, start + size)
            assert_same_bits(run(net, x[part], tables_, threads), tuple(whole[part] for whole in wanted))
        assert_same_bits(run(net, x, tables_, 0), wanted)


@needs_cpp
def test_helpers_change_no_bit() -> None:
    """Few samples, large maps and more workers than samples: layers get divided in every way that there is."""
    net = lived_in(zoo.eenet("eenet18", 2, "linear", input_shape=(3, 64, 64)), 1)
    thin = lived_in(zoo.eenet("eenet20", 2, "linear", input_shape=(1, 70, 75)), 2)
    for net_, algorithm in product((net, thin), ALGORITHMS):
        x, tables_ = images(3, net_.input_shape), tables(net_, algorithm, 2)
        wanted = run(net_, x, tables_, 1, forced(net_, 2))
        for threads in (2, 3, 8):
            for _ in range(3):
                assert_same_bits(run(net_, x, tables_, threads, forced(net_, 2)), wanted)


@needs_cpp
@pytest.mark.parametrize("memory", LAYOUTS)
def test_layouts_change_no_bit(memory: str) -> None:
    net, x = small_net()
    tables_, x = tables(net, 4, 3), layout(x[:31], memory)
    wanted = run(net, x.contiguous(), tables_)
    assert_same_bits(run(net, x, tables_, 2), wanted)
    assert_same_bits(run(net, x[1::2].flip(0)[3:], tables_), tuple(w[1::2].flip(0)[3:] for w in wanted))


@needs_cpp
def test_networks_of_more_sizes_in_turn_than_a_thread_keeps_memory_for() -> None:
    cases = []
    for side in range(7, 16):
        net, x = small_net(input_shape=(1, side, 9))
        cases.append((net, x[:3], tables(net, 4, 2)))
    found = [[run(*case) for case in cases] for _ in range(2)]
    for first, second, (net, x, _) in zip(*found, cases, strict=True):
        assert_same_bits(first, second)
        with torch.no_grad():
            torch.testing.assert_close(first[0], net(x).logits, atol=1e-4, rtol=1e-4)


@needs_cpp
def test_threads_of_python_at_once() -> None:
    """Networks of the same and of other shapes take turns in the memory that workers keep."""
    cases = []
    for seed, arguments in ((1, {}), (2, {}), (3, {"input_shape": (1, 9, 9)}), (4, {"head": "conv1"})):
        net, x = small_net(seed, **arguments)
        cases.append((net, x[:31], tables(net, 4, 2), run(net, x[:31], tables(net, 4, 2))))
    wrong: list[BaseException] = []

    def answer(order: list[int]) -> None:
        try:
            for i in order * 4:
                net, x, tables_, wanted = cases[i]
                assert_same_bits(run(net, x, tables_, 1 + i % 3), wanted)
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=answer, args=(order,)) for order in ([0, 1, 2, 3], [3, 0, 2, 1], [2, 2, 0])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_cpp
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.sampled(4)
def test_non_finite_images(criterion: str, algorithm: int) -> None:
    """NaN compares false, so the sample goes to the final exit; its neighbours are unchanged."""
    net, x = small_net(criterion=criterion)
    tables_ = tables(net, algorithm, 4 + 4 * (CRITERIA.index(criterion) % 2))
    wanted = run(net, x, tables_)
    spoilt, rows = x.clone(), torch.tensor([0, 3, 4, 9, 17, 100, 256])
    spoilt[9, 0, 3:5], spoilt[17] = 3e38, -3e38
    spoilt[0, 2, 12, 10] = spoilt[100] = math.nan
    spoilt[3, 0, 0, 0], spoilt[4, 1, 6, 6], spoilt[256] = math.inf, -math.inf, math.inf
    found = run(net, spoilt, tables_, 2)
    others = torch.ones(257, dtype=torch.bool).index_fill(0, rows, False)
    assert_same_bits(tuple(part[others] for part in found), tuple(part[others] for part in wanted))
    for row in (0, 100):
        assert found[2][row] == 2
        assert found[0][row].isnan().all()
        assert found[1][row].isnan()
    assert set(found[2][rows].tolist()) <= {0, 1, 2}
    # Samples that exited early had a confidence to do so.
    assert not found[1][found[2] < 2].isnan().any()
    assert_same_bits(run(net, x, tables_), wanted)


class Joined(nn.Module):
    """Maps of which the last ones have the channels of two that were concatenated, so that they may share memory."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.added = nn.Conv2d(8, channels - 8, 1)
        self.first, self.second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.last = nn.Conv2d(channels, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.added(x)], 1)
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


@needs_cpp
@pytest.mark.parametrize("bfloat16", [False, pytest.param(True, marks=needs_bfloat16)])
@pytest.mark.parametrize("channels", [15, 16, 17, 18, 33])
def test_a_spoilt_image_leaves_later_ones_as_they_were(channels: int, bfloat16: bool) -> None:
    """bfloat16 is multiplied by pairs of channels, of which the last may lie after the map's."""
    shape = (3, 4, 5)
    stages = [nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), Joined(channels)]
    heads = [eefast.heads.ExitHead("pool", (8, 4, 5), 5, shape) for _ in stages]
    net = lived_in(eefast.EarlyExitNet(stages, heads, input_shape=shape, criterion="max_probability"), 1)
    net.thresholds.fill_(2.0)
    arguments, x = tables(net, 0, 1, bfloat16), images(3, shape)

    def logits(x: Tensor) -> Tensor:
        return op(x, *arguments, net.thresholds, "max_probability", 5, bfloat16, 1, None)[0]

    before = logits(x)
    spoilt = x.clone()
    spoilt[1, 0, 0, 0] = math.inf
    found = logits(spoilt)
    assert not found[1].isfinite().all()
    assert torch.equal(found[::2], before[::2])
    assert torch.equal(logits(x), before)


@needs_cpp
def test_infinite_pixels_as_in_pytorch() -> None:
    """Channels that only fill a block must not turn ∞ into NaN: 0 · ∞ stays out of the answer."""
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 9, 9), filters=3), 4)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.abs_()
    x = images(3, net.input_shape)
    x[1, 0, 4, 4] = math.inf
    found = run(net, x, tables(net), 1, forced(net, 0))
    assert_same_bits((found[0][1], found[1][1]), (torch.full((10,), math.inf), torch.tensor(1.0)))


@needs_cpp
def test_seconds_are_added() -> None:
    net, x = small_net()
    tables_ = tables(net)
    seconds = torch.zeros(len(tables_[2]), dtype=torch.float64)
    arguments = (net.criterion.name, net.num_classes, False, 1, seconds)
    assert_same_bits(ops.resident_forward.run(x, *tables_, net.thresholds, *arguments), run(net, x, tables_))
    first = seconds.clone()
    assert (first > 0).all()
    ops.resident_forward.run(x, *tables_, net.thresholds, *arguments)
    assert (seconds > first).all()


# Instruction sets


def test_instruction_set_is_the_best_allowed() -> None:
    wanted, found = os.environ.get("EEFAST_ISA"), ops.instruction_set()
    if ops.CPP_MISSING:
        assert found == "none"
    elif wanted:
        assert found == {"avx_vnni": "avx2", "avx512_vnni": "avx512"}.get(wanted, wanted)
    elif sys.platform == "linux" and platform.machine() == "x86_64" and "ATEN_CPU_CAPABILITY" not in os.environ:
        flags = Path("/proc/cpuinfo").read_text().split()
        names = {"avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"}
        assert found == next((name for flag, name in names.items() if flag in flags), "portable")


@pytest.mark.slow
def test_without_cpp() -> None:
    code = "from test_resident_forward import *; test_reference_matches_float64('pool'); net, x = small_net();"
    code += "check(net, run(net, x, tables(net)), everywhere(net, x), net.thresholds, 1e-5);"
    found = subprocess.run(
        [sys.executable, "-c", code + "print(ops.instruction_set())"],
        env={**os.environ, "PYTHONPATH": HELPERS, "EEFAST_USE_CPP": "0"},
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert found.stdout == "none\n", found.stderr


@needs_bfloat16
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("eenet20", {"input_shape": (3, 32, 32)}),
        ("eenet8", {"input_shape": (1, 29, 31), "filters": 5}),
        ("eenet18", {"input_shape": (3, 40, 40), "placement": "linear"}),
        ("eenet20", {"input_shape": (3, 9, 9), "head": "conv1"}),
    ],
    ids=["wide", "narrow", "linear", "conv1"],
)
def test_bfloat16(name: str, arguments: dict[str, Any]) -> None:
    """Within twice the error of eager PyTorch in bfloat16; samples with another exit are that close to a threshold."""
    net, x = network(name, 1, 40, **arguments)
    logits, values = everywhere(net, x)
    eager, y = [], x.bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for stage, head in zip(net.stages, net.heads, strict=True):
            y = fold_stage(stage, torch.bfloat16)[0](y)
            eager.append(copy.deepcopy(head).bfloat16()(y))
    tables_, worst = tables(net, 0, 2, bfloat16=True), 0.0
    for i, out in enumerate(eager):
        found = run(net, x, tables_, 2, forced(net, i), bfloat16=True)
        assert (found[2] == i).all()
        bound = 2 * float((out.logits - logits[i]).abs().max())
        assert (found[0] - logits[i]).abs().max() <= bound
        error = float((found[1] - values[i]).abs().max())
        assert error <= 2 * float((out.confidence - values[i]).abs().max())
        worst = max(worst, error)
    found = run(net, x, tables_, 2, bfloat16=True)
    exits = first_exits(net, values, net.thresholds)[0]
    flips = found[2] != exits
    near = ((values[:-1] - net.thresholds[:, None]).abs() <= worst).any(0)
    assert not (flips & ~near).any()
    assert int(flips.sum()) <= 4
    assert_same_bits(run(net, x, tables(net, 0, 3, bfloat16=True), 4, bfloat16=True), found)


# As an op of PyTorch


@pytest.mark.parametrize("n", [0, 5])
def test_opcheck(n: int) -> None:
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 9, 9)), 1)
    tables_ = tables(net)
    for seconds in (None, torch.zeros(len(tables_[2]), dtype=torch.float64)):
        x = images(5, net.input_shape)[:n]
        torch.library.opcheck(op, (x, *tables_, net.thresholds, "learned", 10, False, 1, seconds))


def test_compiles_and_exports_as_one_node() -> None:
    net, x = small_net()
    x = x[:5]
    tables_ = tables(net)

    class Network(nn.Module):
        def forward(self, x: Tensor, thresholds: Tensor) -> tuple[Tensor, ...]:
            return ops.resident_forward.run(x, *tables_, thresholds, "learned", 10)

    wanted = Network()(x, net.thresholds)
    exported = torch.export.export(Network(), (x, net.thresholds))
    assert [n.target for n in exported.graph.nodes if n.op == "call_function" and "getitem" not in n.name] == [op]
    assert_same_bits(torch.compile(Network(), fullgraph=True, backend="aot_eager")(x, net.thresholds), wanted)


def test_gradients_are_refused() -> None:
    net, x = small_net()
    x = x[:3].requires_grad_()
    with pytest.raises(ValueError, match=r"images requires grad.*torch\.no_grad"):
        run(net, x, tables(net))
    with torch.no_grad():
        run(net, x, tables(net))


# What does not fit


def spoilt(change: dict[str, Any]) -> dict[str, Any]:
    """The victim's arguments with others in their place; (row, column, value) changes one entry of a table."""
    arguments = victim()
    for name, value in change.items():
        if isinstance(value, tuple):
            *place, value = value
            if name == "steps":
                place[1] = COLUMNS.index(place[1])
            arguments[name][tuple(place)] = value
        else:
            arguments[name] = value
    return arguments


def rows(*order: int) -> dict[str, Any]:
    return {"steps": victim()["steps"][list(order)]}


def other_residual() -> dict[str, Any]:
    """A residual of 23 channels for 24."""
    steps, maps = victim()["steps"], victim()["maps"]
    steps[6, COLUMNS.index("target")] = steps[7, COLUMNS.index("residual")] = len(maps)
    return {"steps": steps, "maps": torch.cat([maps, torch.tensor([[23, 2]])])}


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def at_odd_address(n: int) -> Tensor:
    return torch.frombuffer(bytearray(4 * n + 1), dtype=torch.float32, offset=1)


def padded(n: int, channels: int = 16) -> dict[str, Any]:
    """Poolings, each of which makes a map larger by 129 pixels: their products would exceed 64 bits."""
    steps = [[0, 0, 1, -1, 0, 3, 1, 1, 0, 0, 0, 0, 1, 0, 0]]
    steps += [[2, 1 + i, 2 + i, -1, 0, 128, 1, 128, 0, 0, 0, 0, 1, 0, 0] for i in range(n)]
    steps += [[3, n + 1, 1, -1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0]]
    maps = [[3, -1], *([[channels, 0]] * (n + 1))]
    return {"steps": torch.tensor(steps), "maps": torch.tensor(maps), "groups": torch.tensor([64])}


WRONG = {
    "images rank": ({"images": torch.zeros(5, 3, 8)}, r"images has shape \[5, 3, 8\]; expected \[N, C, H, W\]"),
    "images channels": ({"images": torch.zeros(5, 4, 8, 8)}, r"images has 4 channels; expected 3"),
    "images dtype": ({"images": torch.zeros(5, 3, 8, 8).double()}, r"images is .*\.to\(torch\.float32\)"),
    "images too small": ({"images": torch.zeros(5, 3, 1, 8)}, r"images of 1×8 are too small for the network"),
    "images empty": ({"images": torch.zeros(5, 3, 8, 0)}, r"images of 8×0 are too small for the network"),
    "images huge": ({"images": torch.zeros(1).expand(1, 3, 2**15, 8)}, r"images has shape .*at most 16384 rows"),
    "steps columns": ({"steps": torch.zeros(3, 11).long()}, r"steps has shape \[3, 11\]; expected \[S, 15\]"),
    "steps none": ({"steps": torch.zeros(0, 15).long()}, r"steps has shape \[0, 15\]"),
    "steps dtype": ({"steps": torch.zeros(3, 15)}, r"steps is .*\.to\(torch\.int64\)"),
    "steps strides": ({"steps": torch.zeros(15, 3).long().T}, r"steps is not contiguous; call \.contiguous\(\)"),
    "maps columns": ({"maps": torch.zeros(3, 3).long()}, r"maps has shape \[3, 3\]; expected \[M, 2\]"),
    "maps dtype": ({"maps": torch.zeros(3, 2).int()}, r"maps is .*\.to\(torch\.int64\)"),
    "maps channels": ({"maps": (2, 0, 0)}, r"maps\[2\] = \[0, 0\]; expected channels and a section"),
    "maps channels huge": ({"maps": (2, 0, 2**62)}, r"maps\[2\] = .*; expected channels and a section"),
    "maps section": ({"maps": (2, 1, 3)}, r"maps\[2\] = \[20, 3\]"),
    "maps image": ({"maps": (0, 1, 0)}, r"maps\[0\] = \[3, 0\]; .* the image first"),
    "groups rank": ({"groups": torch.ones(1, 3).long()}, r"groups has shape \[1, 3\]; expected \[sections\]"),
    "groups none": ({"groups": torch.ones(0).long()}, r"groups has shape \[0\]"),
    "groups zero": ({"groups": (1, 0)}, r"groups has 0; expected 1 … 64"),
    "groups many": ({"groups": (1, 65)}, r"groups has 65; expected 1 … 64"),
    "packed short": ({"packed": torch.zeros(16)}, r"steps\[0\] = .*: its weights are outside of packed"),
    "packed dtype": ({"packed": torch.zeros(43392).half()}, r"packed is .*\.to\(torch\.float32\)"),
    "packed strides": ({"packed": torch.zeros(43392, 2)[:, 0]}, r"packed has shape .* and strides \[2\]; expected one"),
    "thresholds rank": ({"thresholds": torch.tensor(0.5)}, r"thresholds has shape \[\]; expected \[exits\]"),
    "thresholds dtype": ({"thresholds": torch.zeros(1).double()}, r"thresholds is .*\.to\(torch\.float32\)"),
    "thresholds count": ({"thresholds": torch.zeros(2)}, r"steps\[10\] = .*: there is no such map or exit"),
    "criterion": ({"criterion": "best"}, r"criterion='best' is unknown; choose one of learned, max_probability"),
    "num_classes": ({"num_classes": 0}, r"num_classes = 0; expected 1 …"),
    "num_classes huge": ({"num_classes": 2**62}, r"num_classes = .*; expected 1 …"),
    "threads": ({"threads": -1}, r"threads = -1; expected 0 …"),
    "threads huge": ({"threads": 2**40}, r"threads = .*; expected 0 …"),
    "seconds dtype": ({"seconds": torch.zeros(3), "threads": 1}, r"seconds is .*\.to\(torch\.float64\)"),
    "seconds shape": ({"seconds": torch.zeros(2).double(), "threads": 1}, r"seconds has shape \[2\]; expected"),
    "seconds threads": ({"seconds": torch.zeros(3).double()}, r"seconds are counted with threads=1 only"),
    "kind": ({"steps": (0, "kind", 9)}, r"steps\[0\] = \[9, 0, 1, -1, .*\]: there is no such kind of step"),
    "load of a map": ({"steps": (8, "kind", 7)}, r"steps\[8\] = .*: it (is not the first step|writes over|has no)"),
    "store": ({"steps": (8, "kind", 8)}, r"steps\[8\] = .*: there is no such map"),
    "row": ({"steps": (1, "row", 2)}, r"steps\[1\] = .*: only windows are one row high"),
    "row of an exit": ({"steps": (3, "row", 1)}, r"steps\[3\] = .*: only windows are one row high"),
    "activation": ({"steps": (0, "activation", 8)}, r"steps\[0\] = .*: there is no such activation"),
    "activation of a pooling": ({"steps": (8, "activation", 1)}, r"steps\[8\] = .*: it has no activation"),
    "channel groups": ({"steps": (1, "groups", 3)}, r"steps\[1\] = .*: its channels are no multiple of its groups"),
    "channel groups none": ({"steps": (1, "groups", 0)}, r"steps\[1\] = .*: its channels are no multiple of"),
    "product of nothing": ({"steps": (4, "kind", 5)}, r"steps\[4\] = .*: there is no such map"),
    "joined over itself": ({"steps": (4, "kind", 6)}, r"steps\[4\] = .*: it (writes over what it reads|has no act)"),
    "source": ({"steps": (1, "source", 7)}, r"steps\[1\] = .*: there is no such map"),
    "source unwritten": ({"steps": (1, "source", 2)}, r"steps\[1\] = .*: it reads a map before it is written"),
    "source image": ({"steps": (4, "source", 0)}, r"steps\[4\] = .*: there is no such map"),
    "source target": ({"steps": (1, "target", 1)}, r"steps\[1\] = .*: it writes over what it reads"),
    "target": ({"steps": (1, "target", -1)}, r"steps\[1\] = .*: there is no such map"),
    "target exit": ({"steps": (3, "target", 1)}, r"steps\[3\] = .*: there is no such map or exit"),
    "target channels": ({"steps": (2, "target", 5)}, r"steps\[2\] = .*: its maps are of other sections"),
    "residual": ({"steps": (7, "residual", 9)}, r"steps\[7\] = .*: there is no such map"),
    "residual section": ({"steps": (7, "residual", 3)}, r"steps\[7\] = .*: its maps are of other sections"),
    "residual of an exit": ({"steps": (3, "residual", 4)}, r"steps\[3\] = .*: there is no such map"),
    "residual shape": (other_residual(), r"steps\[7\] = .*: its residual has another shape"),
    "kernel": ({"steps": (0, "kernel", 0)}, r"steps\[0\] = .*: there is no kernel for this window"),
    "stride": ({"steps": (0, "stride", 3)}, r"steps\[0\] = .*: there is no kernel for this window"),
    "padding": ({"steps": (0, "padding", 4)}, r"steps\[0\] = .*: there is no kernel for this window"),
    "winograd strided": ({"steps": (5, "winograd", 2)}, r"steps\[5\] = .*: Winograd is for float32 3×3"),
    "winograd image": ({"steps": (0, "winograd", 2)}, r"steps\[0\] = .*: Winograd is for"),
    "winograd side": ({"steps": (1, "winograd", 3)}, r"steps\[1\] = .*: Winograd is for .* tiles of 2 or 4"),
    "winograd pool": ({"steps": (8, "winograd", 2)}, r"steps\[8\] = .*: Winograd is for"),
    "packed place": ({"steps": (0, "packed", -1)}, r"steps\[0\] = .*: its weights are outside of packed"),
    "packed beyond": ({"steps": (10, "packed", 43392)}, r"steps\[10\] = .*: its weights are outside of packed"),
    "packed None": ({"packed": None}, r"packed is None; expected a tensor"),
    "packed freed": ({"packed": freed(torch.zeros(43392))}, r"packed needs 173568 bytes of its storage, which has 0"),
    "packed meta": ({"packed": torch.zeros(43392, device="meta")}, r"packed is on meta; move it to cpu"),
    "packed address": ({"packed": at_odd_address(43392)}, r"packed starts at an address that its elements cannot have"),
    "steps sparse": ({"steps": torch.ones(11, 15).long().to_sparse()}, r"steps (is sparse|has the layout).*\.to_dense"),
    "groups too many": ({"groups": torch.ones(257).long()}, r"groups has shape \[257\]; .* at most 256"),
    "padded steps": (padded(300), r"images of 8×8 make maps that are too large for any memory"),
    "maps too many": (padded(200, 2**15), r"images of 8×8 make maps that are too large for any memory"),
    "packed overflow": ({"steps": (10, "packed", 2**63 - 1)}, r"steps\[10\] = .*: its weights are outside of packed"),
    "section": ({"steps": (9, "section", 3)}, r"steps\[9\] = .*: there is no such section"),
    "section other": ({"steps": (8, "section", 1)}, r"steps\[8\] = .*: its maps are of other sections"),
    "order": (rows(0, 1, 2, 4, 3, 7, 5, 6, 8, 9, 10), r"steps\[5\] = .*: it reads a map before it is written"),
    "order of sections": (rows(0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10), r"steps\[4\] = .*: it reads a map before it is"),
    "entry after body": (rows(0, 1, 2, 3, 4, 5, 6, 7, 6, 8, 9, 10), r"steps\[8\] = .*: it comes after steps of a"),
    "no final exit": (rows(*range(10)), r"steps ends with no final exit"),
}  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong: str) -> None:
    """The message names the argument, its value and what is wrong."""
    change, message = WRONG[wrong]
    with pytest.raises(RuntimeError, match=message):
        op(*spoilt(change).values())


@needs_cpp
def test_bfloat16_needs_its_instructions() -> None:
    if ops.instruction_set() == "avx512_bf16":
        with pytest.raises(RuntimeError, match=r"steps\[1\] = .*: Winograd is for float32"):
            op(*spoilt({"bfloat16": True}).values())
    else:
        with pytest.raises(RuntimeError, match=r"bfloat16 needs AVX512-BF16.*use float32"):
            op(*spoilt({"bfloat16": True}).values())


@needs_cpp
@pytest.mark.parametrize(("of_the_cpu", "rounds"), [(False, 800), (True, 300)])
def test_any_table_raises_or_answers(of_the_cpu: bool, rounds: int) -> None:
    """Single entries changed at random: never a crash (see `make sanitize`), never a sample without an exit."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    untouched = op(*victim(of_the_cpu).values())
    values = (*range(-2, 9), 15, 16, 17, 64, 1000, 2**31, 2**32 + 1, 2**62, 2**63 - 1, -(2**63))
    answered = 0
    for _ in range(rounds):
        name = ("steps", "steps", "steps", "steps", "maps", "groups")[draw(6)]
        arguments = victim(of_the_cpu)
        table = arguments[name].view(-1)
        i = draw(len(table))
        table[i] = values[draw(len(values))] if draw(2) else int(table[i]) + draw(3) - 1
        try:
            logits, confidence, exits = op(*arguments.values())
        except RuntimeError:
            continue
        answered += 1
        assert logits.shape == (5, 7)
        assert confidence.shape == (5,)
        assert set(exits.tolist()) <= {0, 1}
    assert rounds / 16 < answered < rounds * 7 / 8
    assert_same_bits(op(*victim(of_the_cpu).values()), untouched)
