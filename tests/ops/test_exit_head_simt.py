"""The CUDA exit head and gather of survivors on the CPU, every thread a fiber, against float64 and the references."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from exit_cases import BELOW, CRITERIA, SENTINEL, Case, check, layout, make_case, with_each
from exit_chains import chain, spread
from rule_cases import RuleCase, agreeing_outputs, cases, check_random, random_rule
from rule_cases import check as check_rule
from simt_build import ROOT, build
from torch import Tensor

from eefast import ops, rules

GARBAGE = -99
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
gather_reference = ops.gather_survivors.reference
exit_head_reference = ops.exit_head.reference


class ExitHead(ctypes.Structure):
    """As in csrc/cuda/exit_head.h."""

    _fields_ = (
        ("features", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("samples", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("sample_stride", "channel_stride", "row_stride", "pixel_stride")),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_classes", ctypes.c_int64),
        ("criterion", ctypes.c_int),
        ("threshold", ctypes.c_void_p),
        ("exit_index", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "positions", "live")),
        ("size", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("logits_row_stride", ctypes.c_int64),
        ("logits_column_stride", ctypes.c_int64),
        ("confidence", ctypes.c_void_p),
        ("confidence_stride", ctypes.c_int64),
        ("exits", ctypes.c_void_p),
        ("exits_stride", ctypes.c_int64),
        ("results", ctypes.c_int64),
        ("threshold_of_each", ctypes.c_bool),
        ("threshold_stride", ctypes.c_int64),
        ("rule", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("next_rows", "next_positions", "next_live", "workspace")),
        *((name, ctypes.c_void_p) for name in ("sums", "scratch")),
    )


class Gather(ctypes.Structure):
    """As in csrc/cuda/gather_survivors.h."""

    _fields_ = (
        ("features", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("samples", "sample_stride", "row_bytes")),
        ("rows", ctypes.c_void_p),
        ("live", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("offset", ctypes.c_void_p),
        ("places", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def exit_head() -> ctypes.CDLL:
    library = build("exit_head")
    library.exit_head.restype, library.workspace_words.restype = ctypes.c_char_p, ctypes.c_long
    assert library.struct_bytes() == ctypes.sizeof(ExitHead)
    return library


@pytest.fixture(scope="module")
def gather_library() -> ctypes.CDLL:
    library = build("gather_survivors")
    library.gather_survivors.restype = ctypes.c_char_p
    assert library.struct_bytes() == ctypes.sizeof(Gather)
    return library


class Fault(RuntimeError):
    """What the fibers ran into."""


def runner(
    library: ctypes.CDLL, grid: int = 3, order: int = 0, dropped: int = 0, tiles: list[int] | None = None,
    delayed: bool = False,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The kernel as a function like the op.

    dropped: line of a barrier or fence that is left out.
    tiles: gets the samples of a tile, the warps of a sample, whether loads are wide.
    delayed: whether blocks see what other blocks store in the workspace only after fences.
    """

    def run(
        features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
        live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
        rule: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        size = len(rows)
        # A word more on both sides: what is written there was written to a wrong place.
        lists = [torch.full((n + 2,), GARBAGE, dtype=torch.int32) for n in (size, size, 1)]
        words = library.workspace_words(size)
        workspace = torch.full((words + 2,), GARBAGE, dtype=torch.int32)
        assert weight.is_contiguous() and bias.is_contiguous()  # noqa: PT018
        head = ExitHead(
            features.data_ptr(), DTYPES.index(features.dtype), *features.shape, *features.stride(),
            weight.data_ptr(), bias.data_ptr(), len(bias) - 1,
            (*CRITERIA, "carried").index(criterion), None if threshold is None else threshold.data_ptr(), exit_index,
            rows.data_ptr(), positions.data_ptr(), live.data_ptr(), size,
            logits.data_ptr(), *logits.stride(), confidence.data_ptr(), *confidence.stride(),
            exits.data_ptr(), *exits.stride(), len(exits),
            threshold is not None and threshold.dim() == 1, 0 if threshold is None else sum(threshold.stride()),
            None if rule is None else rule.data_ptr(), *(x[1:].data_ptr() for x in lists), workspace[1:].data_ptr(),
        )  # fmt: skip
        fault = library.exit_head(ctypes.byref(head), grid, order, dropped, delayed)
        if tiles is not None:
            figures = (ctypes.c_int * 3)()
            library.tiles(ctypes.byref(head), figures)
            tiles[:] = figures
        if fault:
            raise Fault(fault.decode())
        for guarded in (*lists, workspace):
            assert guarded[0] == guarded[-1] == GARBAGE, "written beyond its end"
        return lists[0][1:-1], lists[1][1:-1], lists[2][1:-1]

    return run


def bits(run: Callable[..., Any], case: Case) -> list[Tensor]:
    """All that a call returns and writes, as integers."""
    arguments = case.arguments()
    lists = run(*arguments)
    return [*lists, *(x.contiguous().view(torch.int32) for x in arguments[-3:])]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


SHAPES = [(1, 1, 1, 1), (10, 3, 7, 5), (10, 16, 8, 8), (100, 64, 8, 8), (10, 64, 1, 1), (1, 64, 7, 5), (100, 3, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("i", "memory", "live"), [(0, "channels_last", "part"), (1, "contiguous", "all")])
def test_shapes_match_float64(
    exit_head: ctypes.CDLL, i: int, memory: str, live: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    criterion = CRITERIA[(i + SHAPES.index(shape)) % len(CRITERIA)]
    check(runner(exit_head), make_case(9, *shape, dtype=dtype, memory=memory, criterion=criterion, live=live))


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("live", ["all", "part", "none"])
@pytest.mark.parametrize("r", [0, 1, 3, 31, 65])
def test_batches_match_float64(exit_head: ctypes.CDLL, r: int, live: str, final: bool) -> None:
    case = make_case(r, 10, 16, 2, 2, live=live, final=final, seed=r)
    check(runner(exit_head, grid=1 + r % 4), case)


@pytest.mark.parametrize("k", [1, 2, 10, 33, 100])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_match_float64(exit_head: ctypes.CDLL, criterion: str, k: int) -> None:
    check(runner(exit_head), make_case(13, k, 16, 2, 3, criterion=criterion, seed=k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "memory", ["cropped", "cropped channels_last", "every second", "transposed", "expanded"], ids=str
)
@pytest.mark.parametrize("shape", [(10, 16, 8, 8), (3, 5, 7, 5), (3, 8, 1, 8), (3, 8, 8, 1), (3, 1, 4, 4)], ids=str)
def test_layouts_match_float64(exit_head: ctypes.CDLL, shape: tuple[int, ...], memory: str, dtype: torch.dtype) -> None:
    check(runner(exit_head), make_case(3, *shape, dtype=dtype, memory=memory))


# One for each way through the kernels: samples of a tile and warps of a sample, chunks of channels, many classes, those
# with several blocks for a sample.
@pytest.mark.parametrize(
    ("shape", "samples", "warps"),
    [
        ((10, 64, 4, 4), 8, 1),
        ((10, 64, 8, 8), 4, 2),
        ((3, 20, 32, 32), 1, 8),
        ((3, 300, 3, 3), 4, 2),
        ((70, 600, 2, 1), 8, 8),
        ((300, 515, 4, 3), 8, 8),
        ((70, 264, 13, 7), 8, 16),
        ((64, 40, 41, 31), 8, 32),
        ((1000, 32, 2, 2), 8, 8),
        ((3000, 4, 2, 2), 8, 8),
        ((8191, 2, 1, 1), 8, 8),
    ],
    ids=str,
)
@pytest.mark.sampled(5)
def test_ways_through_the_kernel(exit_head: ctypes.CDLL, shape: tuple[int, ...], samples: int, warps: int) -> None:
    for memory in ("contiguous", "channels_last")[: 1 if shape[0] > 2000 else 2]:
        tiles: list[int] = []
        criterion = CRITERIA[shape[0] % 4]
        case = make_case(2 if shape[0] > 500 else 5, *shape, memory=memory, criterion=criterion)
        check(runner(exit_head, 1, tiles=tiles), case)
        assert tiles[:2] == [samples, warps]


@pytest.mark.parametrize(("r", "count"), [(8192, 300), (8193, 8193), (8192 * 2 + 77, 1000)])
def test_more_entries_than_a_pass_of_the_partition(exit_head: ctypes.CDLL, r: int, count: int) -> None:
    m = 40
    case = make_case(m, 2, 1, 1, 1, seed=r)
    g = torch.Generator().manual_seed(r)
    case = replace(
        case, rows=torch.randint(0, m, (r,), generator=g).int(), positions=torch.arange(r).int(),
        live=torch.tensor([count]).int(), results=r,
    )  # fmt: skip
    check(runner(exit_head, grid=2), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_decides_as_the_reference(exit_head: ctypes.CDLL, criterion: str, dtype: torch.dtype) -> None:
    case = make_case(31, 10, 16, 7, 5, dtype=dtype, criterion=criterion, seed=7)
    ours, theirs = bits(runner(exit_head), case), bits(exit_head_reference, case)
    assert same(ours[:3], theirs[:3])
    assert torch.equal(ours[5], theirs[5])


def test_no_features_at_all(exit_head: ctypes.CDLL) -> None:
    case = make_case(0, 3, 4, 2, 2)
    check(runner(exit_head), replace(case, features=case.features[:0]))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_strictly_beyond_the_threshold(exit_head: ctypes.CDLL, criterion: str) -> None:
    case = make_case(1, 10, 16, 2, 2, criterion=criterion, final=True)
    arguments = case.arguments()
    runner(exit_head)(*arguments)
    value = arguments[-2][case.positions[0]].clone()
    beyond = torch.tensor(math.inf if criterion in BELOW else -math.inf)
    for threshold, survivors in ((value, 1), (torch.nextafter(value, beyond), 0)):
        assert runner(exit_head)(*replace(case, threshold=threshold).arguments())[2].item() == survivors


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_survives_and_is_reported_at_the_last_exit(exit_head: ctypes.CDLL, criterion: str) -> None:
    case = make_case(11, 10, 16, 3, 3, criterion=criterion)
    features = case.features.clone()
    features[case.rows[4].long(), 5, 1, 1] = math.nan
    features[case.rows[6].long(), 2, 0, 1] = math.inf
    all_exit = torch.tensor(math.inf if criterion in BELOW else -math.inf)
    case = replace(case, features=features, threshold=all_exit)
    check(runner(exit_head), case)
    check(runner(exit_head), replace(case, threshold=None))
    next_rows, _, next_live = runner(exit_head)(*case.arguments())
    assert case.rows[4] in next_rows[: int(next_live)]


@pytest.mark.parametrize("stride", [1, 3, 0])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_threshold_for_each_place(exit_head: ctypes.CDLL, criterion: str, stride: int) -> None:
    case = make_case(31, 10, 16, 3, 3, criterion=criterion, live="part")
    case.features[case.rows[2].long(), 3] = math.nan
    check(runner(exit_head), with_each(case, stride))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_class_that_is_ruled_out(exit_head: ctypes.CDLL, criterion: str) -> None:
    case = make_case(5, 10, 16, 2, 2, criterion=criterion, final=True)
    case.bias[3] = -math.inf
    check(runner(exit_head), case)


def test_live_is_clamped(exit_head: ctypes.CDLL) -> None:
    case = make_case(9, 3, 4, 2, 2)
    whole = bits(runner(exit_head), case)
    assert same(bits(runner(exit_head), replace(case, live=torch.tensor([2**31 - 1]).int())), whole)
    for negative in (-5, -(2**31)):
        none = bits(runner(exit_head), replace(case, live=torch.tensor([negative]).int()))
        assert none[0].tolist() == case.rows.flip(0).tolist()
        assert none[2].tolist() == [0]


@pytest.mark.parametrize("value", [-1, 2**31 - 1])
@pytest.mark.parametrize("name", ["rows", "positions"])
def test_an_index_out_of_range_stops_the_kernel(exit_head: ctypes.CDLL, name: str, value: int) -> None:
    case = make_case(9, 3, 4, 2, 2)
    index = getattr(case, name).clone()
    index[5] = value
    with pytest.raises(Fault, match="trap"):
        runner(exit_head)(*replace(case, **{name: index}).arguments())


@pytest.mark.parametrize("shape", [(10, 64, 8, 8), (100, 12, 3, 3)], ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_same_bits_in_every_order_of_threads_on_every_grid(
    exit_head: ctypes.CDLL, memory: str, shape: tuple[int, ...]
) -> None:
    case = make_case(21, *shape, dtype=torch.float16, memory=memory, live="part")
    first = bits(runner(exit_head), case)
    for order, grid in ((1, 1), (2, 2), (3, 7), (4, 11), (5, 3)):
        assert same(bits(runner(exit_head, grid, order), case), first), f"order {order}, {grid} blocks"


@pytest.mark.parametrize("shape", [(10, 64, 8, 8), (100, 12, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_same_bits_in_every_batch_place_and_address(
    exit_head: ctypes.CDLL, memory: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    case = make_case(11, *shape, dtype=dtype, memory=memory, criterion="entropy", final=True)
    tiles: list[int] = []
    arguments = case.arguments()
    runner(exit_head, tiles=tiles)(*arguments)
    assert tiles[2] == (shape[1] == 64 or dtype == torch.float32)
    # The same map one element further on in memory, alone.
    row = case.features[case.rows[7].long()]
    buffer = torch.full((row.numel() + 1,), math.nan, dtype=dtype)
    strides = (row.numel(), *row.stride())
    moved = buffer.as_strided((1, *row.shape), strides, 1)
    moved.copy_(row)
    alone = replace(
        case, features=moved, rows=torch.zeros(1).int(), positions=case.positions[7:8], live=case.live * 0 + 1
    )
    others = alone.arguments()
    runner(exit_head, tiles=tiles)(*others)
    assert not tiles[2]
    place = case.positions[7]
    assert torch.equal(others[-3][place].view(torch.int32), arguments[-3][place].view(torch.int32))
    assert torch.equal(others[-2][place].view(torch.int32), arguments[-2][place].view(torch.int32))


def lines_with(text: str) -> list[int]:
    source = (ROOT / "csrc/cuda/exit_head.cuh").read_text().splitlines()
    return [number for number, line in enumerate(source, start=1) if text in line]


@pytest.mark.parametrize("line", lines_with("__syncthreads();"))
def test_a_missing_barrier_is_noticed(exit_head: ctypes.CDLL, line: int) -> None:
    # Of a block that finishes while another one still writes its flags, few orders of threads make something.
    small = make_case(24, 10, 16, 2, 2, memory="channels_last", criterion="entropy", final=True)
    wide = make_case(3, 70, 300, 1, 1, memory="channels_last")
    few = make_case(3, 10, 300, 1, 1, memory="channels_last")
    g = torch.Generator().manual_seed(0)
    r = 8192 * 2 + 5
    long = replace(
        make_case(4, 1, 1, 1, 1), rows=torch.randint(0, 4, (r,), generator=g).int(), positions=torch.arange(r).int(),
        live=torch.tensor([40]).int(), results=r,
    )  # fmt: skip
    for case, orders in ((small, 40), (wide, 8), (few, 8), (long, 8)):
        good = bits(runner(exit_head), case)
        for order in range(1, orders + 1):
            try:
                if not same(bits(runner(exit_head, 3, order, line), case), good):
                    return
            except (Fault, AssertionError):
                return
    pytest.fail(f"no test fails without the barrier of line {line}")


def test_answers_where_stores_are_seen_late(exit_head: ctypes.CDLL) -> None:
    case = make_case(21, 10, 16, 2, 2, dtype=torch.float16, live="part")
    good = bits(runner(exit_head), case)
    for order in range(5):
        assert same(bits(runner(exit_head, 3, order, delayed=True), case), good), f"order {order}"


@pytest.mark.parametrize("line", lines_with("__threadfence();"))
def test_a_missing_fence_is_noticed(exit_head: ctypes.CDLL, line: int) -> None:
    case = make_case(24, 10, 16, 2, 2)
    good = bits(runner(exit_head), case)
    found = {
        delayed: [same(bits(runner(exit_head, 3, order, line, delayed=delayed), case), good) for order in range(5)]
        for delayed in (False, True)
    }
    assert all(found[False]), "without delayed stores nothing would show"
    assert not all(found[True])


MANY = 70
"""Classes, of which a warp has several at a time."""


@pytest.mark.parametrize(
    ("rule_case", "classes"),
    [*((found, 10) for found in cases(4)), (cases(4)[0], 1), (cases(4)[0], MANY), (cases(4)[3], MANY)],
    ids=lambda value: getattr(value, "name", value),
)
def test_rules_by_their_definition(exit_head: ctypes.CDLL, rule_case: RuleCase, classes: int) -> None:
    outputs = agreeing_outputs(25, 4, classes)
    _, confidence, exits = chain(
        runner(exit_head, order=classes), outputs, rule_case.thresholds, rule_case.rule.table()
    )
    assert check_rule(rule_case, outputs, exits, confidence) <= 1


@pytest.mark.parametrize(("seed", "classes"), [(6, 10), (7, 33), (8, 1), (9, MANY), (11, 10)])
def test_any_table_is_its_formula_in_float64(exit_head: ctypes.CDLL, seed: int, classes: int) -> None:
    rule, outputs = random_rule(3, seed), agreeing_outputs(25, 3, classes, seed)
    thresholds = spread(outputs, rule)
    answer = chain(runner(exit_head, grid=2, order=seed), outputs, thresholds, rule.table())
    assert check_random(outputs, rule, thresholds, *answer) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("rule_case", cases(4), ids=lambda found: found.name)
def test_ten_thousand_rows_of_each_rule(exit_head: ctypes.CDLL, rule_case: RuleCase) -> None:
    outputs = agreeing_outputs(10_007, 4, 10, 1)
    _, confidence, exits = chain(runner(exit_head), outputs, rule_case.thresholds, rule_case.rule.table())
    assert check_rule(rule_case, outputs, exits, confidence) <= 10


@pytest.mark.slow
def test_ten_thousand_rows_of_random_tables(exit_head: ctypes.CDLL) -> None:
    rows = doubtful = 0
    for seed in range(100, 200):
        rule, outputs = random_rule(4, seed), agreeing_outputs(101, 4, 10, seed)
        answer = chain(runner(exit_head, grid=1 + seed % 3, order=seed), outputs, [0.3] * 3, rule.table())
        doubtful += check_random(outputs, rule, [0.3] * 3, *answer)
        rows += 101
    assert doubtful < 0.02 * rows


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_column_is_the_criterion_of_that_name(exit_head: ctypes.CDLL, criterion: str) -> None:
    outputs, sign = agreeing_outputs(21, 3, 10), -1 if criterion in BELOW else 1
    outputs[4, 1, 2], outputs[7, 0, 10] = math.nan, math.inf
    logits, confidence, exits = chain(runner(exit_head), outputs, [0.6, 0.5], None, criterion)
    table = rules.stateless(criterion, 2).table()
    found = chain(runner(exit_head), outputs, [sign * 0.6, sign * 0.5], table)
    for a, b in zip(found, (logits, sign * confidence, exits), strict=True):
        assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))


def test_rules_decide_as_the_reference_on_nan_infinities_and_ties(exit_head: ctypes.CDLL) -> None:
    """With thresholds of each sample, among them NaN."""
    g = torch.Generator().manual_seed(0)
    outputs = agreeing_outputs(40, 3, 5)
    outputs[:30] = outputs[:30].round()
    odd = torch.tensor([math.nan, math.inf, -math.inf])
    hit = torch.rand(outputs.shape, generator=g) < 0.04
    outputs[hit] = odd[torch.randint(0, 3, (int(hit.sum()),), generator=g)]
    # A number that is infinite, and then multiplied by 0.
    outputs[0] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, math.inf])
    outputs[0, 1:, 5] = 0.0
    limits = torch.tensor([0.4, 1.2, math.inf, math.nan])[torch.randint(0, 4, (2, 40), generator=g)]
    limits[:, 0] = math.inf
    tables = [case.rule.table() for case in cases(3)]
    tables.append(rules.fitted([[0.0] * 4 + [1.0]] * 3, [1.0, 0.0, 2.0], keep=-1.0, keep_if_same=1.0).table())
    for table in tables:
        found, want = (chain(f, outputs, limits, table) for f in (runner(exit_head), exit_head_reference))
        assert torch.equal(found[2], want[2])
        for a, b in zip(found[:2], want[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def gather(library: ctypes.CDLL, grid: int = 3, order: int = 0, units: list[int] | None = None) -> Callable[..., None]:
    def run(features: Tensor, rows: Tensor, live: Tensor, out: Tensor, offset: Tensor | None = None) -> None:
        size = features.element_size()
        copy = Gather(
            features.data_ptr(), len(features), features.stride(0) * size, features.shape[1:].numel() * size,
            rows.data_ptr(), live.data_ptr(), len(rows), out.data_ptr(), out.stride(0) * size,
            None if offset is None else offset.data_ptr(), len(out),
        )  # fmt: skip
        if units is not None:
            units.append(library.unit(ctypes.byref(copy)))
        if fault := library.gather_survivors(ctypes.byref(copy), grid, order):
            raise Fault(fault.decode())

    return run


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 8, 8), (3, 7, 5), (16, 1, 1), (1, 1, 1), (5, 90, 31)], ids=str)
@pytest.mark.sampled(5)
def test_gather_as_the_reference(gather_library: ctypes.CDLL, shape: tuple[int, ...], memory: str) -> None:
    g = torch.Generator().manual_seed(0)
    for dtype, (r, live) in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8),
        ((0, 0), (1, 1), (3, 2), (31, 0), (31, 17), (65, 65)),
    ):
        if r * math.prod(shape) > 300_000:
            continue  # seconds
        features = layout(torch.randint(-99, 99, (r + 3, *shape), generator=g).to(dtype), memory)
        rows = torch.randperm(r + 3, generator=g)[:r].int()
        rows[live:] = 2**31 - 1
        ours, theirs = (layout(torch.full((r + 1, *shape), SENTINEL).to(dtype), memory) for _ in range(2))
        count = torch.tensor([live]).int()
        gather(gather_library, 1 + r % 5, order=r)(features, rows, count, ours[:r])
        gather_reference(features, rows, count, theirs[:r])
        assert torch.equal(ours, theirs)
        offset = torch.tensor([r + 1 - live]).int()
        gather(gather_library, 1 + r % 5, order=r)(features, rows, count, ours, offset)
        gather_reference(features, rows, count, theirs, offset)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "offset", "gap", "unit"),
    [
        ((64, 2, 2), 0, 0, 16), ((64, 2, 2), 0, 8, 16), ((64, 2, 2), 0, 4, 8), ((64, 2, 2), 2, 0, 4),
        ((64, 2, 2), 1, 0, 2), ((3, 7, 5), 0, 0, 2), ((3, 7, 5), 0, 3, 2), ((4, 3, 3), 0, 0, 8),
    ],
    ids=str,
)  # fmt: skip
def test_gather_copies_as_many_bytes_at_once_as_addresses_allow(
    gather_library: ctypes.CDLL, shape: tuple[int, ...], offset: int, gap: int, unit: int
) -> None:
    rows, live = torch.tensor([2, 0]).int(), torch.tensor([2]).int()
    elements = math.prod(shape)
    buffer = torch.randn(4 * (elements + gap) + 8).half()
    strides = (elements + gap, shape[1] * shape[2], shape[2], 1)
    features = buffer.as_strided((3, *shape), strides, offset)
    out = torch.zeros(2, *shape, dtype=torch.float16)
    units: list[int] = []
    gather(gather_library, units=units)(features, rows, live, out)
    assert units == [unit]
    assert torch.equal(out, features[rows.long()])


def test_gather_clamps_live_and_stops_at_an_index_out_of_range(gather_library: ctypes.CDLL) -> None:
    features, rows, out = torch.randn(4, 4, 2, 2), torch.tensor([3, 1]).int(), torch.zeros(3, 4, 2, 2)
    gather(gather_library)(features, rows, torch.tensor([2**31 - 1]).int(), out[:2])
    assert torch.equal(out[:2], features[rows.long()])
    gather(gather_library)(features, rows + 1, torch.tensor([-1]).int(), out[:2])
    assert torch.equal(out[:2], features[rows.long()])
    with pytest.raises(Fault, match="trap"):
        gather(gather_library)(features, rows + 1, torch.tensor([2]).int(), out[:2])
    with pytest.raises(Fault, match="trap"):
        gather(gather_library)(features, rows, torch.tensor([2]).int(), out, torch.tensor([2]).int())
