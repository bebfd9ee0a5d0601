"""`eefast::exit_conv_head` in Triton and in Python against a float64 convolution and what `exit_cases` makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from exit_cases import (
    CRITERIA,
    LAYOUTS,
    Case,
    assert_same_bits,
    check,
    cuda_arguments,
    dtypes_and_shapes,
    eager,
    gap,
    launched,
    layout,
    make_case,
    on_gpu,
    without_waiting,
)  # fmt: skip
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from where import GPU, interpreted, run_by_triton, runs_triton

from eefast import ops

module = ops.exit_conv_head
op = torch.ops.eefast.exit_conv_head.default

triton = pytest.param(on_gpu(op) if GPU else module.run_triton, id="triton", marks=runs_triton)
every = pytest.mark.parametrize("run", [pytest.param(op, id="dispatched = reference"), triton])

# (R, K, C_in, C, H, W): tiles of one sample and of several, pixels and channels in one block and in several, odd sizes.
SHAPES = {
    "cifar stage 3": (5, 10, 64, 64, 8, 8),
    "cifar stage 1": (3, 10, 16, 16, 32, 32),
    "odd": (7, 7, 19, 21, 7, 5),
    "one pixel": (33, 10, 16, 16, 1, 1),
    "one line": (5, 3, 4, 4, 1, 9),
    "few channels": (5, 10, 2, 3, 13, 11),
    "imagenet": (3, 1000, 40, 136, 4, 4),
    "no rows": (0, 10, 16, 16, 4, 4),
}


@dataclass(frozen=True)
class ConvCase:
    """A convolution, and the case that begins with its output in float64."""

    features: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    exit: Case

    def arguments(self) -> tuple[Any, ...]:
        return (self.features, self.conv_weight, self.conv_bias, *self.exit.arguments()[1:])


def make_conv_case(
    r: int, k: int, c_in: int, c: int, h: int, w: int, *, dtype: torch.dtype = torch.float32,
    memory: str = "channels_last", seed: int = 0, **more: Any,
) -> ConvCase:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    case = make_case(r, k, c, h, w, seed=seed, **more)
    features = layout(torch.randn(r + 3, c_in, h, w, generator=g).to(dtype), memory)
    conv_weight = (torch.randn(c, c_in, 3, 3, generator=g) * (2 / (9 * c_in)) ** 0.5).to(dtype)
    conv_bias = torch.randn(c, generator=g) * 0.1
    maps = F.relu(F.conv2d(features.double(), conv_weight.double(), conv_bias.double(), padding=1))
    exit_case = replace(case, features=maps)
    if exit_case.threshold is not None:
        exit_case = replace(exit_case, threshold=torch.tensor(gap(exit_case)))
    return ConvCase(features, conv_weight, conv_bias, exit_case)


def check_conv(run: Any, case: ConvCase) -> None:
    def run_exit(_: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return run(case.features, case.conv_weight, case.conv_bias, *rest)

    def plain(exit_case: Case) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if case.features.dtype == torch.float64 else case.features.dtype
        conv = F.conv2d(case.features.to(dtype), case.conv_weight.to(dtype), case.conv_bias.to(dtype), padding=1)
        return eager(replace(exit_case, features=F.relu(conv)))

    check(run_exit, case.exit, plain=plain)


@every
@pytest.mark.parametrize("live", ["part", "all", "none"])
@dtypes_and_shapes(SHAPES, ("cifar stage 3", "odd"))
@pytest.mark.sampled(22)
def test_shapes_match_float64(run: Any, dtype: torch.dtype, shape: tuple[int, ...], live: str) -> None:
    i = list(SHAPES.values()).index(shape)
    criterion = CRITERIA[i % len(CRITERIA)]
    check_conv(run, make_conv_case(*shape, dtype=dtype, criterion=criterion, live=live, final=i % 3 == 0))


@every
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.sampled(12)
def test_layouts_match_float64(run: Any, memory: str, criterion: str) -> None:
    check_conv(run, make_conv_case(5, 10, 6, 5, 7, 5, memory=memory, criterion=criterion, live="part"))


@every
def test_nan_stays_nan_and_survives(run: Any) -> None:
    """A ReLU that takes NaN for 0 would let its sample exit."""
    case = make_conv_case(7, 10, 16, 16, 4, 4)
    row = int(case.exit.rows[2])
    case.features[row, 3, 2, 1] = torch.nan
    maps = F.relu(F.conv2d(case.features.double(), case.conv_weight.double(), case.conv_bias.double(), padding=1))
    assert maps[row].isnan().any()
    check_conv(run, replace(case, exit=replace(case.exit, features=maps)))


@pytest.mark.parametrize("run", [triton])
@pytest.mark.parametrize("shape", [SHAPES["cifar stage 3"], SHAPES["one pixel"], SHAPES["imagenet"]])
@pytest.mark.sampled(1)
def test_answer_depends_on_the_sample_only(run: Any, shape: tuple[int, ...]) -> None:
    case = make_conv_case(*shape, dtype=torch.float16, final=True)
    whole = case.arguments()
    run(*whole)
    results = case.exit.outputs()
    for i in range(shape[0]):
        part = slice(i, i + 1)
        alone = replace(case.exit, rows=case.exit.rows[part], positions=case.exit.positions[part])
        alone = replace(alone, live=torch.ones(1, dtype=torch.int32))
        run(case.features, case.conv_weight, case.conv_bias, *alone.arguments()[1:-3], *results)
    for a, b in zip(whole[-3:], results, strict=True):
        assert_same_bits(a, b, tolerance=1e-3)  # the map in between is rounded to float16


@pytest.mark.parametrize("final", [False, True])
def test_opcheck(final: bool) -> None:
    torch.library.opcheck(op, make_conv_case(5, 10, 4, 4, 3, 3, final=final).arguments())


@interpreted
def test_opcheck_with_run_by_triton_the_op() -> None:
    with run_by_triton("exit_conv_head"):
        torch.library.opcheck(op, make_conv_case(5, 10, 4, 4, 3, 3).arguments())


def test_compiles_and_exports_as_one_node() -> None:
    case = make_conv_case(5, 10, 4, 4, 3, 3)
    *tensors, criterion, exit_index, logits, confidence, exits = case.arguments()

    class Head(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return ops.exit_conv_head.run(*tensors[:9], criterion, exit_index, *tensors[9:])

    everything = (*tensors, logits, confidence, exits)
    exported = torch.export.export(Head(), everything)
    assert [n.target for n in exported.graph.nodes if n.op == "call_function" and "getitem" not in n.name] == [op]
    lists = torch.compile(Head(), fullgraph=True, backend="aot_eager")(*everything)
    assert all(torch.equal(a, b) for a, b in zip(lists, op(*case.arguments()), strict=True))


@pytest.mark.gpu
class TestOnTheGPU:
    def test_one_launch_without_waiting(self) -> None:
        arguments = cuda_arguments(make_conv_case(257, *SHAPES["cifar stage 3"][1:], dtype=torch.float16).arguments())
        arguments[1] = arguments[1].contiguous(memory_format=torch.channels_last)
        without_waiting(lambda: op(*arguments))
        names = launched(lambda: op(*arguments))
        assert len(names) == 1, names

    def test_graph_replays_with_changed_inputs(self) -> None:
        """On another stream; the same bits as launched one by one."""
        cases = [
            make_conv_case(257, 10, 16, 16, 8, 8, dtype=torch.float16, seed=seed, live=live).arguments()
            for seed, live in ((0, "all"), (1, "part"))
        ]
        static = cuda_arguments(cases[0])
        op(*static)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph):
            lists = op(*static)
        for case in (*cases, cases[0]):
            alone = cuda_arguments(case)
            for ours, new in zip(static, alone, strict=True):
                if isinstance(ours, Tensor):
                    ours.copy_(new)
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                graph.replay()
            torch.cuda.synchronize()
            expected = op(*alone)
            for a, b in zip((*lists, *static[-3:]), (*expected, *alone[-3:]), strict=True):
                assert torch.equal(a, b)


def test_flops_are_those_of_both_layers() -> None:
    ops.register_flops()
    arguments = make_conv_case(5, 10, 4, 6, 3, 3).arguments()
    with FlopCounterMode(display=False) as counter:
        op(*arguments)
    assert counter.get_total_flops() == 2 * 5 * (6 * 4 * 9 * 9 + 11 * 6)


WRONG = {
    "conv_weight channels": (
        {1: torch.zeros(4, 5, 3, 3)},
        r"conv_weight has shape \[4, 5, 3, 3\]; expected \[C, 4, 3, 3\]",
    ),
    "conv_weight kernel": ({1: torch.zeros(4, 4, 1, 1)}, r"conv_weight has shape \[4, 4, 1, 1\]"),
    "conv_weight dtype": ({1: torch.zeros(4, 4, 3, 3).half()}, r"conv_weight is .*\.to\(torch\.float32\), as features"),
    "conv_bias size": ({2: torch.zeros(5)}, r"conv_bias is torch.float32 of shape \[5\]; expected .*\[4\]"),
    "conv_bias dtype": ({2: torch.zeros(4).half()}, r"conv_bias is torch.float16"),
    "weight channels": ({3: torch.zeros(11, 9)}, r"weight has shape \[11, 9\]; .* C = 4"),
    "features rank": ({0: torch.zeros(8, 4, 3)}, r"features has shape \[8, 4, 3\]; expected \[M, C, H, W\]"),
    "row": ({6: torch.tensor([0, 1, 99], dtype=torch.int32)}, r"rows\[2\] = 99 is outside of features"),
}


@pytest.mark.parametrize("run", [op, module.run_triton], ids=["reference", "triton"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(run: Any, wrong: str) -> None:
    override, message = WRONG[wrong]
    arguments = list(make_conv_case(3, 10, 4, 4, 3, 3).arguments())
    for i, value in override.items():
        arguments[i] = value
    with pytest.raises(RuntimeError, match=message):
        run(*arguments)


def test_gradients_are_refused() -> None:
    case = make_conv_case(3, 10, 4, 4, 3, 3)
    case.features.requires_grad_()
    with pytest.raises(ValueError, match=r"features requires grad.*torch\.no_grad"):
        ops.exit_conv_head.run(*case.arguments())
