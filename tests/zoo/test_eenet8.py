"""EENet-8: the costs of its exits."""

import pytest
import torch

from eefast import zoo


@pytest.mark.parametrize(
    ("filters", "exact"),
    [(2, (86_262, 138_812, 188_240)), (4, (285_420, 478_328, 664_992))],
)
def test_eenet8_has_its_real_costs(filters, exact):
    net = zoo.eenet("eenet8", input_shape=(1, 28, 28), filters=filters)
    torch.testing.assert_close(net.cost, torch.tensor(exact) / exact[-1], rtol=0, atol=1e-3)
