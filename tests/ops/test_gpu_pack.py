"""Kernels packed here are found by Triton in another folder, by its own files; by another release they are not used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton here, so no kernels to pack")
import aot
import gpu_pack
from triton import knobs

from eefast import ops

missing = aot.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
KERNEL = "gather_survivors float16 64x1x1"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessPoolExecutor]:
    """A process in which kernels are compiled, not interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with aot.compilers(1) as pool:
        yield pool


def no_stages(*_: object) -> None:
    raise AssertionError("compiled again")


def found(folder: Path) -> str:
    """The kernel's name, from a cache that may not compile."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    source, gpu, options, _ = aot.prepare(aot.variants()[KERNEL][0], 90)
    with pytest.MonkeyPatch.context() as patch, knobs.cache.scope():
        patch.setattr(CUDABackend, "add_stages", no_stages)
        knobs.cache.dir = str(folder)
        return str(triton.compile(source, target=gpu, options=options.__dict__).metadata.name)


def placed(folder: Path, key: str | None) -> int:
    """Where Triton's files have another key, if one is given."""
    with pytest.MonkeyPatch.context() as patch:
        if key is not None:
            patch.setattr(gpu_pack.cache, "triton_key", lambda: key)
        return gpu_pack.place(folder)


@pytest.mark.slow
def test_packed_kernels_are_found_elsewhere(compiler: ProcessPoolExecutor, tmp_path: Path) -> None:
    (tmp_path / "library.so").write_text("a library")
    failures = gpu_pack.pack(tmp_path / "here", tmp_path / "library.so", 90, ["no such kernel", KERNEL], compiler)
    assert failures == ["no such kernel: KeyError: 'no such kernel'"]
    there = tmp_path / "there"
    shutil.move(tmp_path / "here", there)
    assert (there / "_C.abi3.so").read_text() == "a library"
    kernels = there / "triton"
    with pytest.raises(AssertionError, match="compiled again"):
        compiler.submit(found, kernels).result()
    # Placed for a Triton of other files, then for this one.
    other = shutil.copytree(kernels, tmp_path / "other")
    assert compiler.submit(placed, other, "other files").result() == 1
    with pytest.raises(AssertionError, match="compiled again"):
        compiler.submit(found, other).result()
    for _ in range(2):
        assert compiler.submit(placed, kernels, None).result() == 1
        assert compiler.submit(found, kernels).result() == "_gather_survivors_kernel"


def test_kernels_of_another_release_are_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / gpu_pack.PACKED).write_text(json.dumps({"triton": "1.0", "keys": {}}))
    assert gpu_pack.main(["--place", str(tmp_path)]) == 1
    assert "packed by Triton 1.0, here is" in capsys.readouterr().err


@pytest.mark.skipif(ops.CUDA_MISSING is not None, reason=f"CUDA kernels: {ops.CUDA_MISSING}")
def test_generations_of_the_built_library() -> None:
    library = next((gpu_pack.ROOT / "eefast").glob("_C*.so"))
    wanted = {"80"} if "TORCH_CUDA_ARCH_LIST" in os.environ else {"80", "90a"}
    assert gpu_pack.generations(library) >= wanted
