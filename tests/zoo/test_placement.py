"""Where exits are put: the schemes of the paper, and how many exits fit."""

import time

import numpy as np
import pytest
import torch

from eefast.zoo.placement import SCHEMES, place


def longest(costs, placement):
    """The most exits that the scheme fits into the blocks, by trying every number with the definition itself."""
    found = 0
    for n in range(1, len(costs) + 1):
        exits = 0
        for cost in costs:
            exits += exits < n and cost >= SCHEMES[placement](exits, n)
        found = n if exits == n else found
    return found


@pytest.mark.parametrize("placement", SCHEMES)
@pytest.mark.parametrize("blocks", [0, 1, 3, 9, 54, 257])
def test_the_number_of_exits_that_fit_is_counted_at_once(blocks, placement):
    """Asking for thousands of exits takes no longer than for one too many."""
    random = torch.Generator().manual_seed(blocks)
    costs = torch.rand(blocks, generator=random).cumsum(0).div(blocks / 2 + 1).tolist()
    fit = longest(costs, placement)
    assert fit == 0 or len(place(costs, fit, placement)) == fit
    begin = time.process_time()
    for num_exits in (blocks + 1, 99 + blocks, 10**9, 10**400):
        with pytest.raises(ValueError, match=rf"num_exits={num_exits} .* fit: {fit} exits fit into {blocks} blocks"):
            place(costs, num_exits, placement)
    # Each try costs about as much as n placements; calling itself for each it took twice as long per exit.
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("whole", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_other_libraries(whole):
    assert place([0.2, 0.5, 0.7, 1.0], whole, "linear") == place([0.2, 0.5, 0.7, 1.0], 3, "linear") == (2, 3, 4)
    assert place([0.2, 0.5, 0.7, 1.0], 1, [whole]) == (3,)
