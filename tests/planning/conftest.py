"""What tests of planning share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def seeded_without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield
