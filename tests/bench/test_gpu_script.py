"""`bench/gpu.sh` with a stand-in for Python that finds a GPU: order, budgets, files, what it says at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import gpu_smoke
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
# Says what it was called with; writes a row where a measurement would; fails where FAIL is in the words.
STAND_IN = r"""#!/usr/bin/env bash
words="$*"
case "$words" in
  *sys.executable*) echo "$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"; exit ;;
  *"import xdist"*) exit 1 ;;
  *get_device_capability*) echo 9.0a; exit ;;
  *cuda.is_available*) exit ;;
  *EEFAST_ISA*|*instruction_set*) exit ;;
esac
echo "called: $words"
[[ "$words" != *smoke* ]] || echo "cache: ${TRITON_CACHE_DIR:-}"
case "$words" in
  *throughput.py*|*ops.py*|*parity.py*) echo '{"row": 1}' >> "$OUT/a-gpu.jsonl" ;;
esac
if [ -n "${FAIL:-}" ] && [[ "$words" == *"$FAIL"* ]]; then echo "it broke"; exit 7; fi
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("bench", "eefast", "kernels", "tests/engines"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(BENCH / "gpu.sh", tmp_path / "bench")
    (tmp_path / "eefast" / "__init__.py").touch()
    (tmp_path / "tests/engines/test_one.py").write_text("@pytest.mark.gpu\n")
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\necho 1 passed in 0.1s\n")
    (tmp_path / "compute-sanitizer").chmod(0o755)
    (tmp_path / "ncu").write_text("#!/bin/sh\necho called by ncu: $*\n")
    (tmp_path / "ncu").chmod(0o755)
    return tmp_path


def run(tree: Path, *phases: str, **variables: str) -> tuple[int, list[str], dict[str, str]]:
    """Exit code, lines of the output, log of each phase."""
    found = os.environ | {"PYTHON": str(tree / "python"), "OUT": str(tree / "out"), **variables}
    found["PATH"] = f"{tree}:{found['PATH']}"
    if "EEFAST_LIBRARY" not in variables:
        found.pop("EEFAST_LIBRARY", None)
    done = subprocess.run(
        ["bash", str(tree / "bench/gpu.sh"), *phases], env=found, capture_output=True, text=True, timeout=60
    )
    logs = {}
    with tarfile.open(tree / "out/logs.tar.gz") as packed:
        for member in packed.getmembers():
            if member.isfile():
                logs[Path(member.name).stem] = packed.extractfile(member).read().decode()  # type: ignore[union-attr]
    return done.returncode, done.stdout.splitlines(), logs


def phases_in(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines if re.match(r"\w+ +(ok|FAILED|TIMED OUT)", line)]


def test_all_phases_in_order_and_few_files(tree: Path) -> None:
    code, lines, logs = run(tree, BUDGET="10000")
    order = ["build", "smoke", "key", "compact", "throughput", "profile", "ops", "sanitize", "parity", "tests"]
    assert code == 0, lines
    assert phases_in(lines) == [*order, *order], "after each phase, and together at the end"
    assert set(logs) == set(order)
    assert "bench/gpu_smoke.py" in logs["smoke"]
    assert "-k TestOnTheGpu or " in logs["key"]
    assert "called: bench/precompile.py" in logs["key"]
    assert "called: bench/gpu_profile.py" in logs["profile"]
    assert "called by ncu: " in logs["profile"]
    assert "--engine compact" in logs["compact"]
    assert lines[-1] == "NEXT="
    assert len(list((tree / "out").iterdir())) == 3 <= 8
    assert phases_in((tree / "out/summary.txt").read_text().splitlines()) == order


def test_what_does_not_fit_is_the_next_command(tree: Path) -> None:
    """The first phase runs in any case; shorter ones after one that does not fit do, too."""
    code, lines, _ = run(tree, "tests", "smoke", "ops", "parity", BUDGET="60")
    assert code == 0
    assert phases_in(lines)[:3] == ["tests", "smoke", "parity"]
    assert lines[-1] == "NEXT=BUDGET=180 bench/gpu.sh ops"


def test_a_phase_that_fails_is_told_and_others_run(tree: Path) -> None:
    code, lines, logs = run(tree, "compact", "throughput", FAIL="--engine compact")
    assert code == 1
    assert any(line.startswith("compact     FAILED (7)") for line in lines)
    assert "    it broke" in lines
    assert any(line.startswith("throughput  ok") for line in lines)
    assert logs["compact"].endswith("it broke\n")


def test_kernels_built_before_are_not_built_again(tree: Path) -> None:
    _, _, logs = run(tree, "build", EEFAST_LIBRARY="/there/_C.abi3.so")
    assert logs["build"] == "not built: EEFAST_LIBRARY=/there/_C.abi3.so\n"


@pytest.mark.parametrize("fails", [False, True])
def test_packed_kernels_are_placed_before_any_phase(tree: Path, fails: bool) -> None:
    """Where they are not for this Triton, its usual cache is used."""
    (tree / "packed").mkdir()
    (tree / "packed/packed.json").write_text("{}")
    variables = {"TRITON_CACHE_DIR": str(tree / "packed"), **({"FAIL": "--place"} if fails else {})}
    _, lines, logs = run(tree, "smoke", **variables)
    assert lines[0] == f"called: tests/helpers/gpu_pack.py --place {tree}/packed"
    assert f"cache: {'' if fails else tree / 'packed'}\n" in logs["smoke"]


@pytest.mark.parametrize("device", ["cpu"])
def test_smoke_runs_here_on_small_shapes(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_smoke.smoke(device)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [next(iter(line)) for line in found] == ["versions", "resident", *["heads"] * 2, *["convolutions"] * 2]
    assert found[1]["resident"]["same exits"] == 1.0


def test_a_part_of_smoke_that_fails_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device: str) -> None:
        raise OSError("no such kernel\nat all")

    monkeypatch.setattr(gpu_smoke, "PARTS", (broken, gpu_smoke.versions))
    assert not gpu_smoke.smoke("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '{"broken": {"failed": "OSError: no such kernel"}}'
    assert "versions" in lines[1]


@pytest.mark.parametrize("packed", [False, True])
def test_train_unpacks_the_archive_of_images(tree: Path, packed: bool) -> None:
    images = tree / "data" / "cifar10-jpeg"
    (images / "train" / "cat").mkdir(parents=True)
    (tree / "data" / "mnist").mkdir()
    if packed:
        with tarfile.open(images / "images.tar.xz", "w:xz") as archive:
            archive.add(images / "train", "train")
        shutil.rmtree(images / "train")
    code, _, logs = run(tree, "train", ONLY="eenet110", DATA="data")
    root = Path("build/gpu/data" if packed else "data")
    assert code == 0
    assert f"training.py --device cuda --data-root {root} " in logs["train"]
    assert "--only eenet110" in logs["train"]
    assert (tree / root / "cifar10-jpeg" / "train" / "cat").is_dir()
    assert (tree / root / "mnist").is_dir()
