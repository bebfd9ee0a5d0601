"""What runs the ops on GPUs: chosen by what is installed, or by name."""

from __future__ import annotations

import pytest

from eefast import ops


@pytest.mark.parametrize(
    ("name", "message"),
    [("opencl", r"EEFAST_EXIT_KERNELS='opencl' is unknown; set it to triton or cuda"), ("", "")],
)
def test_exit_kernels_by_name(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv("EEFAST_EXIT_KERNELS", name)
    if message:
        with pytest.raises(ValueError, match=message):
            ops.exit_kernels()
    else:
        assert ops.exit_kernels() in ("triton", "cuda", "")


@pytest.mark.skipif(ops.CUDA_MISSING is not None, reason=f"CUDA kernels: {ops.CUDA_MISSING}")
def test_the_library_has_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EEFAST_EXIT_KERNELS", "cuda")
    assert ops.exit_kernels() == "cuda"
