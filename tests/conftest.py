"""What all tests share: a quiet number of threads, poisoned fresh memory."""

import os

import pytest
import torch

# Parallel test processes with several spinning threads each slow one another down many times over.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def poison_fresh_memory():
    """Uninitialised tensors are filled with NaN or the largest integer, so that reading them shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
