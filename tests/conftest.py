"""What all tests share: a quiet number of threads, poisoned fresh memory, Triton interpreted where no GPU is."""

import os

import pytest
import torch
from where import GPU

# Parallel test processes with several spinning threads each slow one another down many times over.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def poison_fresh_memory():
    """Uninitialised tensors are filled with NaN or the largest integer, so that reading them shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_report_header():
    return "GPU tests: " + (
        torch.cuda.get_device_name() if GPU else "deselected, no CUDA device; run `make gpu` on one"
    )


def pytest_collection_modifyitems(config, items):
    if GPU:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True, scope="session")
def assert_in_the_interpreter():
    """Interpreted kernels obey `tl.device_assert` as compiled ones do, see `Launch.options`."""
    if not GPU:
        from triton.runtime import interpreter

        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
