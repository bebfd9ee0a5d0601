"""Features between the stages of a quantised network as integers, and back."""

from __future__ import annotations

import pytest
import torch
from networks import images, lived_in
from quantized_networks import network

from eefast import zoo
from eefast.engines.parts import features_of, part_of
from eefast.result import ExitResult

SHAPE = (3, 9, 7)


def result(count: int) -> ExitResult:
    return ExitResult(torch.zeros(count, 7), torch.zeros(count).long(), torch.zeros(count), torch.zeros(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_integers_hold_the_features_of_a_quantised_stage(dtype: torch.dtype) -> None:
    net = network(1, SHAPE)
    features = net.stages[0](images(5, SHAPE).to(dtype))
    part = part_of(net, 0, result(5), torch.arange(5), torch.arange(5), features)
    assert part.features is not None
    assert part.features.dtype == torch.uint8
    wanted = net.stages[0].integers(net.stages[0].input_integers(images(5, SHAPE)))[net.stages[0].output]
    assert torch.equal(part.features.float(), wanted)
    assert torch.equal(features_of(net, 1, part.features, dtype), features)


@torch.no_grad()
def test_images_with_nan_are_answered_at_once() -> None:
    net, x = network(1, SHAPE), images(5, SHAPE)
    x[3, 0, 0, 0] = float("nan")
    answers = result(5)
    # Rows 1, 3 and 4 came to the exit; their features are in another order.
    part = part_of(net, 0, answers, torch.tensor([1, 3, 4]), torch.tensor([2, 0, 1]), net.stages[0](x[[3, 4, 1]]))
    assert part.rows is not None
    assert part.places is not None
    assert (part.rows.tolist(), part.places) == ([1, 4], [2, 1])
    assert answers.exit_index.tolist() == [0, 0, 0, net.num_exits, 0]
    assert answers.logits.isnan().any(1).tolist() == [False, False, False, True, False]
    assert answers.cost[3] == net.cost[-1]


@torch.no_grad()
def test_other_networks_have_their_features_as_they_are() -> None:
    net = lived_in(zoo.eenet("eenet8", input_shape=SHAPE), 0)
    features = net.stages[0](images(2, SHAPE))
    part = part_of(net, 0, result(2), torch.arange(2), torch.arange(2), features)
    assert part.features is features
    assert features_of(net, 1, features, torch.float32) is features
