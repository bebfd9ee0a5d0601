"""`eefast::gather_survivors` in Triton, in C++ and in Python against indexing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exit_cases import cuda_arguments, launched, without_waiting
from torch import Tensor
from where import GPU, interpreted, run_by_triton, runs_triton

from eefast import ops

module = ops.gather_survivors
op = torch.ops.eefast.gather_survivors.default
SENTINEL = -7


def on_gpu(features: Tensor, rows: Tensor, live: Tensor, out: Tensor, offset: Tensor | None = None) -> None:
    there, base = out.cuda(), features if features._base is None else features._base
    op(
        base.cuda().as_strided(features.shape, features.stride()),
        rows.cuda(),
        live.cuda(),
        there,
        None if offset is None else offset.cuda(),
    )
    out.copy_(there)


triton = pytest.param(on_gpu if GPU else module.run_triton, id="triton", marks=runs_triton)
reference = pytest.param(module.reference, id="reference")
every = pytest.mark.parametrize("run", [reference, pytest.param(op, id="op"), triton])
checked = pytest.mark.parametrize("run", [module.reference, op, module.run_triton], ids=["reference", "op", "triton"])


def make_case(
    r: int, shape: tuple[int, ...], live: int, dtype: torch.dtype = torch.float32, memory: str = "channels_last"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, a live list in any order with garbage beyond `live`, and an output full of sentinels."""
    g = torch.Generator().manual_seed(r)
    layout = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    features = torch.randint(-99, 99, (r + 3, *shape), generator=g).to(dtype).contiguous(memory_format=layout)
    rows = torch.randperm(r + 3, generator=g)[:r].int()
    rows[live:] = 2**31 - 1
    out = torch.full((r, *shape), SENTINEL, dtype=dtype).contiguous(memory_format=layout)
    return features, rows, torch.tensor([live], dtype=torch.int32), out


SMALL_IN_THE_INTERPRETER = [
    (shape, r, live)
    for shape in ((64, 8, 8), (3, 7, 5), (2, 1, 1), (5, 90, 31))
    for r, live in ((0, 0), (1, 1), (3, 2), (31, 0), (31, 17), (257, 257))
    if GPU or r * shape[0] * shape[1] <= 5000
]


@every
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "r", "live"), SMALL_IN_THE_INTERPRETER, ids=str)
def test_sanitize_rows_are_gathered_and_no_others_written(
    run: Any, shape: tuple[int, ...], r: int, live: int, memory: str
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8):
        features, rows, count, out = make_case(r, shape, live, dtype, memory)
        run(features, rows, count, out)
        assert torch.equal(out[:live], features[rows[:live].long()]), dtype
        assert (out[live:] == torch.tensor(SENTINEL).to(dtype)).all(), dtype


@every
def test_rows_at_any_distance(run: Any) -> None:
    features, rows, live, out = make_case(7, (16, 3, 3), 5)
    spread = torch.zeros(20, 16, 3, 3).contiguous(memory_format=torch.channels_last)[::2]
    spread.copy_(features)
    run(spread, rows, live, out)
    assert torch.equal(out[:5], features[rows[:5].long()])


@every
@pytest.mark.parametrize(("live", "offset"), [(0, 40), (0, 0), (17, 0), (17, 3), (17, 23)])
def test_sanitize_rows_are_appended_at_an_offset(run: Any, live: int, offset: int) -> None:
    features, rows, count, _ = make_case(31, (16, 3, 5), live)
    out = torch.full((40, 16, 3, 5), float(SENTINEL)).contiguous(memory_format=torch.channels_last)
    run(features, rows, count, out, torch.tensor([offset], dtype=torch.int32))
    assert torch.equal(out[offset : offset + live], features[rows[:live].long()])
    assert (out[:offset] == SENTINEL).all()
    assert (out[offset + live :] == SENTINEL).all()


@checked
@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (torch.tensor([3], dtype=torch.int32), "offset = 3; expected 0 … 2, where 3 rows fit into out"),
        (torch.tensor([-1], dtype=torch.int32), "offset = -1; expected 0 … 2"),
        (torch.tensor([1]), "offset is (torch.int64|Long); convert"),
        (torch.zeros(2, dtype=torch.int32), r"offset has shape \[2\]; expected (one number = )?\[1\]"),
    ],
)
def test_wrong_offset(run: Any, offset: Tensor, message: str) -> None:
    features, rows, live, _ = make_case(3, (4, 2, 3), 3)
    out = torch.zeros(5, 4, 2, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=message):
        run(features, rows, live, out, offset)


@checked
@pytest.mark.parametrize(
    ("i", "value", "message"),
    [
        (0, torch.zeros(6, 4, 2), r"features has shape \[6, 4, 2\]; expected \[M, C, H, W\]"),
        (0, torch.zeros(6, 4, 3, 2).transpose(2, 3), r"features has strides .* make the rows of both"),
        (3, torch.zeros(3, 4, 2, 3), r"features has strides .* make the rows of both"),
        (3, torch.zeros(4, 4, 2, 3), r"out has shape \[4, 4, 2, 3\]; expected (\[R, C, H, W\] = )?\[3, 4, 2, 3\]"),
        (
            3,
            torch.zeros(3, 4, 2, 3).half(),
            r"out is (torch.float16; convert it with \.to\(torch.float32\)|Half, features Float; give)",
        ),
        (3, torch.zeros(1, 4, 2, 3).contiguous(memory_format=torch.channels_last).expand(3, 4, 2, 3), r"out has over"),
        (1, torch.zeros(3).long(), r"rows is (torch.int64|Long); convert"),
        (1, torch.tensor([0, 6, 0], dtype=torch.int32), r"rows\[1\] = 6 is outside of features, which has 6 rows"),
        (2, torch.tensor([4], dtype=torch.int32), r"live = 4; expected 0 … 3"),
        (2, torch.zeros(2, dtype=torch.int32), r"live has shape \[2\]"),
    ],
)
def test_wrong_arguments(run: Any, i: int, value: Tensor, message: str) -> None:
    arguments = list(make_case(3, (4, 2, 3), 3))
    arguments[i] = value
    with pytest.raises(RuntimeError, match=message):
        run(*arguments)


@checked
@pytest.mark.parametrize("part", [slice(None, 3), slice(3, None)], ids=["first rows", "last rows"])
def test_out_in_the_memory_of_the_features(run: Any, part: slice) -> None:
    features, rows, live, _ = make_case(3, (4, 2, 3), 3)
    with pytest.raises(RuntimeError, match="out shares memory with features; give it separate memory"):
        run(features, rows, live, features[part])
    buffer = torch.cat([features, features])
    run(buffer[:6], rows, live, buffer[6:9])
    assert torch.equal(buffer[6:9], features[rows.long()])


def test_opcheck() -> None:
    case = make_case(5, (4, 2, 3), 3)
    torch.library.opcheck(op, case)
    torch.library.opcheck(op, (*case, torch.tensor([2], dtype=torch.int32)))


@interpreted
def test_opcheck_with_run_by_triton_the_op() -> None:
    with run_by_triton("gather_survivors"):
        torch.library.opcheck(op, make_case(5, (4, 2, 3), 3))


def test_compiles_and_exports_as_one_node() -> None:
    case = make_case(5, (4, 2, 3), 3)

    class Gather(torch.nn.Module):
        def forward(self, features: Tensor, rows: Tensor, live: Tensor, out: Tensor) -> Tensor:
            ops.gather_survivors.run(features, rows, live, out)
            return out

    exported = torch.export.export(Gather(), case)
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [op]
    out = torch.compile(Gather(), fullgraph=True, backend="aot_eager")(*case)
    assert torch.equal(out[:3], case[0][case[1][:3].long()])


@pytest.mark.gpu
def test_graph_replays_with_changed_inputs() -> None:
    static = [x.cuda() for x in make_case(257, (64, 8, 8), 200)]
    op(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(*static)
    for live in (257, 0, 31):
        features, rows, count, out = make_case(257, (64, 8, 8), live)
        for ours, new in zip(static, (features, rows, count, out), strict=True):
            ours.copy_(new)
        graph.replay()
        assert torch.equal(static[3][:live].cpu(), features[rows[:live].long()])
        assert (static[3][live:] == SENTINEL).all()


@pytest.mark.gpu
def test_one_launch_without_waiting() -> None:
    case = cuda_arguments(make_case(257, (64, 8, 8), 200))
    without_waiting(lambda: op(*case))
    names = launched(lambda: op(*case))
    assert len(names) == 1, names


@pytest.mark.gpu
def test_more_elements_than_a_32_bit_integer_counts() -> None:
    features, rows, live, out = cuda_arguments(make_case(9, (64, 8, 8), 7, torch.float16))
    before = 2**31 // features[0].numel()
    everything = torch.zeros(before + len(features), 8, 8, 64, dtype=torch.float16, device="cuda").permute(0, 3, 1, 2)
    everything[before:] = features
    op(everything, rows + before, live, out)
    assert torch.equal(out[:7], features[rows[:7].long()])
