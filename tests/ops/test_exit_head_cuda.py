"""The exit head and the gather of survivors in CUDA C++, on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from exit_cases import CRITERIA, check, cuda_arguments, launched, make_case, on_gpu, without_waiting
from exit_chains import chain
from networks import images, lived_in, one_by_one, spread_thresholds
from rule_cases import RuleCase, agreeing_outputs, cases
from rule_cases import check as check_rule

import eefast
from eefast import ops, zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ops.CUDA_MISSING is not None, reason=f"CUDA kernels: {ops.CUDA_MISSING}"),
]

op = torch.ops.eefast.exit_head_cuda.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("k", "dtype"),
    [
        pytest.param(k, d, id=f"{'sanitize-' * (k == 10 and d == torch.float16)}{k}-{d}")
        for k in (1, 10, 1000)
        for d in DTYPES
    ],
)
def test_against_float64(k: int, dtype: torch.dtype) -> None:
    for i, (r, c, (h, w)) in enumerate(itertools.product((0, 1, 31, 257), (1, 16, 513), ((1, 1), (7, 5), (8, 8)))):
        memory = ("contiguous", "channels_last", "cropped", "transposed")[i % 4]
        live = ("all", "part", "none")[i % 3]
        case = make_case(
            r, k, c, h, w, dtype=dtype, memory=memory, criterion=CRITERIA[i % len(CRITERIA)], live=live,
            final=i % 5 == 0, seed=i,
        )  # fmt: skip
        check(on_gpu(op), case)


def test_many_samples() -> None:
    check(on_gpu(op), make_case(65537, 10, 16, 2, 2, dtype=torch.float16))


@pytest.mark.parametrize("classes", [1, 10, 1000])
@pytest.mark.parametrize("case", cases(4), ids=lambda case: case.name)
def test_rules_by_their_definition(case: RuleCase, classes: int) -> None:
    outputs = agreeing_outputs(257, 4, classes)
    _, confidence, exits = chain(on_gpu(op), outputs, case.thresholds, case.rule.table())
    assert check_rule(case, outputs, exits, confidence) <= 5


def test_one_launch_and_no_waiting() -> None:
    arguments = cuda_arguments(make_case(257, 10, 64, 8, 8, dtype=torch.float16).arguments())
    assert len(launched(lambda: op(*arguments))) == 1
    without_waiting(lambda: op(*arguments))


def test_in_a_graph() -> None:
    arguments = cuda_arguments(make_case(4096, 10, 64, 8, 8, dtype=torch.float16).arguments())
    expected = op(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists = op(*arguments)
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(lists, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (64, 8, 8)])
def test_gather_survivors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    features = (torch.randn(300, *shape) * 50).to(dtype).cuda()
    rows = torch.randperm(300)[:257].int().cuda()
    gather = torch.ops.eefast.gather_survivors_cuda.default
    for live in (0, 1, 100, 257):
        count = torch.tensor([live], device="cuda").int()
        out = torch.full((257, *shape), 7, dtype=dtype, device="cuda")
        gather(features, rows, count, out)
        assert torch.equal(out[:live], features[rows[:live].long()])
        assert (out[live:] == 7).all()
        offset = torch.tensor([257 - live], device="cuda").int()
        torch.ops.eefast.gather_survivors_cuda.default(
            features, rows, torch.tensor([live], device="cuda").int(), out, offset
        )
        assert torch.equal(out[257 - live :], features[rows[:live].long()])


def test_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole network with these exits: the answers of the one-by-one loop; the plan says what runs."""
    monkeypatch.setenv("EEFAST_EXIT_KERNELS", "cuda")
    net: Any = lived_in(zoo.eenet("eenet20", 2, [1, 3], "bnpool", input_shape=(3, 32, 32)), 1)
    x = images(257, (3, 32, 32))
    spread_thresholds(net, x, 0.4)
    expected = one_by_one(net, x)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        fast = eefast.accelerate(net.cuda(), engine="compact")
        result = fast(x.cuda())
    assert "CUDA" in str(fast.plan)
    assert torch.equal(result.exit_index.cpu(), expected.exit_index)
    torch.testing.assert_close(result.logits.cpu(), expected.logits, rtol=1e-4, atol=1e-4)
