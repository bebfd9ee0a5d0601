"""The C++ kernels with fewer vector instructions: the answers of float64; AVX2's are those of AVX-512, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import instruction_sets
import pytest
import torch

from eefast import ops

pytestmark = pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")

FLOATS = ["test_resident_forward.py", "test_resident_layers.py"]
BYTES_AND_EXITS = ["test_resident_int8.py", "test_exit_head.py"]
OF_FLOATS = (
    "(test_resident_forward or test_resident_layers) and "
    "(instruction_set_is or infinite or margin or (networks and (eenet8 or 2x9x14)) or every_batch)"
)
OF_BYTES = (
    "test_resident_int8 and not reference and (instruction_set_is or extreme or largest or nan or (chains and 0-cpp))"
)
OF_EXITS = (
    "test_exit_head and ((cpp and ((layouts and (float32 or bfloat16)) or large or far or (sizes and 31)))"
    " or (depends and float32-channels_last))"
)
JOBS = {
    "portable": (FLOATS, OF_FLOATS),
    "avx2": (FLOATS + BYTES_AND_EXITS, f"({OF_FLOATS}) or ({OF_BYTES}) or ({OF_EXITS})"),
    "avx3": ([], ""),
}
"""Instruction set → test files, and which of their tests."""
BEST = ops.instruction_set(), ops.int8_instruction_set()


def started(folder: Path, jobs: list[tuple[str, list[str], str]]) -> list[int]:
    """The kernels choose their instructions once per process, so each set has another one."""
    command = [sys.executable, instruction_sets.__file__, str(folder), json.dumps(jobs)]
    variables = {**os.environ, "PYTHONPATH": str(Path(instruction_sets.__file__).parent)}
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Instruction set → exit code of pytest, what it printed, the file with answers."""
    folder = tmp_path_factory.mktemp("sets")
    codes = started(folder, [(name, *job) for name, job in JOBS.items()])
    return {
        name: (code, (folder / f"{name}.txt").read_text(), folder / f"{name}.pt")
        for name, code in zip(JOBS, codes, strict=True)
    }


@pytest.mark.parametrize("name", ["portable", "avx2"])
def test_answers_are_those_of_float64(ran: dict[str, tuple[int, str, Path]], name: str) -> None:
    if name in BEST[:1] and name in BEST[1:]:
        pytest.skip(f"{name} is the best here, which all other tests use")
    if BEST[0] == "portable":
        pytest.skip("no AVX2 here")
    code, printed, _ = ran[name]
    assert code == 0, printed
    assert printed.startswith(f"{name} {name}\n")
    assert "skipped" not in printed


@pytest.mark.skipif(not BEST[0].startswith("avx512"), reason=f"no AVX-512, but {BEST[0]}")
def test_avx2_answers_as_avx512(ran: dict[str, tuple[int, str, Path]]) -> None:
    """Both add in the same order, so a network answers alike, to the bit, on all machines that have either."""
    for found, wanted in zip(torch.load(ran["avx2"][2]), instruction_sets.answers(), strict=True):
        assert torch.equal(found, wanted)


def test_an_unknown_one_is_refused(ran: dict[str, tuple[int, str, Path]]) -> None:
    code, printed, _ = ran["avx3"]
    assert code != 0
    names = "portable, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16"
    assert printed.strip() == f"EEFAST_ISA=avx3 is unknown; choose one of {names}"


@pytest.mark.slow
@pytest.mark.skipif(BEST[1] == "portable", reason="portable is the best here, which all other tests use")
def test_portable_bytes_and_exits(tmp_path: Path) -> None:
    codes = started(tmp_path, [("portable", BYTES_AND_EXITS, f"({OF_BYTES}) or ({OF_EXITS})")])
    assert codes == [0], (tmp_path / "portable.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "name"), [("default", "portable"), ("avx2", "avx2")])
@pytest.mark.skipif(BEST[0] == "portable", reason="portable is the best here")
def test_the_variable_of_pytorch_limits_them(capability: str, name: str) -> None:
    code = "from eefast import ops; print(ops.instruction_set(), ops.int8_instruction_set())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{name} {name}\n"
