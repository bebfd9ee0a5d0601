"""Proof by compilation: registers, spills and blocks per multiprocessor of every CUDA kernel, per GPU generation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import eefast
from eefast import ops, zoo
from eefast.planning.lowering import lower
from eefast.planning.packing import cuda_program

THREADS, REGISTERS = 256, 65536
# Kibibytes of shared memory: per multiprocessor, and at most per block; the system keeps one per block.
SHARED = {"sm_80": (164, 163), "sm_86": (100, 99), "sm_89": (100, 99), "sm_90a": (228, 227), "sm_100": (228, 227)}


def cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    try:
        from triton import knobs

        return str(knobs.nvidia.cuobjdump.path)
    except (ImportError, AttributeError):
        return None


def library() -> Path:
    return next(Path(eefast.__file__).parent.glob("_C*.so"))


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, dict[str, int]]]:
    """Generation → kernel → what it uses: REG, STACK, SHARED, LOCAL."""
    if ops.CUDA_MISSING:
        pytest.skip(f"CUDA kernels: {ops.CUDA_MISSING}")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, which comes with the CUDA toolkit and with Triton")
    text = subprocess.run([tool, "-res-usage", library()], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    generation, kernel = "", ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            generation = match[1]
        elif match := re.match(r"\s*Function (\S+?):?$", line):
            kernel = match[1]
        elif "REG:" in line:
            found[generation][kernel] = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
    return found


def test_every_generation_is_there(usage: dict[str, dict[str, dict[str, int]]]) -> None:
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert set(usage) == set(SHARED)
    for kernels in usage.values():
        # Without and with a rule.
        assert sum("resident_kernel" in name for name in kernels) == 2 * 2
        # Few classes: without and with a rule. Many: pooling, logits, decisions without and with a rule.
        assert sum("exit_head" in name for name in kernels) == 2 * 6 + 6 + 1 + 2
        assert sum("gather_survivors" in name for name in kernels) >= 4


def test_nothing_spills(usage: dict[str, dict[str, dict[str, int]]]) -> None:
    for generation, kernels in usage.items():
        for name, used in kernels.items():
            assert used["STACK"] == 0, (generation, name)
            assert used["LOCAL"] == 0, (generation, name)


def test_pooling_for_many_classes_has_several_loads_on_their_way(usage: dict[str, dict[str, dict[str, int]]]) -> None:
    """Four of 16 bytes per thread and more: with 132 multiprocessors of three blocks 6 MB."""
    aot = pytest.importorskip("aot", reason="no Triton here, whose helpers read machine code")
    if "sm_90a" not in usage:
        pytest.skip("needs the kernels for sm_90a")
    command = [cuobjdump(), "-sass", "-arch", "sm_90a", library()]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {code.split(maxsplit=1)[0]: code for code in text.split("Function : ")[1:]}
    found = {
        name: aot.in_flight(code) for name, code in kernels.items() if re.search(r"exit_head_poolI.*Li[48]E", name)
    }
    assert len(found) == 3
    assert min(found.values()) >= 64, found


@pytest.mark.parametrize(
    ("name", "shape"), [("eenet20", (3, 32, 32)), ("eenet110", (3, 32, 32)), ("eenet8", (1, 28, 28))]
)
def test_blocks_of_the_resident_kernel(
    usage: dict[str, dict[str, dict[str, int]]], name: str, shape: tuple[int, int, int]
) -> None:
    """Two blocks per multiprocessor hide one another's waiting; one where shared memory allows no more.

    EENet-8 keeps a third map of the largest size, since it has BatchNorms before its convolutions.
    """
    shape = (1, 28, 28) if name == "eenet8" else (3, 32, 32)
    net = zoo.eenet(name, 2, input_shape=shape).eval()
    p = cuda_program(lower(net), torch.float16, torch.device("cpu"))
    size = ops.resident_shared_memory(
        torch.empty(0, *shape), p.steps, p.maps, p.groups, p.packed, net.thresholds, "learned", 10, False
    )
    for generation, kernels in usage.items():
        if generation not in SHARED:
            continue
        whole, most = SHARED[generation]
        assert size <= most * 1024
        for used in (used for kernel, used in kernels.items() if "resident_kernel" in kernel):
            by_registers = REGISTERS // (-(-used["REG"] // 8) * 8 * THREADS)
            by_memory = whole * 1024 // (size + 1024)
            one = whole == 100 or (whole == 164 and name == "eenet8")
            assert min(by_registers, by_memory) == (1 if one else 2), (generation, used, size)
