"""A release of torch → an environment with it, where the library that was built for another torch passes the tests.

    python tests/second_torch/second_torch.py                       # the oldest torch that eefast supports
    python tests/second_torch/second_torch.py --torch 2.12.1
    python tests/second_torch/second_torch.py tests/network -x      # other tests, words for pytest

The environment, 6 GB, stays in build/torch-VERSION. Where its packages cannot be had, the command says so and ends with
0, as skipped tests do. What is not among the tests below is said, too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]  # type: ignore[index]
PACKAGES = (
    "torchvision",
    "timm",
    "triton",
    "numpy<2.4",
    "safetensors",
    "typer",
    "rich",
    "pyyaml",
    "pillow",
    "matplotlib",
)
FOR_TESTS = ("pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "packaging", "setuptools", "wheel")
TESTS = ("checkpoint", "engines", "exporting", "modules", "network", "ops", "planning", "quantization", "surgery")
"""Folders of tests of what depends on torch: its operators, its stable interface, torch.fx, torch.export."""

LEFT_OUT = {
    "ops/test_aot.py": "compiles with Triton of the first environment; make aot TRITON=VERSION compiles with another",
}
GIGABYTES = 8
"""Of free disk that a new environment needs, with the files that pip fetches."""


def main() -> int:
    options = parsed()
    folder = ROOT / "build" / f"torch-{options.torch}"
    python = folder / "bin" / "python"
    if not (folder / ".ready").is_file() and (problem := make(folder, options.torch)):
        print(f"torch {options.torch} was not tested: {problem}")
        return 0
    versions = (
        "import torch, eefast; from eefast import ops; print(torch.__version__, ops.CPP_MISSING or 'with kernels')"
    )
    print("torch", said([python, "-c", versions]), flush=True)
    words = options.words or [
        *(f"tests/{name}" for name in TESTS),
        *(f"--ignore=tests/{name}" for name in LEFT_OUT),
        *("-n", "2", "--dist", "worksteal"),
    ]
    if not options.words:
        others = sorted(p.name for p in (ROOT / "tests").iterdir() if any(p.glob("test_*.py")) and p.name not in TESTS)
        print(f"not run here: {', '.join(f'tests/{name}' for name in others)}")
        print(*(f"not run here: tests/{name}, which {why}" for name, why in LEFT_OUT.items()), sep="\n", flush=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=ROOT, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ}, check=False).returncode


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default=oldest(), help=f"its version; by default {oldest()}")
    options, options.words = parser.parse_known_args()
    return options


def oldest() -> str:
    return OLDEST if OLDEST.count(".") == 2 else f"{OLDEST}.0"


def make(folder: Path, torch: str) -> str:
    """The environment in `folder`; what hindered it, "" where it is there."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < GIGABYTES:
        return f"its environment needs {GIGABYTES} GB of disk, {free:.0f} are free"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = run([*install, "--no-cache-dir", f"torch=={torch}", *PACKAGES, *FOR_TESTS])
    if done.returncode:
        shutil.rmtree(folder)
        return f"its packages cannot be had: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
    # The kernels in the checkout are those that the first environment built: the library must fit both.
    subprocess.run(
        [*install, "--no-deps", "--no-build-isolation", "--editable", ROOT],
        env={**os.environ, "EEFAST_USE_CPP": "0"},
        check=True,
    )
    (folder / ".ready").touch()
    return ""


def run(words: list[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)


def said(words: list[object]) -> str:
    done = run(words)
    if done.returncode:
        raise SystemExit(f"{words[-1]}: {done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
