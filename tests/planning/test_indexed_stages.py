"""Indexed stages: the folded stage's features for the survivors alone, or why a stage has no indexed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_stages import DOUBLE, HALVES, conv, folded_and_fused, on_gpu
from networks import Stage, images, lived_in
from torch import Tensor, nn

from eefast import ops, zoo
from eefast.planning.folding import fold_stage
from eefast.planning.fusing import fuse_convolutions
from eefast.planning.indexed_stages import device_counted, indexed_stage, reading_through_rows
from eefast.zoo.resnets import Bottleneck

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")


def stages_of_eenet20(shape: tuple[int, ...]) -> list[nn.Module]:
    return list(lived_in(zoo.eenet("eenet20", 3, [1, 4, 5], "pool", input_shape=shape), 1).stages)


def bottlenecks() -> nn.Module:
    return lived_in(nn.Sequential(Bottleneck(32, 16, 2), Bottleneck(64, 16)), 1)


INDEXED: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "stem and blocks": (lambda: stages_of_eenet20((3, 9, 9))[0], (3, 9, 9)),
    "a projection first": (lambda: stages_of_eenet20((3, 12, 12))[1], (16, 12, 12)),
    "an input that is added later": (lambda: stages_of_eenet20((3, 12, 12))[2], (32, 6, 6)),
    "bottlenecks": (bottlenecks, (32, 9, 9)),
}


def with_dead_rows(stage: nn.Module, folded: nn.Module, x: Tensor) -> tuple[Tensor, list[int], Tensor, Tensor, float]:
    """Features with dead rows full of NaN; the live ones, and as int32 rows before two that are none; their features in
    float64, and how far others may be from them.
    """
    x[[0, 2, 5]] = torch.nan
    x = x.contiguous(memory_format=torch.channels_last)
    alive = [6, 1, 4, 3]
    exact, _ = fold_stage(stage, DOUBLE)
    expected = exact(x[alive].double())
    tolerance = 2 * float((folded(x[alive]).double() - expected).abs().max())
    return x, alive, torch.tensor([*alive, 1234, -5], dtype=torch.int32), expected, tolerance


@pytest.mark.parametrize("name", INDEXED)
def test_indexed_stages(name: str) -> None:
    """Survivors in odd order, dead rows full of NaN; fewer live ones than rows."""
    make, shape = INDEXED[name]
    stage, x = make(), images(7, shape)
    folded, fused, _, _ = folded_and_fused(stage, torch.float32)
    indexed, why = indexed_stage(fused)
    assert why == ""
    assert indexed is not None
    x, alive, rows, expected, tolerance = with_dead_rows(stage, folded, x)
    for live in (4, 3, 1, 0):
        got = indexed(x, rows, torch.tensor([live], dtype=torch.int32))
        assert got.shape == (len(rows), *expected.shape[1:])
        torch.testing.assert_close(got[:live].double(), expected[:live], rtol=0, atol=tolerance)
    counted = device_counted(stage, torch.float32)
    assert counted is not None
    compacted = torch.cat([x[alive], x[:1]]).contiguous(memory_format=torch.channels_last)
    got = counted(compacted, None, torch.tensor([4], dtype=torch.int32))
    assert len(got) == 5
    torch.testing.assert_close(got[:4].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", INDEXED)
def test_stages_that_read_their_input_where_it_is(name: str) -> None:
    """What is computed for entries that are not live is of no interest, but harms no other one."""
    make, shape = INDEXED[name]
    stage, x = make(), images(7, shape)
    folded, fused, _, _ = folded_and_fused(stage, torch.float32)
    reading = reading_through_rows(fused)
    assert reading is not None
    x, _, rows, expected, tolerance = with_dead_rows(stage, folded, x)
    for live in (4, 1, 0):
        got = reading(x, rows, torch.tensor([live], dtype=torch.int32))
        assert got.shape == (len(rows), *expected.shape[1:])
        torch.testing.assert_close(got[:live].double(), expected[:live], rtol=0, atol=tolerance)


def test_only_convolutions_of_the_input_read_it_through_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two blocks: the first convolution, and the addition after the second; nothing is gathered."""
    monkeypatch.setattr(ops.gather_survivors, "run", lambda *_: pytest.fail("copied"))
    calls: list[tuple[bool, bool]] = []
    convolve = ops.indexed_conv.run

    def recorded(*given: Any) -> Tensor:
        calls.append((given[5], given[9]))
        return convolve(*given)

    monkeypatch.setattr(ops.indexed_conv, "run", recorded)
    stage = lived_in(nn.Sequential(Bottleneck(64, 16), Bottleneck(64, 16)), 1)
    folded, fused, _, _ = folded_and_fused(stage, torch.float32)
    reading = reading_through_rows(fused)
    assert reading is not None
    x, rows = images(5, (64, 6, 6)).contiguous(memory_format=torch.channels_last), torch.tensor([4, 0]).int()
    got = reading(x, rows, torch.tensor([2]).int())
    torch.testing.assert_close(got, folded(x[[4, 0]]), rtol=1e-4, atol=1e-4)
    assert calls == [(False, False), (True, True)]


@pytest.mark.parametrize("words", ["MaxPool2d", "mul", "kernel (5, 5)", "3 groups"])
def test_inputs_that_something_else_reads(words: str) -> None:
    made = OBSTACLES[words]
    first = made if words == "mul" else nn.Sequential(made[0] if words != "MaxPool2d" else nn.MaxPool2d(2), conv())
    if words == "kernel (5, 5)":
        first = nn.Sequential(conv(kernel=5), conv())
    assert reading_through_rows(folded_and_fused(first)[1]) is None
    assert reading_through_rows(conv()) is None


@pytest.mark.parametrize(
    ("run", "expected", "copies"),
    [
        (lambda s, x: s.a(x).relu(), [(True, False, True)], 0),
        (lambda s, x: (s.a(x) + x).relu(), [(True, True, True)], 0),
        (lambda s, x: (s.b(s.a(x)) + s.c(x)).relu(), [(True, False, False), (False, False, False),
                                                      (True, False, True)], 0),
        (lambda s, x: (s.b(s.a(x).relu()) + x).relu(), [(False, False, True), (False, False, True)], 1),
    ],
    ids=["a convolution", "the input is added", "a shortcut", "the input is added later"],
)  # fmt: skip
def test_what_reads_through_the_rows(
    run: Callable[..., Tensor], expected: list[tuple[bool, bool, bool]], copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First convolutions and shortcuts of the input, nothing else; an input that is added later is gathered."""
    seen: list[tuple[bool, bool, bool]] = []

    def recorded(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, rows: Tensor | None,
                 residual_through_rows: bool, live: Tensor, stride: int, relu: bool,
                 in_order: bool) -> Tensor:  # fmt: skip
        seen.append((rows is not None, residual_through_rows, relu))
        assert bias.dtype == torch.float32
        assert live.item() == 2
        assert not in_order
        return convolve(x, weight, bias, residual, rows, residual_through_rows, live, stride, relu)

    gathered: list[int] = []
    convolve, gather = ops.indexed_conv.run, ops.gather_survivors.run
    monkeypatch.setattr(ops.indexed_conv, "run", recorded)
    monkeypatch.setattr(
        ops.gather_survivors, "run", lambda *tensors: (gathered.append(len(tensors[0])), gather(*tensors))
    )
    rows, live = torch.tensor([4, 0], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    x = images(5, (3, 6, 6)).contiguous(memory_format=torch.channels_last)
    folded, fused, _, _ = folded_and_fused(Stage(run, a=conv(), b=conv(), c=conv(kernel=1)), torch.float32)
    indexed, _ = indexed_stage(fused)
    assert indexed is not None
    torch.testing.assert_close(indexed(x, rows, live), folded(x[[4, 0]]), rtol=1e-5, atol=1e-5)
    assert seen == expected
    assert len(gathered) == copies


OBSTACLES = {
    "MaxPool2d": nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)),
    "SiLU": nn.Sequential(conv(), nn.SiLU(), conv()),
    "mul": Stage(lambda s, x: s.a(x * 2), a=conv()),
    "reflect": nn.Sequential(conv(padding_mode="reflect")),
    "kernel (5, 5)": nn.Sequential(conv(), conv(kernel=5)),
    "stride (3, 3)": nn.Sequential(conv(kernel=1, stride=3)),
    "padding (0, 0)": nn.Sequential(conv(padding=0)),
    "dilation (2, 2)": nn.Sequential(conv(dilation=2, padding=2)),
    "3 groups": nn.Sequential(conv(groups=3)),
    "returns input": nn.Sequential(nn.Identity()),
    "returns (": Stage(lambda s, x: (s.a(x), x), a=conv()),
}


@pytest.mark.parametrize("words", OBSTACLES)
def test_stages_that_cannot_be_indexed(words: str) -> None:
    stage, why = indexed_stage(folded_and_fused(OBSTACLES[words])[1])
    assert stage is None
    assert device_counted(OBSTACLES[words], torch.float32) is None
    assert words in why
    assert "eefast.ops.gather_survivors" in why


def test_stages_without_a_graph_cannot_be_indexed() -> None:
    stage, why = indexed_stage(conv())
    assert stage is None
    assert "Conv2d" in why


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_indexed_stages_on_a_gpu(dtype: torch.dtype) -> None:
    x = images(31, (3, 12, 12)).cuda()
    stages = [stage.cuda() for stage in stages_of_eenet20((3, 12, 12))]
    for stage in stages:
        folded, _ = fold_stage(nn.Sequential(stage), dtype)
        exact, _ = fold_stage(nn.Sequential(stage), DOUBLE)
        indexed, why = indexed_stage(fuse_convolutions(folded)[0])
        assert indexed is not None, why
        given = on_gpu(x, dtype)
        rows = torch.randperm(31, dtype=torch.int32, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        alive = given[rows[:17].long()]
        expected = exact(alive.double())
        tolerance = 2 * (folded(alive).double() - expected).abs().max().item()
        got = indexed(given, rows, torch.tensor([17], dtype=torch.int32, device="cuda"))[:17]
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
        x = exact(given.double()).float()
