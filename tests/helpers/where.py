"""Where the Triton kernels run in these tests: on the GPU where there is one, else in Triton's interpreter."""

import contextlib
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # Read when a kernel is defined, so before eefast.kernels is imported.
    os.environ["TRITON_INTERPRET"] = "1"


def _problem() -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed"
    if GPU:
        return "the kernels are compiled here, not interpreted"
    if tuple(map(int, triton.split(".")[:2])) < (3, 8) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton} fails with NumPy {np.__version__}; install numpy<2.4"
    return ""


interpreted = pytest.mark.skipif(bool(_problem()), reason=_problem())
runs_triton = pytest.mark.gpu if GPU else interpreted


@contextlib.contextmanager
def run_by_triton(*ops: str) -> Iterator[None]:
    """Runs the ops on the CPU by the interpreted Triton kernels, instead of C++ or the references."""
    from eefast import ops as modules

    library = torch.library.Library("eefast", "IMPL")
    for name in ops:
        library.impl(name, getattr(modules, name).run_triton, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
