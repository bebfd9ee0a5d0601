"""Which folder may import which, and what `import eefast` must not load."""

import ast
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import eefast

PACKAGE = Path(eefast.__file__).parent
ROOT = PACKAGE.parent

LEAVES = {
    "result",
    "criteria",
    "rules",
    "heads",
    "carrying",
    "cost",
    "record",
    "model",
    "preprocessing",
    "profiles",
    "qdq",
    "quantized",
    "survivors",
    "deprecated",
    "fingerprints",
    "version",
    "modules",
    "system",
}
# File or folder of the package → what it may import of the package besides itself; cli and measure may import all.
ALLOWED = {
    **dict.fromkeys((*LEAVES, "zoo", "surgery", "thresholds", "data"), LEAVES),
    "modules": set(),
    "system": set(),
    "runtimes": {"system"},
    "cost": {"modules"},
    "heads": {"result"},
    "profiles": set(),
    "checkpoint": LEAVES | {"zoo", "surgery", "quantization"},
    "train": LEAVES | {"data", "thresholds", "surgery", "zoo", "checkpoint"},
    "search": LEAVES | {"data", "thresholds", "surgery", "zoo", "checkpoint", "train", "planning"},
    "kernels": set(),
    "ops": {"criteria", "modules"},
    "engines": LEAVES | {"ops"},
    "planning": LEAVES | {"ops", "engines", "runtimes"},
    "quantization": LEAVES | {"ops", "planning", "thresholds"},
    "api": LEAVES | {"planning", "engines"},
    "online": LEAVES | {"thresholds"},
    "integrations": LEAVES | {"api", "checkpoint", "data", "scoring", "serving"},
    "hub": LEAVES | {"checkpoint", "thresholds"},
    "exporting": LEAVES | {"checkpoint", "ops", "engines", "planning", "runtimes"},
    "scoring": LEAVES | {"api", "checkpoint", "data", "thresholds"},
    "serving": LEAVES | {"api", "data", "engines", "scoring"},
}
# What is imported only where it is used, in a function.
IN_CALLS = {"model": {"checkpoint", "hub"}, "survivors": {"checkpoint"}, "ops": {"kernels"}}
THIRD_PARTIES = {
    "cli": {"typer", "rich"},
    "train": {"lightning"},
    "kernels": {"triton"},
    "integrations": {"fastapi", "litserve", "starlette"},
    "serving": {"starlette", "uvicorn", "prometheus_client"},
}
TOP = {"cli", "measure", "__init__", "__main__"}


def modules():
    for folder in (PACKAGE, ROOT / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            yield path, parts if folder == PACKAGE else ("eefast", *parts)


@cache
def parsed(path):
    return ast.parse(path.read_text())


@cache
def imports_of(path, parts):
    """(whole name, at module level) of everything that a file imports."""
    tree = parsed(path)
    lazy = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    package = parts if path.name == "__init__.py" else parts[:-1]
    package = package[:-1] if package[-1] == "__init__" else package
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            whole = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            names = [f"{whole}.{alias.name}" for alias in node.names] if whole == "eefast" else [whole]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name, node not in lazy) for name in names]
    return found


def inside(name):
    """The file or folder of the package that an imported name is in, None for other packages."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "eefast" and rest else None


def test_what_every_folder_may_import_is_said_here():
    assert {parts[1] for _, parts in modules()} <= ALLOWED.keys() | TOP


def test_imports_point_down():
    wrong = []
    for path, parts in modules():
        me = parts[1]
        for name, at_module_level in imports_of(path, parts):
            allowed = ALLOWED.get(me, set()) | (set() if at_module_level else IN_CALLS.get(me, set()))
            if me in ALLOWED and inside(name) not in (None, me, *allowed):
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert not wrong


def test_no_circle_between_folders():
    needs = {}
    for path, parts in modules():
        found = {inside(name) for name, at_module_level in imports_of(path, parts) if at_module_level}
        needs.setdefault(parts[1], set()).update(found - {None, parts[1]})
    graphlib.TopologicalSorter(needs).prepare()


def test_no_module_is_named_like_what_it_defines():
    """Else one hides the other: `from .plan import plan` makes `package.plan` a function."""
    for path, parts in modules():
        assert parts[-1] not in {n.name for n in parsed(path).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_third_parties_stay_where_they_belong():
    core = {"torch", "numpy", "eefast", "eefast_command", "kernels", *sys.stdlib_module_names}
    wrong = [
        f"{'/'.join(parts)} imports {name} at module level"
        for path, parts in modules()
        for name, at_module_level in imports_of(path, parts)
        if at_module_level and name.split(".")[0] not in core | THIRD_PARTIES.get(parts[1], set())
    ]
    assert not wrong


def run(code, **more):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **more)


def test_neither_import_nor_load_needs_what_only_some_need():
    """Other packages, and the folders of commands; then the kernels are imported, from another folder."""
    heavy = (
        *("triton", "torchvision", "matplotlib", "typer", "rich", "lightning", "safetensors", "torch._inductor"),
        *("onnx", "onnxruntime", "openvino", "starlette", "uvicorn", "prometheus_client"),
    )
    done = run(
        "import sys, torch; before = set(sys.modules); import eefast;"
        "assert not torch.cuda.is_initialized();"
        f"print([m for m in {heavy} if m in sys.modules and m not in before]);"
        "eefast.load(eefast.__path__[0] + '/assets/eenet-mnist');"
        "print([m for m in ('train', 'cli', 'data', 'measure') if f'eefast.{m}' in sys.modules]);"
        "import eefast.kernels",
        cwd="/",
    )
    assert done.stdout.split() == ["[]", "[]"], done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["/", ROOT], ids=["elsewhere", "in the repository"])
def test_kernels_are_not_importable_alone(folder):
    done = run("import kernels", cwd=folder)
    assert done.returncode != 0
    assert "No module named 'kernels'" in done.stderr or "eefast.kernels" in done.stderr


def test_the_public_names():
    assert set(eefast.__all__) == {
        "Accelerated", "EarlyExitNet", "ExitOutput", "ExitResult", "Preprocessing",
        "__version__", "accelerate", "attach", "criteria", "load", "online", "predict", "quantize", "score", "zoo",
        "export", "Profile", "Profiles", "Partial", "Survivors", "rules", "serving",
    }  # fmt: skip
    assert all(hasattr(eefast, name) for name in eefast.__all__)
