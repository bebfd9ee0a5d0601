"""The Triton kernel of `eefast::indexed_conv`: every way through it, any number of programs, graphs, no waiting."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton here, so no kernels to test")
import torch
from conv_cases import DTYPES, NHWC, ConvCase, check, make_case
from eefast.kernels import indexed_conv as kernel
from exit_cases import SENTINEL, assert_same_bits, dtypes_and_shapes, launched, without_waiting
from torch import Tensor
from where import GPU, interpreted, runs_triton

from eefast import ops

module = ops.indexed_conv
op = torch.ops.eefast.indexed_conv.default


def run(*arguments: Any) -> Tensor:
    if not GPU:
        return module.run_triton(*arguments)
    case = ConvCase(*arguments).to("cuda")
    out = op(*case.arguments())
    # Copied as they are, rows that nothing has written would be an error to compute-sanitizer.
    out[case.count :] = SENTINEL
    return out.cpu()


def written(case: ConvCase, programs: int) -> Tensor:
    """What a launch of `programs` programs makes of memory full of sentinels."""
    out = torch.full_like(module.empty_output(case.features, case.weight, case.rows, case.stride), SENTINEL)
    replace(launch(case, out), grid=(programs,)).run()
    return out


def launch(case: ConvCase, out: Tensor) -> Any:
    *arguments, features_in_order = case.arguments()
    return kernel.launch(*arguments, out, features_in_order)


# (R, C_in, C, H, W, kernel, stride, rows, residual, ReLU): several samples in a tile and several tiles in a sample,
# taps and channels in one step and in several, odd sizes, output channels in one block and in two.
SHAPES = {
    "cifar stage 1": (2, 16, 16, 16, 16, 3, 1, True, "through", True),
    "cifar stage 3": (5, 64, 64, 8, 8, 3, 1, True, "in order", True),
    "odd": (7, 19, 21, 7, 5, 3, 1, True, "through", False),
    "odd, strided": (7, 5, 21, 7, 5, 3, 2, True, "none", True),
    "even, strided": (5, 16, 8, 8, 6, 3, 2, False, "in order", True),
    "one pixel": (33, 16, 16, 1, 1, 3, 1, True, "in order", True),
    "one line": (5, 4, 4, 1, 9, 3, 2, True, "none", True),
    "stem": (3, 3, 16, 13, 11, 3, 1, False, "none", True),
    "one channel": (3, 1, 1, 9, 31, 3, 1, True, "through", True),
    "pointwise": (3, 64, 40, 7, 7, 1, 1, True, "in order", True),
    "pointwise, no rows": (3, 37, 16, 7, 7, 1, 1, False, "through", True),
    "shortcut": (7, 16, 32, 7, 5, 1, 2, True, "none", False),
    "two blocks of channels": (3, 8, 136, 4, 4, 3, 1, True, "in order", True),
    "several large tiles": (3, 8, 130, 17, 17, 1, 1, True, "through", True),
    "no rows": (0, 16, 16, 4, 4, 3, 1, True, "none", True),
}


def shaped(shape: tuple[Any, ...], **more: Any) -> ConvCase:
    *size, kernel_size, stride, rows, residual, relu = shape
    return make_case(*size, kernel=kernel_size, stride=stride, rows=rows, residual=residual, relu=relu, **more)


class TestAnswers:
    pytestmark = runs_triton

    @pytest.mark.parametrize("live", ["part", "all", "none"])
    @dtypes_and_shapes(SHAPES, ("cifar stage 3", "odd"), DTYPES)
    @pytest.mark.sampled(20)
    def test_shapes_match_float64(self, dtype: torch.dtype, shape: tuple[Any, ...], live: str) -> None:
        check(run, shaped(shape, live=live, dtype=dtype))

    @pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
    @pytest.mark.parametrize("residual", ["none", "in order", "through"])
    @pytest.mark.parametrize("rows", [True, False], ids=["rows", "all"])
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("kernel_size", [1, 3])
    def test_every_combination(self, kernel_size: int, stride: int, rows: bool, residual: str, relu: bool) -> None:
        check(run, shaped((5, 3, 5, 5, 3, kernel_size, stride, rows, residual, relu)))

    @pytest.mark.parametrize("residual", ["none", "in order", "through"])
    def test_features_in_order(self, residual: str) -> None:
        """NaN in every row that is not to be read."""
        check(run, make_case(5, 16, 8, 5, 3, residual=residual, in_order=True, seed=2))

    @pytest.mark.parametrize("rows", [True, False], ids=["rows", "all"])
    def test_more_live_than_rows_counts_as_all(self, rows: bool) -> None:
        case = make_case(5, 3, 4, 5, 5, rows=rows, residual="in order", live="all")
        check(run, replace(case, live=case.live + 1000))

    def test_nan_stays_nan(self) -> None:
        """A ReLU that takes NaN for 0 would hide it from the exit."""
        case = make_case(5, 3, 4, 5, 5, live="all")
        case.features[int(case.rows[2]), 1, 2, 3] = torch.nan
        assert check(run, case)[2].isnan().any()

    @pytest.mark.parametrize("shape", [SHAPES["cifar stage 3"], SHAPES["odd"]])
    def test_answer_depends_on_the_sample_only(self, shape: tuple[Any, ...]) -> None:
        case = shaped(shape, live="all", dtype=torch.float16)
        case = replace(case, residual=None)
        whole = run(*case.arguments())
        for i in range(case.size):
            alone = replace(case, rows=case.rows[i : i + 1], live=torch.ones(1, dtype=torch.int32))
            assert_same_bits(whole[i : i + 1], run(*alone.arguments()), tolerance=1e-3)

    def test_features_at_any_address(self) -> None:
        case = make_case(5, 3, 16, 5, 5, rows=False, live="all", dtype=torch.float16)
        check(run, replace(case, features=torch.cat([case.features, case.features])[5:][:3], live=case.live - 3))


class TestInterpreted:
    """What only the interpreter can show."""

    pytestmark = interpreted

    @pytest.mark.parametrize("programs", [1, 3, 100])
    @pytest.mark.parametrize("shape", ["odd", "two blocks of channels"])
    @pytest.mark.parametrize("live", ["none", "part", "all"])
    def test_any_number_of_programs_does_all_tiles_and_nothing_else(self, live: str, shape: str, programs: int) -> None:
        case = shaped(SHAPES[shape], live=live)
        out = written(case, programs)
        check(lambda *_: out, case)
        assert (out[case.count :] == SENTINEL).all()

    @pytest.mark.parametrize("value", [8, -1])
    def test_an_index_out_of_range_stops_the_kernel(self, value: int) -> None:
        case = make_case(5, 3, 4, 3, 3, live="all")
        case.rows[1] = value
        with pytest.raises(Exception, match="rows is out of range"):
            written(case, 1)

    def test_a_row_beyond_the_residual_stops_the_kernel(self) -> None:
        case = make_case(5, 3, 4, 3, 3, live="all", residual="through")
        with pytest.raises(Exception, match="rows is out of range"):
            written(replace(case, residual=case.residual[: int(case.rows.max())]), 1)


def test_tiles_depend_on_the_sample_only() -> None:
    def tile(r: int) -> dict[str, Any]:
        case = make_case(r, 16, 16, 9, 9)
        arguments = launch(case, module.empty_output(case.features, case.weight, case.rows, 1)).arguments
        return {name: value for name, value in arguments.items() if name.isupper()}

    assert tile(1) == tile(31) == tile(257)


def test_the_grid_is_no_larger_than_the_work_nor_than_the_device() -> None:
    def grid(r: int) -> int:
        features, weight, bias, rows, live = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape, dtype in (
                ((1, 64, 56, 56), torch.float16), ((64, 64, 1, 1), torch.float16), ((64,), torch.float32),
                ((r,), torch.int32), ((1,), torch.int32),
            )
        )  # fmt: skip
        out = module.empty_output(features, weight, rows, 1)
        return kernel.launch(features, weight, bias, None, rows, False, live, 1, True, out).grid[0]

    assert [grid(r) for r in (0, 1, 4096)] == [1, 25, kernel.PROGRAMS * kernel.MULTIPROCESSORS]


def test_tiles_fit_into_the_shared_memory_of_every_gpu() -> None:
    for pixels, channels, inputs, taps, size in itertools.product(
        (1, 49, 196, 3136), (1, 16, 37, 64, 96, 128, 2048), (1, 3, 16, 37, 64, 512), (1, 9), (2, 4)
    ):
        tile = kernel.blocks(pixels, channels, taps * inputs, inputs * size, size)
        assert (tile.pixels + tile.channels) * tile.inner * tile.stages * size <= 99 << 10
        assert min(tile.pixels, tile.channels, tile.inner) >= 16


@pytest.mark.parametrize(
    ("features", "filters", "message"),
    [
        ((1, 2**21, 32, 32), 1, r"features has shape .*, on CUDA a sample has fewer than 2³¹ elements"),
        ((1, 2**16, 1, 1), 2**15, r"weight has 2147483648 elements, on CUDA fewer than 2³¹"),
        ((1, 1, 2**13, 2**13), 2**5, r"weight has 32 filters, which makes \[32, 8192, 8192\] of a sample; on CUDA"),
    ],
)
def test_more_than_the_kernels_count(features: tuple[int, ...], filters: int, message: str) -> None:
    maps = torch.empty(features, dtype=torch.float16, device="meta", memory_format=NHWC)
    weight = torch.empty(filters, features[1], 1, 1, dtype=torch.float16, device="meta", memory_format=NHWC)
    bias, live = torch.empty(filters, device="meta"), torch.empty(1, dtype=torch.int32, device="meta")
    with pytest.raises(RuntimeError, match=message):
        module.run_triton(maps, weight, bias, None, None, False, live, 1, True)


@pytest.mark.gpu
class TestOnTheGPU:
    @pytest.mark.parametrize(
        "shape",
        [
            (257, 16, 16, 32, 32, 3, 1, True, "through", True),
            (257, 32, 64, 16, 16, 3, 2, True, "none", True),
            (257, 64, 64, 8, 8, 3, 1, True, "in order", True),
            (31, 128, 128, 28, 28, 3, 1, True, "in order", True),
            (31, 512, 512, 7, 7, 3, 1, False, "in order", True),
            (31, 64, 256, 56, 56, 1, 1, True, "through", True),
            (31, 1024, 256, 14, 14, 1, 1, True, "none", False),
            (31, 96, 200, 15, 13, 3, 2, True, "in order", True),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_shapes_match_float64(self, dtype: torch.dtype, shape: tuple[Any, ...]) -> None:
        """Everything stays on the GPU; there PyTorch's float32 convolutions round to TF32 unless told not to."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            check(op, shaped(shape, dtype=dtype).to("cuda"))

    def test_one_launch_without_waiting(self) -> None:
        arguments = shaped(SHAPES["cifar stage 3"], dtype=torch.float16).to("cuda").arguments()
        without_waiting(lambda: op(*arguments))
        names = launched(lambda: op(*arguments))
        assert len(names) == 1, names

    def test_graph_replays_with_changed_inputs(self) -> None:
        cases = [
            make_case(257, 64, 64, 8, 8, residual="through", dtype=torch.float16, seed=seed, live=live).to("cuda")
            for seed, live in ((0, "part"), (1, "all"), (2, "none"), (3, "part"))
        ]
        static = replace(cases[0], **{k: v.clone() for k, v in vars(cases[0]).items() if isinstance(v, Tensor)})
        op(*static.arguments())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(*static.arguments())
        for case in cases:
            for ours, new in zip(static.arguments(), case.arguments(), strict=True):
                if isinstance(ours, Tensor):
                    ours.copy_(new)
            out.fill_(SENTINEL)
            # A wait for the number of live rows would raise.
            torch.cuda.set_sync_debug_mode("error")
            try:
                graph.replay()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            expected = op(*case.arguments())
            assert torch.equal(out[: case.count], expected[: case.count])
            check(lambda *_: out, case)

    def test_repetition_gives_the_same_bits(self) -> None:
        case = make_case(4096, 16, 16, 16, 16, residual="through", dtype=torch.float16).to("cuda")
        first = op(*case.arguments())[: case.count]
        for _ in range(20):
            assert torch.equal(op(*case.arguments())[: case.count], first)

    def test_maps_that_begin_beyond_32_bits(self) -> None:
        case = make_case(9, 64, 64, 8, 8, residual="through", dtype=torch.float16, live="all").to("cuda")
        before = 2**31 // case.features[0].numel()
        maps = torch.zeros(before + len(case.features), 8, 8, 64, dtype=torch.float16, device="cuda")
        maps = maps.permute(0, 3, 1, 2)
        maps[before:] = case.features
        there = replace(case, features=maps, rows=case.rows + before, residual=maps)
        here = replace(case, residual=case.features)
        assert torch.equal(op(*there.arguments()), op(*here.arguments()))

    def test_more_outputs_than_a_32_bit_integer_counts(self) -> None:
        case = make_case(9, 64, 64, 8, 8, kernel=1, dtype=torch.float16, live="all").to("cuda")
        repeated = case.rows.repeat(2**31 // (9 * 4096) + 2)
        live = torch.full_like(case.live, len(repeated))
        out = op(*replace(case, rows=repeated, live=live).arguments())
        assert out.numel() > 2**31
        expected = op(*case.arguments())
        for start in (0, len(repeated) - 9):
            assert torch.equal(out[start : start + 9], expected)
