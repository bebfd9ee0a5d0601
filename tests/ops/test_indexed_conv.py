"""`eefast::indexed_conv` against float64 convolutions: what the op promises wherever it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conv_cases import DTYPES, NHWC, check, make_case
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from where import interpreted, run_by_triton

from eefast import ops

module = ops.indexed_conv
op = torch.ops.eefast.indexed_conv.default


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", ["none", "in order", "through"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "all"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("r", "live", "relu"),
    [(0, "none", True), (1, "all", False), (3, "part", True), (31, "none", False), (31, "part", True)],
)
def test_matches_float64(
    r: int, live: str, relu: bool, stride: int, kernel: int, rows: bool, residual: str, dtype: torch.dtype
) -> None:
    more = {"kernel": kernel, "stride": stride, "rows": rows, "residual": residual, "relu": relu}
    check(op, make_case(r, 5, 3, 7, 6, live=live, dtype=dtype, seed=r, **more))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 9), (257, 1), (2, 2)])
def test_small_maps(h: int, w: int, stride: int) -> None:
    check(op, make_case(3, 1, 1, h, w, stride=stride, residual="through"))


@pytest.mark.parametrize("residual", ["none", "in order", "through"])
def test_features_in_order_beside_a_residual_through_the_rows(residual: str) -> None:
    check(op, make_case(7, 5, 3, 7, 6, residual=residual, in_order=True))
    case = make_case(3, 4, 6, 5, 3, residual="through", live="all", in_order=True)
    with pytest.raises(RuntimeError, match="features has 2 rows; expected at least 3, as rows has entries"):
        op(*replace(case, features=case.features[:2]).arguments())


def test_rows_after_live_are_zero_on_the_cpu() -> None:
    case = make_case(7, 3, 4, 5, 5)
    assert (op(*case.arguments())[case.count :] == 0).all()


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "all"])
def test_more_live_than_rows_counts_as_all(rows: bool) -> None:
    case = make_case(5, 3, 4, 5, 5, rows=rows, residual="in order", live="all")
    check(op, replace(case, live=case.live + 3))


def test_nan_stays_nan() -> None:
    case = make_case(5, 3, 4, 5, 5, live="all")
    case.features[int(case.rows[2]), 1, 2, 3] = torch.nan
    assert check(op, case)[2].isnan().any()


@pytest.mark.parametrize(
    ("stride", "rows", "residual"), [(1, True, "through"), (2, False, "in order"), (2, True, "none")]
)
def test_opcheck(stride: int, rows: bool, residual: str) -> None:
    torch.library.opcheck(op, make_case(5, 4, 6, 5, 4, stride=stride, rows=rows, residual=residual).arguments())


@interpreted
def test_opcheck_with_run_by_triton_the_op() -> None:
    with run_by_triton("indexed_conv"):
        torch.library.opcheck(op, make_case(5, 4, 6, 5, 4, stride=2, residual="through", live="all").arguments())


def test_compiles_and_exports_as_one_node() -> None:
    case = make_case(5, 4, 6, 5, 5, residual="through")

    class Convolution(torch.nn.Module):
        def forward(self, features: Tensor, residual: Tensor, rows: Tensor, live: Tensor) -> Tensor:
            return ops.indexed_conv.run(features, case.weight, case.bias, residual, rows, True, live, 1, True)

    given = case.features, case.residual, case.rows, case.live
    exported = torch.export.export(Convolution(), given)
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [op]
    out = torch.compile(Convolution(), fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(out, op(*case.arguments()))


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "all"])
def test_flops_are_those_of_all_entries(rows: bool) -> None:
    ops.register_flops()
    with FlopCounterMode(display=False) as counter:
        op(*make_case(5, 4, 6, 5, 7, stride=2, rows=rows, live="none").arguments())
    assert counter.get_total_flops() == 2 * 5 * (6 * 4 * 9 * 3 * 4)


INT = torch.int32
WRONG = {
    "features rank": ({0: torch.zeros(8, 4, 3)}, r"features has shape \[8, 4, 3\]; expected \[M, C_in, H, W\]"),
    "features empty": ({0: torch.zeros(8, 4, 0, 3)}, r"features has shape \[8, 4, 0, 3\]; expected"),
    "features dtype": ({0: torch.zeros(6, 4, 5, 3).double()}, r"features is torch.float64; convert it to one of"),
    "features layout": ({0: torch.zeros(6, 4, 5, 3)}, r"features has strides .*; make it channels-last with"),
    "weight channels": ({1: torch.zeros(4, 5, 3, 3)}, r"weight has shape \[4, 5, 3, 3\]; expected \[C_out, 4, 1, 1\]"),
    "weight kernel": ({1: torch.zeros(4, 4, 5, 5)}, r"weight has shape \[4, 4, 5, 5\]"),
    "weight not square": ({1: torch.zeros(4, 4, 1, 3)}, r"weight has shape \[4, 4, 1, 3\]"),
    "weight dtype": ({1: torch.zeros(6, 4, 3, 3).half()}, r"weight is torch.float16; .*float32\), as features"),
    "weight layout": ({1: torch.zeros(6, 4, 3, 3)}, r"weight has strides .*; make it channels-last with"),
    "bias size": ({2: torch.zeros(5)}, r"bias is torch.float32 of shape \[5\]; expected .*\[6\]"),
    "bias dtype": ({2: torch.zeros(6).half()}, r"bias is torch.float16"),
    "residual shape": ({3: torch.zeros(6, 6, 4, 3)}, r"residual has shape \[6, 6, 4, 3\]; expected \[\*, 6, 5, 3\]"),
    "residual rows": (
        {3: torch.zeros(2, 6, 5, 3), 5: False},
        r"residual has shape \[2, 6, 5, 3\]; .* with at least 3 rows",
    ),
    "residual dtype": ({3: torch.zeros(6, 6, 5, 3).half()}, r"residual is torch.float16; convert it with"),
    "residual layout": ({3: torch.zeros(6, 6, 5, 3)}, r"residual has strides .*; make it channels-last with"),
    "residual row": (
        {3: torch.zeros(4, 6, 5, 3).contiguous(memory_format=NHWC), 4: torch.tensor([0, 4, 0], dtype=INT)},
        r"rows\[1\] = 4 is outside of residual, which has 4 rows",
    ),
    "rows dtype": ({4: torch.zeros(3).long()}, r"rows is torch.int64; convert it with \.to\(torch\.int32\)"),
    "rows rank": ({4: torch.zeros(3, 1, dtype=INT)}, r"rows has shape \[3, 1\]; expected \[3\]"),
    "row": ({4: torch.tensor([0, 1, 99], dtype=INT)}, r"rows\[2\] = 99 is outside of features, which has 6 rows"),
    "negative row": ({4: torch.tensor([0, -1, 2], dtype=INT)}, r"rows\[1\] = -1 is outside of features"),
    "live dtype": ({6: torch.zeros(1)}, r"live is torch.float32; convert it with \.to\(torch\.int32\)"),
    "live shape": ({6: torch.zeros(2, dtype=INT)}, r"live has shape \[2\]; expected \[1\]"),
    "live negative": ({6: torch.tensor([-1], dtype=INT)}, r"live = -1; expected a number of rows, 0 or more"),
    "stride": ({7: 3}, r"stride = 3; expected 1 or 2"),
}


@pytest.mark.parametrize("run", [op, module.run_triton], ids=["reference", "triton"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(run: Any, wrong: str) -> None:
    override, message = WRONG[wrong]
    arguments = list(make_case(3, 4, 6, 5, 3, residual="through", live="all").arguments())
    for i, value in override.items():
        arguments[i] = value
    with pytest.raises(RuntimeError, match=message):
        run(*arguments)


@pytest.mark.parametrize(("i", "name"), [(1, "weight"), (2, "bias"), (3, "residual"), (4, "rows"), (6, "live")])
def test_another_device(i: int, name: str) -> None:
    *tensors, stride, _ = make_case(3, 4, 6, 5, 3, residual="through").arguments()
    tensors[i] = tensors[i].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} is on meta; move it to cpu, where features is"):
        module.check(*tensors, stride)


def test_gradients_are_refused() -> None:
    case = make_case(3, 4, 6, 5, 3)
    case.features.requires_grad_()
    with pytest.raises(ValueError, match=r"features requires grad.*torch\.no_grad"):
        ops.indexed_conv.run(*case.arguments())
