"""Who may import whom, and what `import eefast` must not drag in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eefast

PACKAGE = Path(eefast.__file__).parent
ROOT = PACKAGE.parent

LEAVES = {"result", "criteria", "heads", "cost", "model", "version", "modules", "system"}
NETWORKS = LEAVES | {"zoo", "surgery", "checkpoint"}
# File or folder of the package → what it may import of the package; everything not named here may import all.
ALLOWED = {
    **dict.fromkeys(LEAVES, LEAVES | {"checkpoint"}),
    **dict.fromkeys(("zoo", "surgery", "checkpoint"), NETWORKS),
    "data": LEAVES | {"checkpoint", "data"},
    "thresholds": LEAVES | {"thresholds"},
    "train": NETWORKS | {"data", "thresholds", "train"},
    "kernels": {"kernels"},
    "ops": {"criteria", "kernels", "ops"},
    "planning": LEAVES | {"ops", "planning"},
    "engines": LEAVES | {"ops", "planning", "engines"},
    "api": LEAVES | {"planning", "engines"},
}
TOP = {"cli", "measure", "__init__", "__main__"}


def modules():
    for folder in (PACKAGE, ROOT / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            yield pytest.param(path, parts if folder == PACKAGE else ("eefast", *parts), id="/".join(parts))


def imports_of(path, parts):
    """(first package-level name, whole name, at module level) of everything that a file imports of eefast."""
    tree = ast.parse(path.read_text())
    lazy = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    package = parts if path.name == "__init__.py" else parts[:-1]
    package = package[:-1] if package[-1] == "__init__" else package
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            whole = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            names = [f"{whole}.{alias.name}" for alias in node.names] if whole == "eefast" else [whole]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node not in lazy


@pytest.mark.parametrize(("path", "parts"), list(modules()))
def test_imports_point_down(path, parts):
    me = parts[1]
    assert me in ALLOWED or me in TOP, f"{me} is new: say in this test what it may import"
    for name, _ in imports_of(path, parts):
        if name.startswith("eefast.") and me in ALLOWED:
            assert name.split(".")[1] in ALLOWED[me], f"{path.name} imports {name}"


@pytest.mark.parametrize(("path", "parts"), list(modules()))
def test_third_parties_stay_where_they_belong(path, parts):
    core = {"torch", "numpy", *sys.stdlib_module_names}
    for name, at_module_level in imports_of(path, parts):
        first = name.split(".")[0]
        if first in core or first in ("eefast", "eefast_command", "kernels") or not at_module_level:
            continue
        allowed = {"cli": {"typer", "rich"}, "train": {"lightning"}, "kernels": {"triton"}}.get(parts[1], set())
        assert first in allowed, f"{path.name} imports {first} at module level"


def run(code, **more):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **more)


def test_import_is_lean():
    heavy = ("triton", "torchvision", "matplotlib", "typer", "rich", "lightning", "safetensors", "torch._inductor")
    done = run(
        "import sys, torch; before = set(sys.modules); import eefast;"
        "assert not torch.cuda.is_initialized();"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_kernels_are_only_importable_as_part_of_eefast():
    assert run("import eefast.kernels", cwd="/").returncode == 0
    for folder in ("/", ROOT):
        done = run("import kernels", cwd=folder)
        assert done.returncode != 0
        assert "No module named 'kernels'" in done.stderr or "eefast.kernels" in done.stderr


def test_the_public_names():
    assert set(eefast.__all__) == {
        "Accelerated", "EarlyExitNet", "ExitOutput", "ExitResult", "__version__",
        "accelerate", "criteria", "load", "zoo",
    }  # fmt: skip
    assert all(hasattr(eefast, name) for name in eefast.__all__)


def test_without_the_cpp_library_the_reference_runs_and_says_so():
    done = run(
        "import torch, eefast; net = eefast.zoo.eenet('eenet20').eval(); fast = eefast.accelerate(net);"
        "print(fast(torch.zeros(3, 3, 32, 32)).exit_index.tolist()); print(fast.plan)",
        env={"EEFAST_USE_CPP": "0", "PATH": "/usr/bin", "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith("["), done.stderr
    assert "switched off by EEFAST_USE_CPP=0" in done.stdout
