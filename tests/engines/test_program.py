"""Plans as values: printed, compared and pickled; the arguments of the resident op in its order."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from networks import lived_in

import eefast
from eefast import ops, zoo
from eefast.engines.program import Plan, ResidentProgram, StagePlan, with_times

STAGES = (StagePlan((16, 8, 4), 0.256, "C++", "folded"), StagePlan((8, 1, 1), 0.744, "C++ with conv", "not folded"))
PLAN = Plan("compact", torch.device("cpu"), torch.bfloat16, "entropy", ("asked for by name", "a note"), STAGES)


def test_it_prints_as_a_table() -> None:
    assert str(PLAN).splitlines() == [
        "compact engine, cpu, bfloat16: asked for by name; a note",
        "exit  features  MACs   exit kernel    stage",
        "0     16×8×4    25.6%  C++            folded",
        "1     8×1×1     74.4%  C++ with conv  not folded",
    ]


def test_time_beside_macs_where_every_stage_was_measured() -> None:
    assert with_times(STAGES, (0.5, 0.0)) == STAGES
    assert str(replace(PLAN, stages=with_times(STAGES, (3.0, 1.0)))).splitlines()[1:] == [
        "exit  features  MACs   time   exit kernel    stage",
        "0     16×8×4    25.6%  75.0%  C++            folded",
        "1     8×1×1     74.4%  25.0%  C++ with conv  not folded",
    ]


def test_words_for_convolutions_are_explained_where_they_are_used() -> None:
    stages = (STAGES[0], StagePlan((8, 1, 1), 0.744, "C++", "8×4 F(4×4) by 4, 4×2 direct"))
    *table, legend = str(replace(PLAN, engine="resident", stages=stages)).splitlines()
    assert len(table) == 4
    assert all(word in legend for word in ("F(4×4) by 4", "Winograd", "direct", "images at a time"))


def test_the_plan_of_a_network_has_a_row_for_each_exit() -> None:
    net: Any = lived_in(zoo.eenet("eenet20", 2, "linear", "bnpool", input_shape=(3, 16, 16)), 1)
    text = str(eefast.accelerate(net, engine="compact", stages="pytorch").plan)
    lines = text.splitlines()
    assert lines[0].startswith("compact engine, cpu, float32: ")
    assert len(lines) == 2 + 3
    assert all("folded" in line for line in lines[2:])
    assert ("C++" if ops.CPP_MISSING is None else ops.CPP_MISSING) in text
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[2:]]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_copies_are_equal() -> None:
    for other in (replace(PLAN), pickle.loads(pickle.dumps(PLAN))):
        assert other == PLAN
        assert hash(other) == hash(PLAN)
    with pytest.raises(FrozenInstanceError):
        PLAN.engine = "resident"  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [{"engine": "resident"}, {"dtype": torch.float32}, {"reasons": ("a note",)}, {"stages": STAGES[:1]}],
    ids=lambda change: next(iter(change)),
)
def test_other_plans_are_not(change: dict[str, Any]) -> None:
    assert replace(PLAN, **change) != PLAN


@pytest.mark.parametrize("image", [None, torch.ones(2, 3)], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_resident_op_gets_all_parts_of_a_program(monkeypatch, image, dtype) -> None:
    parts = {name: torch.tensor(i) for i, name in enumerate(("steps", "maps", "groups", "weights", "packed"))}
    program = ResidentProgram(
        **parts, bfloat16=image is None, algorithms=(0,), group_sizes=(1,), image=image, normalization=torch.ones(2, 3)
    )
    calls = []
    op = ops.resident_forward if image is None else ops.resident_int8
    monkeypatch.setattr(op, "run", lambda *given: calls.append(given))
    images, thresholds, seconds = torch.ones(2, 3, 5, 5, dtype=dtype), torch.zeros(2), torch.zeros(1)
    program.run(images, thresholds, "entropy", 10, 3, seconds)
    names = [a.name for a in getattr(torch.ops.eefast, op.__name__.split(".")[-1]).default._schema.arguments]
    given = dict(zip(names, *calls, strict=True))
    assert all(given[name] is part for name, part in parts.items())
    assert given["thresholds"] is thresholds
    assert given["seconds"] is seconds
    assert (given["criterion"], given["num_classes"], given["threads"]) == ("entropy", 10, 3)
    assert given["images"].dtype == dtype
    if image is None:
        assert given["bfloat16"]
        assert (given["normalization"] is not None) == (dtype == torch.uint8)
    else:
        assert given["image"] is image
