"""The repository → a wheel in dist/, whose content and binary interface are checked, then installed and tested.

    python tests/wheel/make_wheel.py                    # CPU kernels
    python tests/wheel/make_wheel.py --cuda             # CUDA kernels, too; needs nvcc
    python tests/wheel/make_wheel.py --pure             # without kernels, which is refused otherwise
    python tests/wheel/make_wheel.py --wheel FILE       # checks and tests a wheel that there is

It is installed into a fresh environment of every Python named by --pythons, with the torch that pip finds, where the
tests of `installed_tests.py` run in another folder; --no-install leaves that out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TESTS = ROOT / "tests" / "wheel" / "installed_tests.py"
LIBRARY = "eefast/_C.abi3.so"
# Symbols of torch that the library may use: its C interface, which stays from version to version.
STABLE = re.compile(r"(aoti_torch_|torch_)\w+")
OF_TORCH = re.compile(r"_ZN?K?(2at|3c10|5torch|6caffe2)")


def main() -> int:
    options = parsed()
    wheel = options.wheel or build(options.cuda, options.pure)
    check_names(wheel, options.pure)
    if not options.pure:
        check_symbols(wheel)
        for tool in ("abi3audit", "torch-abi-audit", "auditwheel"):
            audit(tool, wheel)
    if options.no_install:
        return 0
    pythons = found_pythons(options.pythons)
    if not pythons:
        raise SystemExit(f"no Python of {', '.join(options.pythons)} found; name others with --pythons")
    for version, python in pythons.items():
        install_and_test(wheel, version, python, options)
    missing = [version for version in options.pythons if version not in pythons]
    print(f"tested on Python {', '.join(pythons)}" + (f"; not found: {', '.join(missing)}" if missing else ""))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="with CUDA kernels")
    parser.add_argument("--pure", action="store_true", help="a wheel without kernels, for any platform")
    parser.add_argument("--wheel", type=Path, help="check this one instead of building one")
    parser.add_argument("--no-install", action="store_true")
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="X.Y", help=f"by default {' '.join(PYTHONS)}")
    parser.add_argument(
        "--torch", default="torch>=2.11", help="what pip installs; a folder of packages is used as it is"
    )
    return parser.parse_args()


def build(cuda: bool, pure: bool) -> Path:
    """A new wheel in dist/cpu, dist/cuda or dist/pure; ends where there is no compiler and pure was not asked for."""
    kind = "pure" if pure else "cuda" if cuda else "cpu"
    if cuda and shutil.which("nvcc") is None and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        raise SystemExit("--cuda needs nvcc on the PATH, or CUDA_HOME")
    folder = ROOT / "dist" / kind
    shutil.rmtree(folder, ignore_errors=True)
    variables = {"EEFAST_USE_CPP": "0" if pure else "1", "EEFAST_USE_CUDA": "1" if cuda else "0"}
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", f"build/wheel-{kind}"]
    # It would build once more, and compile everything again.
    command += ["bdist_wheel", "--skip-build", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_names(wheel: Path, pure: bool) -> None:
    """Ends for a wheel without kernels where they are wanted, and for one that lacks folders or has others."""
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [name for name in names if name.endswith((".so", ".pyd", ".dylib"))]
    if pure != wheel.name.endswith("-py3-none-any.whl") or libraries != ([] if pure else [LIBRARY]):
        wanted = "--pure asks for one without" if pure else "add --pure for one without them"
        raise SystemExit(f"{wheel.name} has the kernels {libraries}; {wanted}")
    if not pure and "-cp310-abi3-" not in wheel.name:
        raise SystemExit(f"{wheel.name} is for one Python only; it must be cp310-abi3")
    sources = [*(ROOT / "eefast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    wanted_names = {
        ("eefast/" * (p.parts[len(ROOT.parts)] == "kernels")) + p.relative_to(ROOT).as_posix() for p in sources
    }
    if lacking := sorted(wanted_names - set(names)):
        raise SystemExit(f"{wheel.name} lacks {', '.join(lacking)}; list their folders in pyproject.toml")
    tops = {name.partition("/")[0] for name in names}
    if others := sorted(top for top in tops if top not in ("eefast", "eefast_command.py") and ".dist-info" not in top):
        raise SystemExit(f"{wheel.name} also has {', '.join(others)}")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def check_symbols(wheel: Path) -> None:
    """Ends where the library needs functions of torch's C++ interface, which change with its versions."""
    with tempfile.TemporaryDirectory() as folder:
        library = zipfile.ZipFile(wheel).extract(LIBRARY, folder)
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    needed = [line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()]
    if unstable := [name for name in needed if OF_TORCH.match(name)]:
        raise SystemExit(f"{wheel.name} needs {', '.join(unstable[:5])}, which are not of torch's stable interface")
    stable = sum(bool(STABLE.fullmatch(name)) for name in needed)
    print(f"{stable} functions of torch's stable C interface, none of its C++ interface")


def audit(tool: str, wheel: Path) -> None:
    """What one more tool says; ends where it finds a fault. Not installed: says so."""
    module = tool.replace("-", "_")
    if not find_spec(module):
        print(f"{tool}: not installed, so not run: pip install {tool}")
        return
    words = {"abi3audit": ["--strict", "--summary"], "torch-abi-audit": [], "auditwheel": ["show"]}[tool]
    start = {"torch-abi-audit": f"from {module}.cli import main; import sys; sys.exit(main())"}.get(tool)
    python = [sys.executable, *(["-c", start] if start else ["-m", module])]
    with tempfile.TemporaryDirectory() as folder:
        # It reads libraries, the others read wheels.
        given = zipfile.ZipFile(wheel).extract(LIBRARY, folder) if tool == "torch-abi-audit" else wheel
        done = subprocess.run([*python, *words, str(given)], capture_output=True, text=True, check=False)
    print(f"{tool}: {(done.stdout + done.stderr).strip()}")
    if done.returncode:
        raise SystemExit(f"{tool} ended with {done.returncode}")


def found_pythons(versions: list[str]) -> dict[str, Path]:
    """By version; on the PATH, or where pyenv keeps them."""
    found = {}
    for version in versions:
        kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python3"))
        there = [Path(path) for path in (shutil.which(f"python{version}"),) if path]
        for python in (*kept, *there):
            said = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
                                  capture_output=True, text=True, check=False)  # fmt: skip
            if said.stdout.strip() == version:
                found[version] = python
                break
    return found


def install_and_test(wheel: Path, version: str, python: Path, options: argparse.Namespace) -> None:
    # Packages on the path of this process would be taken for those of the environment.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory(prefix="eefast_wheel_") as name:
        folder = Path(name)
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True, env=variables)
        there = str(folder / "venv" / "bin" / "python")
        # Only the modules that the tests import are compiled.
        install = [there, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        if Path(options.torch).is_dir():
            site = folder / "venv" / "lib" / f"python{version}" / "site-packages"
            (site / "packages.pth").write_text(f"{Path(options.torch).resolve()}\n")
            subprocess.run([*install, "--no-deps", str(wheel)], check=True, env=variables)
        else:
            subprocess.run([*install, options.torch, "numpy", "pytest", str(wheel)], check=True, env=variables)
        tests = shutil.copy(TESTS, folder / "installed_tests.py")
        done = subprocess.run(
            [there, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
            cwd=folder,
            env=variables | {"EEFAST_WHEEL": "pure" if options.pure else ""},
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the installed package fails its tests on Python {version}")


if __name__ == "__main__":
    sys.exit(main())
