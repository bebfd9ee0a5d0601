"""`eefast::exit_head` in C++, Triton and Python against a float64 computation that shares no code with any of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from exit_cases import BELOW, CRITERIA, DTYPES, LAYOUTS, SENTINEL, check, gap, make_case, on_gpu, with_each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from where import GPU, runs_triton

from eefast import ops

module = ops.exit_head
reference = module.reference
op = torch.ops.eefast.exit_head.default

DISPATCHED = "cpp" if ops.CPP_MISSING is None else f"dispatched = reference, C++ {ops.CPP_MISSING}"
triton = pytest.param(on_gpu(op) if GPU else module.run_triton, id="triton", marks=runs_triton)
every = pytest.mark.parametrize(
    "run", [pytest.param(op, id=DISPATCHED), pytest.param(reference, id="reference"), triton]
)
cpp_only = pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")

SIZES = list(itertools.product((0, 1, 3, 31, 257), (1, 10, 1000), (1, 3, 16, 64, 513), ((1, 1), (7, 5), (8, 8))))


@every
@pytest.mark.parametrize("r", [0, 1, 3, 31, 257])
@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.sampled(9)
def test_sizes_match_float64(run: Any, r: int, k: int) -> None:
    """All sizes; dtype, layout, criterion and length of the live list take turns."""
    for c, (h, w) in itertools.product((1, 3, 16, 64, 513), ((1, 1), (7, 5), (8, 8))):
        i = SIZES.index((r, k, c, (h, w)))
        if run is module.run_triton and (i + 4) % {3: 2, 31: 4, 257: 16}.get(r, 1):
            continue  # the interpreter takes up to seconds for each of these
        case = make_case(
            r, k, c, h, w, dtype=DTYPES[i // 7 % 4], memory=LAYOUTS[i % 7], criterion=CRITERIA[i % len(CRITERIA)],
            live=("all", "part", "all", "none", "part")[i % 5], final=i % 11 == 0, seed=i,
        )  # fmt: skip
        check(run, case, exit_index=i)


@every
@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.sampled(28)
def test_layouts_match_float64(run: Any, dtype: torch.dtype, memory: str) -> None:
    shapes = ((21, 7, 5), (64, 1, 9), (16, 9, 1), (5, 23, 17))
    for i, ((c, h, w), criterion) in enumerate(itertools.product(shapes, CRITERIA)):
        if run is module.run_triton and (i + i // 4 + DTYPES.index(dtype) + LAYOUTS.index(memory)) % 4:
            continue  # all pairs take turns; the interpreter is slow
        check(run, make_case(13, 10, c, h, w, dtype=dtype, memory=memory, criterion=criterion, live="part", seed=c))


@every
@pytest.mark.parametrize(("kept", "size"), [((2, 3), 6), ((3,), 5), ((2,), 7), ((1,), 9)], ids=str)
def test_maps_that_repeat_one_pixel_line_or_channel(run: Any, kept: tuple[int, ...], size: int) -> None:
    case = make_case(13, 10, 16, 7, 5, live="part")
    shape = [size if d in kept else -1 for d in range(4)]
    features = case.features.mean(kept, keepdim=True).expand(shape)
    assert 0 in features.stride()
    weight = case.weight[:, :1].expand(-1, size).contiguous() if 1 in kept else case.weight
    check(run, replace(case, features=features, weight=weight))


@every
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "cropped channels_last"])
def test_large_maps_match_float64(run: Any, memory: str) -> None:
    check(run, make_case(2, 3, 24, 112, 112, memory=memory, final=True))


@every
def test_strided_arguments(run: Any) -> None:
    case = make_case(31, 10, 16, 4, 4, live="part")

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, 5)], -1)[..., 0]

    names = ("weight", "bias", "rows", "positions")
    assert not any(strided(getattr(case, name)).is_contiguous() for name in names)
    check(run, replace(case, **{name: strided(getattr(case, name)) for name in names}))


@every
def test_no_features_and_no_results(run: Any) -> None:
    """A batch without survivors: neither features nor results, but a live list of full size."""
    case = replace(make_case(3, 10, 16, 4, 4, live="none"), features=torch.empty(0, 16, 4, 4), results=0)
    check(run, case)
    check(run, replace(case, threshold=None))


@every
@pytest.mark.parametrize("stride", [1, 3, 0])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_threshold_for_each_place(run: Any, criterion: str, stride: int) -> None:
    """Samples that are not numbers exit where the threshold is none, and survive all others."""
    case = make_case(31, 10, 16, 4, 4, criterion=criterion, live="part")
    case.features[case.rows[2].long(), 3] = math.nan
    check(run, with_each(case, stride))
    if stride == 1:
        check(run, with_each(make_case(3, 1000, 16, 3, 3, criterion=criterion)))
        check(run, with_each(make_case(0, 10, 16, 3, 3, criterion=criterion)))


AT = (("learned", 4, 0.5), ("max_probability", 2, 0.5), ("max_probability", 4, 0.25))
AT += (("entropy", 1, 0.0), ("margin", 1, 1.0), ("margin", 3, 0.0))


@every
@pytest.mark.parametrize(("criterion", "classes", "value"), AT)
def test_exactly_at_the_threshold_goes_on(run: Any, criterion: str, classes: int, value: float) -> None:
    """Zero weights make the confidence exact: at the threshold a sample survives, one step beyond it exits."""
    case = make_case(3, classes, 16, 2, 2, criterion=criterion)
    case = replace(case, weight=torch.zeros_like(case.weight), bias=torch.zeros_like(case.bias))
    at = torch.tensor(value)
    leaving_side, staying_side = (-math.inf, math.inf) if criterion not in BELOW else (math.inf, -math.inf)
    below, above = (torch.nextafter(at, torch.tensor(side)) for side in (leaving_side, staying_side))
    for threshold, survivors in ((at, 3), (above, 3), (below, 0)):
        arguments = replace(case, threshold=threshold).arguments()
        assert int(run(*arguments)[2]) == survivors
        if survivors == 0:
            assert (arguments[-2][case.positions.long()] == value).all()


@every
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.sampled(6)
def test_decision_agrees_with_the_written_confidence(run: Any, criterion: str) -> None:
    """Compared in float32: a sample whose written confidence is the threshold survives; one step on, it exits."""
    case = make_case(31, 10, 16, 4, 4, criterion=criterion, final=True)
    side = torch.tensor(-math.inf if criterion not in BELOW else math.inf)
    for i in range(31):
        row, position = case.rows[i : i + 1], case.positions[i : i + 1]
        one = replace(case, rows=row, positions=position, live=torch.tensor([1]).int())
        arguments = one.arguments()
        run(*arguments)
        value = arguments[-2][position.long()][0]
        assert int(run(*replace(one, threshold=value).arguments())[2]) == 1
        assert int(run(*replace(one, threshold=torch.nextafter(value, side)).arguments())[2]) == 0


@every
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("threshold", [0.4, -math.inf, math.inf, math.nan, None])
@pytest.mark.sampled(20)
def test_non_finite_features(run: Any, criterion: str, threshold: float | None) -> None:
    """NaN compares false, so the sample survives until the final exit; its neighbours are unchanged."""
    for dtype, memory in zip(DTYPES, ("contiguous", "channels_last", "channels_last", "cropped"), strict=True):
        case = make_case(31, 10, 16, 4, 4, dtype=dtype, memory=memory, criterion=criterion, final=True)
        case.features[case.rows[1], 3, 2, 1] = math.nan
        case.features[case.rows[4], 0, 0, 0] = math.inf
        case.features[case.rows[9], 15, 3, 3] = -math.inf
        case.features[case.rows[30], 7, 0, :2] = torch.tensor([math.inf, -math.inf])
        if threshold is not None:
            case = replace(case, threshold=torch.tensor(gap(case) if threshold == 0.4 else threshold))
        check(run, case)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number(run: Any, dtype: torch.dtype) -> None:
    """All 65,536 bit patterns, subnormal numbers and infinities among them, arrive unchanged."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    if run is module.run_triton:
        # The interpreter takes minutes for all, and is itself wrong about subnormal bfloat16 numbers.
        values = values[::97][(dtype == torch.float16) | (values[::97].view(dtype).abs() > 1e-37)]
    values = values.view(dtype)
    index = torch.arange(len(values), dtype=torch.int32)
    logits, confidence, exits = torch.zeros(len(values), 1), torch.zeros(len(values)), torch.zeros(len(values)).long()
    weight, bias, live = torch.tensor([[1.0], [0.0]]), torch.zeros(2), torch.tensor([len(values)]).int()
    features = values.view(-1, 1, 1, 1)
    run(features, weight, bias, None, index, index, live, "learned", 0, logits, confidence, exits)
    torch.testing.assert_close(logits[:, 0], values.float(), rtol=0, atol=0, equal_nan=True)


@every
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("impossible", [1, 9, 10])
def test_impossible_classes(run: Any, criterion: str, impossible: int) -> None:
    """Logits of -inf: 0 · log 0 = 0, and where no class is possible the confidence is NaN."""
    case = make_case(7, 10, 16, 4, 4, criterion=criterion, final=True)
    bias = case.bias.clone()
    bias[:impossible] = -math.inf
    case = replace(case, bias=bias)
    _, confidence, _ = check(run, case)
    if impossible == 10 and criterion != "learned":
        assert confidence[case.positions.long()].isnan().all()


@every
@pytest.mark.parametrize("scale", [30.0, 1000.0])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_far_apart_logits(run: Any, criterion: str, scale: float) -> None:
    """Probabilities that underflow, confidences that saturate."""
    case = make_case(31, 10, 16, 1, 1, criterion=criterion, final=True)
    check(run, replace(case, weight=case.weight * scale))


@cpp_only
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "every second"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shape", [(10, 64, 8, 8), (37, 19, 7, 5)], ids=str)
def test_answer_depends_on_the_sample_only(
    shape: tuple[int, ...], criterion: str, dtype: torch.dtype, memory: str
) -> None:
    """Bitwise the same in any batch, at any position, with any number of threads."""
    case = make_case(257, *shape, dtype=dtype, memory=memory, criterion=criterion, final=True)
    whole, single, split = case.arguments(), case.arguments(), case.outputs()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        op(*whole)
        torch.set_num_threads(1)
        op(*single)
    finally:
        torch.set_num_threads(threads)
    start = 0
    for size in (1, 2, 3, 4, 5, 31, 33, 178):
        part = torch.arange(start, start + size).flip(0)
        live = torch.tensor([size], dtype=torch.int32)
        part_case = replace(case, rows=case.rows[part], positions=case.positions[part], live=live)
        op(*part_case.arguments()[:-3], *split)
        start += size
    assert start == 257
    for a, b, one in zip(whole[-3:], split, single[-3:], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, one)


@every
def test_repetition_gives_the_same_bits(run: Any) -> None:
    interpreted = run is module.run_triton  # in order, and slowly; see test_exit_head_triton.py for other orders
    case = make_case(31 if interpreted else 257, 10, 64, 8, 8, memory="channels_last")
    first = case.arguments()
    lists = run(*first)
    for _ in range(1 if interpreted else 3):
        again = case.arguments()
        for a, b in zip((*run(*again), *again[-3:]), (*lists, *first[-3:]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [0, 5])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.sampled(10)
def test_opcheck(dtype: torch.dtype, memory: str, r: int, final: bool) -> None:
    torch.library.opcheck(op, make_case(r, 10, 16, 3, 3, dtype=dtype, memory=memory, final=final).arguments())


def test_compiles_and_exports_as_one_node() -> None:
    case = make_case(31, 10, 16, 4, 4)
    *inputs, criterion, exit_index, logits, confidence, exits = case.arguments()

    class Head(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return ops.exit_head.run(*tensors[:7], criterion, exit_index, *tensors[7:])

    tensors = (*inputs, logits, confidence, exits)
    exported = torch.export.export(Head(), tensors)
    assert [n.target for n in exported.graph.nodes if n.op == "call_function" and "getitem" not in n.name] == [op]

    compiled_results = case.outputs()
    compiled = torch.compile(Head(), fullgraph=True, backend="aot_eager")
    lists = compiled(*inputs, *compiled_results)
    for a, b in zip(lists, Head()(*tensors), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(compiled_results, (logits, confidence, exits), strict=True):
        assert torch.equal(a, b)


def test_flops_are_those_of_the_linear_layer() -> None:
    ops.register_flops()
    with FlopCounterMode(display=False) as counter:
        op(*make_case(31, 10, 16, 4, 4).arguments())
    assert counter.get_total_flops() == 2 * 31 * 11 * 16


INT32, BAD = torch.int32, torch.tensor


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def shared(whole: str, part: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two arguments of which one begins in the middle of the other's memory."""
    case = make_case(3, 10, 16, 4, 4)
    values = dict(zip(NAMES, case.arguments(), strict=True))
    memory, inside = values[whole].contiguous(), values[part]
    begin = max(0, memory.nbytes // inside.element_size() // 2 - inside.numel())
    return {whole: memory, part: memory.view(-1).view(dtype)[begin : begin + inside.numel()].view(inside.shape)}


NAMES = ("features", "weight", "bias", "threshold", "rows", "positions", "live", "criterion", "exit_index")
NAMES += ("logits", "confidence", "exits")
WRONG = {
    "features rank": ({"features": torch.zeros(6, 16, 4)}, r"features has shape \[6, 16, 4\]; expected \[M, C, H, W\]"),
    "features pixels": ({"features": torch.zeros(6, 16, 0, 4)}, r"features has shape .* at least one .* pixel"),
    "features channels": ({"features": torch.zeros(6, 0, 4, 4)}, r"features has shape .* at least one channel"),
    "features dtype": ({"features": torch.zeros(6, 16, 4, 4).int()}, r"features is .*\.to\(torch\.float32\)"),
    "weight channels": ({"weight": torch.zeros(11, 15)}, r"weight has shape \[11, 15\]; .* C = 16"),
    "weight classes": ({"weight": torch.zeros(1, 16)}, r"weight has shape \[1, 16\]; .* one class"),
    "weight dtype": ({"weight": torch.zeros(11, 16).half()}, r"weight is .*; convert it with \.to\(torch\.float32\)"),
    "bias size": ({"bias": torch.zeros(10)}, r"bias has shape \[10\]; expected .*\[11\]"),
    "bias dtype": ({"bias": torch.zeros(11).double()}, r"bias is .*; convert it"),
    "threshold shape": ({"threshold": torch.zeros(1)}, r"threshold has shape \[1\]"),
    "threshold dtype": ({"threshold": BAD(0.5).double()}, r"threshold is .*\.to\(torch\.float32\)"),
    "rows rank": ({"rows": torch.zeros(3, 1, dtype=INT32)}, r"rows has shape \[3, 1\]"),
    "rows dtype": ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows is .*\.to\(torch\.int32\)"),
    "positions size": ({"positions": torch.zeros(2, dtype=INT32)}, r"positions has shape \[2\]; expected .*\[3\]"),
    "positions dtype": ({"positions": torch.zeros(3)}, r"positions is .*\.to\(torch\.int32\)"),
    "live size": ({"live": BAD([1, 1], dtype=INT32)}, r"live has shape \[2\]"),
    "live dtype": ({"live": BAD([1])}, r"live is .*\.to\(torch\.int32\)"),
    "live too large": ({"live": BAD([4], dtype=INT32)}, r"live = 4; expected 0 … 3"),
    "live negative": ({"live": BAD([-1], dtype=INT32)}, r"live = -1; expected 0 … 3"),
    "row too large": ({"rows": BAD([0, 6, 1], dtype=INT32)}, r"rows\[1\] = 6 is outside of features, which has 6 rows"),
    "row negative": ({"rows": BAD([0, 1, -1], dtype=INT32)}, r"rows\[2\] = -1 is outside of features"),
    "position too large": ({"positions": BAD([8, 1, 2], dtype=INT32)}, r"positions\[0\] = 8 is outside of logits"),
    "position negative": ({"positions": BAD([0, -2, 2], dtype=INT32)}, r"positions\[1\] = -2 is outside of logits"),
    "logits classes": ({"logits": torch.zeros(8, 9)}, r"logits has shape \[8, 9\]; expected .*\[8, 10\]"),
    "logits dtype": ({"logits": torch.zeros(8, 10).half()}, r"logits is .*\.to\(torch\.float32\)"),
    "confidence rank": ({"confidence": torch.zeros(8, 1)}, r"confidence has shape \[8, 1\]"),
    "confidence size": ({"confidence": torch.zeros(7)}, r"(confidence|logits) has shape"),
    "exits size": ({"exits": torch.zeros(7, dtype=torch.int64)}, r"exits has shape \[7\]"),
    "logits expanded": ({"logits": torch.zeros(8, 1).expand(8, 10)}, r"logits has overlapping strides \[1, 0\]; give"),
    "logits overlap": ({"logits": torch.zeros(50).as_strided((8, 10), (5, 1))}, r"logits has overlapping strides \[5"),
    "confidence expanded": ({"confidence": torch.zeros(1).expand(8)}, r"confidence has overlapping strides \[0\]"),
    "features None": ({"features": None}, r"features is None; expected a tensor"),
    "bias meta": ({"bias": torch.zeros(11, device="meta")}, r"bias is on meta; move it to cpu"),
    "logits meta": ({"logits": torch.zeros(8, 10, device="meta")}, r"logits is on meta; move it to cpu"),
    "weight sparse": ({"weight": torch.ones(11, 16).to_sparse()}, r"weight (is sparse|has the layout).*\.to_dense\(\)"),
    "weight freed": ({"weight": freed(torch.zeros(11, 16))}, r"weight needs 704 bytes of its storage, which has 0"),
    "rows in exits": (
        shared("exits", "rows", torch.int32),
        r"exits shares memory with rows; give it separate memory",
    ),
    "positions in exits": (shared("exits", "positions", torch.int32), r"exits shares memory with positions"),
    "logits in features": (shared("features", "logits", torch.float32), r"logits shares memory with features"),
    "confidence in logits": (shared("logits", "confidence", torch.float32), r"logits shares memory with confidence"),
    "exits dtype": ({"exits": torch.zeros(8, dtype=INT32)}, r"exits is .*\.to\(torch\.int64\)"),
}
WRONG_VALUES = {f"{name} {how}" for name in ("live", "row", "position") for how in ("too large", "negative")}


@every
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(run: Any, wrong: str) -> None:
    """The message names the argument, its value and the way out, and nothing has been written."""
    override, message = WRONG[wrong]
    if GPU and run not in (op, reference) and wrong in WRONG_VALUES:
        pytest.skip("on a GPU these values stay there: to read them would wait for it")
    arguments = dict(zip(NAMES, make_case(3, 10, 16, 4, 4).arguments(), strict=True)) | override
    with pytest.raises(RuntimeError, match=message):
        run(*arguments.values())
    for name in {"logits", "confidence", "exits"} - set(override):
        assert (arguments[name] == SENTINEL).all()


@every
def test_columns_of_one_table(run: Any) -> None:
    """Logits and confidences may alternate in memory, and be between the rows of features."""
    case = make_case(3, 10, 16, 4, 4)
    table = torch.full((8, 16 * 16 + 11), SENTINEL)
    table[:6, : 16 * 16] = case.features.reshape(6, -1)
    apart, together = case.arguments(), list(replace(case, features=table[:6, :256].view(6, 16, 4, 4)).arguments())
    together[-3:-1] = table[:, 256:266], table[:, 266]
    for a, b in zip((*run(*apart), *apart[-3:]), (*run(*together), *together[-3:]), strict=True):
        assert torch.equal(a, b)


@cpp_only
def test_odd_address() -> None:
    arguments = list(make_case(3, 10, 16, 4, 4).arguments())
    arguments[2] = torch.frombuffer(bytearray(45), dtype=torch.float32, offset=1)
    with pytest.raises(RuntimeError, match="bias starts at an address that its elements cannot have"):
        op(*arguments)


def test_unknown_criterion() -> None:
    with pytest.raises(ValueError, match="criterion='best' is unknown; choose one of learned, max_probability"):
        ops.exit_head.run(*replace(make_case(3, 10, 16, 4, 4), criterion="best").arguments())
    with pytest.raises((ValueError, RuntimeError), match="criterion='best' is unknown; choose one of learned"):
        op(*replace(make_case(3, 10, 16, 4, 4), criterion="best").arguments())


def test_gradients_are_refused() -> None:
    case = make_case(3, 10, 16, 4, 4)
    case.features.requires_grad_()
    with pytest.raises(ValueError, match=r"features requires grad.*torch\.no_grad"):
        ops.exit_head.run(*case.arguments())
    with torch.no_grad():
        check(ops.exit_head.run, replace(case, features=case.features.detach()))
        ops.exit_head.run(*case.arguments())


@every
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_leaving_and_surviving_partition_the_live_list(run: Any, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, 40), label="R")
    count = data.draw(st.integers(0, r), label="live")
    rows = data.draw(st.lists(st.integers(0, 5), min_size=r, max_size=r), label="rows")
    positions = data.draw(st.permutations(range(r + 2)), label="positions")[:r]
    criterion = data.draw(st.sampled_from(CRITERIA), label="criterion")
    threshold = data.draw(st.one_of(st.none(), st.floats(width=32)), label="threshold")
    case = replace(
        make_case(3, 4, 5, 2, 3),
        rows=torch.tensor(rows, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        live=torch.tensor([count], dtype=torch.int32),
        threshold=None if threshold is None else torch.tensor(threshold),
        criterion=criterion,
        results=r + 2,
    )
    arguments = case.arguments(exit_index=9)
    next_rows, next_positions, next_live = run(*arguments)
    left = set((arguments[-1] == 9).nonzero()[:, 0].tolist())
    survivors = next_positions[: int(next_live)].tolist()
    assert left.isdisjoint(survivors)
    assert left | set(survivors) == set(positions[:count])
    assert sorted(zip(next_rows.tolist(), next_positions.tolist(), strict=True)) == sorted(
        zip(rows, positions, strict=True)
    )
    places = [positions.index(p) for p in next_positions.tolist()]
    assert places == sorted(places[: len(survivors)]) + sorted(places[len(survivors) :], reverse=True)
