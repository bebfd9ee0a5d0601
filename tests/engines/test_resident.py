"""The resident engine: which images its kernel takes as they are, the rule that it runs by, bfloat16, export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import images, lived_in, one_by_one, spread_thresholds
from torch import nn

import eefast
from eefast import ops, zoo
from eefast.engines import ResidentEngine

pytestmark = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def net() -> Any:
    made = lived_in(zoo.eenet("eenet20", 3, "linear", "conv1", input_shape=SHAPE), 1)
    made.normalization = ([0.4, 0.5, 0.6], [0.3, 0.2, 0.3])
    spread_thresholds(made, images(65, SHAPE), 0.4)
    return made


@pytest.fixture(scope="module")
def engine(net: Any) -> Any:
    return eefast.accelerate(net, engine="resident").engine


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return images(65, SHAPE)


@pytest.fixture
def normalising(engine: Any) -> ResidentEngine:
    """As on a GPU, where the kernel makes of uint8 pixels what `net.prepare` makes of them."""
    return ResidentEngine(engine.net, engine.plan, replace(engine.program, normalization=torch.ones(2, 3)))


class TestUint8Images:
    def test_they_are_prepared_where_the_kernel_does_not(self, engine: Any) -> None:
        x = torch.full((2, *SHAPE), 255, dtype=torch.uint8)
        assert torch.equal(engine.prepare(x), engine.net.prepare(x))

    def test_the_kernel_gets_them_as_they_are(self, normalising: ResidentEngine) -> None:
        x = torch.ones(2, *SHAPE, dtype=torch.uint8)
        assert normalising.prepare(x) is x

    @pytest.mark.parametrize(
        ("x", "error"),
        [(torch.zeros(2, 3, 16), ValueError), (torch.zeros(2, *SHAPE, dtype=torch.float64), TypeError)],
        ids=["shape", "dtype"],
    )
    def test_they_are_checked_all_the_same(self, normalising: ResidentEngine, x: torch.Tensor, error: Any) -> None:
        with pytest.raises(error, match=r"^x "):
            normalising.prepare(x)


def test_it_runs_by_the_rule_of_its_plan(net: Any, x: torch.Tensor) -> None:
    """Another thread may change the network's, with thresholds that belong to that one."""
    other = net.with_criterion("margin").eval()
    spread_thresholds(other, x, 0.5)
    engine = eefast.accelerate(other, engine="resident").engine
    expected, thresholds = one_by_one(other, x), other.thresholds.clone()
    other.criterion = eefast.criteria.get("entropy")
    assert torch.equal(engine.run(x, thresholds).exit_index, expected.exit_index)


class Answered(nn.Module):
    """What a program answers, as a module that can be exported."""

    def __init__(self, engine, thresholds):
        super().__init__()
        program = engine.program
        for name in ("steps", "maps", "groups", "weights", "packed"):
            self.register_buffer(name, getattr(program, name))
        self.register_buffer("thresholds", thresholds.clone())
        self.rest = engine.plan.criterion, engine.net.num_classes, program.bfloat16

    def forward(self, x):
        tables = self.steps, self.maps, self.groups, self.weights, self.packed
        return torch.ops.eefast.resident_forward(x, *tables, self.thresholds, *self.rest)


def test_exported_with_a_dynamic_batch_it_answers_any_size(net, engine, x):
    module, batch = Answered(engine, net.thresholds), torch.export.Dim("batch")
    exported = torch.export.export(module, (x[:5],), dynamic_shapes={"x": {0: batch}}).module()
    for n in (1, 5, 31, 65):
        for got, wanted in zip(exported(x[:n]), module(x[:n]), strict=True):
            assert len(got) == n
            assert torch.equal(got, wanted)
