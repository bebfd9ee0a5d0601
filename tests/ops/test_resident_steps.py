"""The walk over a table of steps, with steps that compute something simple, and the checks of the tables."""

import math

import pytest
import torch

from eefast.ops.resident_steps import (
    COLUMNS,
    Activation,
    Kind,
    Step,
    activated,
    answers,
    check_tables,
    joined,
    parts,
)  # fmt: skip

BASE = dict.fromkeys(COLUMNS, 0) | {"residual": -1, "kernel": 1, "stride": 1}


def table(*rows):
    return torch.tensor([[(BASE | row)[column] for column in COLUMNS] for row in rows])


CONVOLUTION = {"kind": Kind.CONVOLUTION, "source": 0, "target": 1}
EARLY = {"kind": Kind.EXIT, "source": 1, "target": 0}
DOUBLED = {"kind": Kind.CONVOLUTION, "source": 1, "target": 2, "residual": 1}
LAST = {"kind": Kind.EXIT, "source": 2, "target": 1}
MAPS = torch.tensor([[1, -1], [1, 0], [1, 0]])


def compute(step, x, residual, outputs):
    """A convolution adds one and the residual; an exit says the mean and its negative, then the mean as confidence."""
    if step.kind == Kind.EXIT:
        assert outputs == 3
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, -mean, mean], 1)
    return x + 1 + (0 if residual is None else residual)


def walked(image, *rows, thresholds=(0.9,)):
    return answers(image, table(*rows), MAPS, torch.tensor(thresholds), "learned", 2, compute)


def test_samples_exit_where_they_are_confident_enough():
    image = torch.tensor([-3.0, 4.0, 0.5]).view(3, 1, 1, 1)
    logits, confidence, exits = walked(image, CONVOLUTION, EARLY, DOUBLED, LAST)
    # After the first step -2, 5, 1.5, whose sigmoids are .12, .993, .82; after the second 2 x + 1.
    assert exits.tolist() == [1, 0, 1]
    assert logits.tolist() == [[-3, 3], [5, -5], [4, -4]]
    torch.testing.assert_close(confidence, torch.tensor([-3.0, 5.0, 4.0]).sigmoid())


def test_an_empty_batch():
    logits, confidence, exits = walked(torch.empty(0, 1, 1, 1), CONVOLUTION, EARLY, DOUBLED, LAST)
    assert [tuple(x.shape) for x in (logits, confidence, exits)] == [(0, 2), (0,), (0,)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": 7}, "there is no map 7, or not yet"),
        ({"source": 2}, "there is no map 2, or not yet"),
        ({"target": 9}, "there is no map 9"),
        ({"residual": 2}, "there is no map 2, or not yet"),
        ({"kind": 17}, "no such kind of step"),
        ({"kernel": 0}, "no kernel for this window"),
        ({"stride": 129}, "no kernel for this window"),
        ({"padding": 2}, "no kernel for this window"),
        ({"kind": Kind.EXIT, "target": 5, "source": 0}, "no such kind of step or exit"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_computed_names_its_row(row, message):
    with pytest.raises(RuntimeError, match=rf"steps\[0\] = \[.*{message}"):
        walked(torch.ones(1, 1, 1, 1), CONVOLUTION | row, EARLY, DOUBLED, LAST)


CONSTANTS = [-200.0, -30.0, -3.5, -3.0, -0.7, -0.0, 0.3, 2.9, 3.0, 6.0, 6.5, 90.0]
FORMULAS = {
    Activation.NONE: lambda x: x,
    Activation.RELU: lambda x: max(x, 0.0),
    Activation.RELU6: lambda x: min(max(x, 0.0), 6.0),
    Activation.SILU: lambda x: x / (1 + math.exp(-x)),
    Activation.HARDSWISH: lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    Activation.HARDSIGMOID: lambda x: min(max(x + 3, 0.0), 6.0) / 6,
    Activation.SIGMOID: lambda x: 1 / (1 + math.exp(-x)),
    Activation.GELU: lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
}


@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.name)
def test_activations(activation):
    x = torch.tensor(CONSTANTS, dtype=torch.float64)
    wanted = torch.tensor([FORMULAS[activation](value) for value in CONSTANTS], dtype=torch.float64)
    torch.testing.assert_close(activated(x, activation), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("code", [-1, 8])
def test_there_is_no_other_activation(code):
    with pytest.raises(RuntimeError, match="there is no such activation"):
        activated(torch.ones(1), code)


def test_joined_maps():
    x, target = torch.ones(2, 3, 1, 2), torch.full((2, 5, 1, 2), 7.0)
    assert joined(x, None, 1, 5)[1, :, 0, 1].tolist() == [0, 1, 1, 1, 0]
    assert joined(x, target, 2, 5)[0, :, 0, 0].tolist() == [7, 7, 1, 1, 1]
    assert (target == 7).all()
    with pytest.raises(RuntimeError):
        joined(x, None, 3, 5)


def test_parts_follow_one_another():
    weights = torch.arange(10.0)
    first, second = parts(weights, 2, (2, 3), (1,))
    assert first.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert second.tolist() == [8]
    for place in (-1, 4):
        with pytest.raises(RuntimeError, match="outside of weights"):
            parts(weights, place, (2, 3), (1,))


GIVEN = {
    "images": torch.ones(2, 1, 3, 3), "steps": table(CONVOLUTION, EARLY, DOUBLED, LAST), "maps": MAPS,
    "weights": torch.ones(4), "thresholds": torch.ones(1), "num_classes": 2,
    "criterion": "learned", "rule": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"images": torch.ones(1, 3, 3)}, r"images has shape \[1, 3, 3\]; expected \[N, C, H, W\]"),
        ({"images": torch.ones(2, 4, 3, 3)}, "images has 4 channels; expected 1"),
        ({"steps": torch.ones(3, 5, dtype=torch.int64)}, r"steps has shape \[3, 5\]; expected \[S, 15\]"),
        ({"steps": table(CONVOLUTION)}, "steps ends with no final exit"),
        ({"steps": table(CONVOLUTION, EARLY)}, "steps ends with no final exit"),
        ({"steps": table(CONVOLUTION, EARLY, DOUBLED, LAST).int()}, r"steps is torch.int32; .*torch.int64"),
        ({"maps": torch.ones(3, 3, dtype=torch.int64)}, r"maps has shape \[3, 3\]; expected \[M, 2\]"),
        ({"weights": torch.ones(4, dtype=torch.float64)}, r"weights is torch.float64; .*torch.float32"),
        ({"thresholds": torch.ones(1, 1)}, r"thresholds has shape \[1, 1\]; expected \[exits\]"),
        ({"num_classes": 0}, "num_classes = 0; expected 1 or more"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:40],
)
def test_tables_are_checked(changed, message):
    if message is None:
        check_tables(**GIVEN, **changed)
        return
    with pytest.raises(RuntimeError, match=message):
        check_tables(**{**GIVEN, **changed})


def test_columns_are_the_step():
    assert Step(*range(len(COLUMNS)))._asdict() == {name: i for i, name in enumerate(COLUMNS)}
