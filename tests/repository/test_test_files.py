"""Every module that decides something has a test file of its name, in the folder of its name."""

from collections import Counter
from pathlib import Path

import eefast

PACKAGE = Path(eefast.__file__).parent
TESTS = PACKAGE.parent / "tests"
# Modules → why there is nothing to test in them alone.
DECIDES_NOTHING = {
    "__main__": "calls the command",
    "cli/options": "options with their help",
    "ops/flops": "registers formulas of the ops",
    "planning/errors": "an exception",
    "record": "a dataclass",
    "scoring/calls": "imports what runs, when it is called",
    "version": "a number",
}
MODULES = [
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
]


def files_of(module: str) -> list[Path]:
    """Its test files: test_name.py, those of modules at the top of the package in tests/network.

    Where modules in several folders have this name, another word beside it tells their tests apart, since pytest wants
    different names: test_reference_engine.py.
    """
    folder, _, name = module.rpartition("/")
    files = (TESTS / (folder or "network")).glob("test_*.py")
    if Counter(Path(other).name for other in MODULES)[name] == 1:
        return [path for path in files if path.stem == f"test_{name}"]
    return [path for path in files if f"_{name}_" in f"{path.stem}_"]


def test_a_module_that_decides_has_its_test_file() -> None:
    missing = [module for module in MODULES if module not in DECIDES_NOTHING and not files_of(module)]
    assert not missing, "these have no tests/folder/test_name.py; write it, or list them above"


def test_what_decides_nothing_exists_and_has_no_test_file() -> None:
    assert DECIDES_NOTHING.keys() <= set(MODULES)
    assert not [module for module in DECIDES_NOTHING if files_of(module)]
