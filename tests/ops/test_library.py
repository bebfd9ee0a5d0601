"""How the C++ library is found and loaded, with and without the package; both define the same ops."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resident_calls import victim
from torch import Tensor

import eefast
from eefast import ops
from eefast.ops import library
from eefast.ops.resident_forward import reference

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = next(Path(eefast.__file__).parent.glob("_C*.so"), None)
cpp_only = pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EEFAST_LIBRARY", raising=False)
    monkeypatch.delenv("EEFAST_USE_CPP", raising=False)


def test_a_checkout_that_was_never_built_says_how_to_build_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eefast").mkdir()
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with caplog.at_level(logging.WARNING, "eefast"):
        why = library.load_cpp(tmp_path / "eefast")
    assert why == "not built; run `make` or `pip install --no-build-isolation -e .` in the checkout"
    assert [record.getMessage() for record in caplog.records] == [f"the C++ kernels are {why}"]


def test_an_installed_package_without_cpp_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "eefast"):
        assert library.load_cpp(tmp_path) == "not built; install with a C++ compiler"
    assert not caplog.records


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_C.abi3.so"
    broken.write_text("not a library")
    assert str(library.load_cpp(tmp_path)).startswith("_C.abi3.so does not load: ")
    monkeypatch.setenv("EEFAST_LIBRARY", str(broken))
    with pytest.raises(OSError, match=f"Could not load this library: {broken}"):
        library.load_cpp(tmp_path)
    monkeypatch.setenv("EEFAST_USE_CPP", "0")
    assert library.load_cpp(tmp_path) == "switched off by EEFAST_USE_CPP=0"


def exit_head_arguments() -> list[Tensor | str | int]:
    """Three samples of one pixel and one channel, which are their logits: 0 exits, 5 and 2 survive a threshold of 3."""
    results = [torch.full((3, 1), -1.0), torch.full((3,), -1.0), torch.full((3,), -1)]
    weight = torch.tensor([[1.0], [1.0]])
    live = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2], [2, 1, 0], [3])]
    features = torch.tensor([0.0, 5.0, 2.0]).view(3, 1, 1, 1)
    return [features, weight, torch.zeros(2), torch.tensor(0.5), *live, "learned", 4, *results]


WITHOUT_PYTHON = """
import sys, torch
path, given, found = sys.argv[1:]
torch.ops.load_library(path)
schemas = sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("eefast::"))
exit_head, resident = torch.load(given)
lists = torch.ops.eefast.exit_head(*exit_head)
answers = torch.ops.eefast.resident_forward(*resident)
name = torch.ops.eefast.instruction_set()
assert "eefast" not in sys.modules
import eefast.ops
assert eefast.ops.CPP_MISSING is None and eefast.ops.instruction_set() == name
torch.save((schemas, [*lists, *exit_head[-3:]], answers, name), found)
"""

LOADED_LATER = """
import os, sys
os.environ["EEFAST_USE_CPP"] = "0"
import torch, eefast
path, given, found = sys.argv[1:]
fast = eefast.accelerate(eefast.zoo.eenet("eenet8", 2, input_shape=(1, 8, 8)).eval())
answered, plan = len(fast(torch.zeros(3, 1, 8, 8)).labels), str(fast.plan)
exit_head, _ = torch.load(given)
assert not torch._C._dispatch_has_kernel_for_dispatch_key("eefast::exit_head", "CPU")
torch.ops.load_library(path)
assert torch._C._dispatch_has_kernel_for_dispatch_key("eefast::exit_head", "CPU")
torch.save((answered, plan, [*torch.ops.eefast.exit_head(*exit_head), *exit_head[-3:]]), found)
"""


def in_another_process(code: str, folder: Path) -> object:
    torch.save((exit_head_arguments(), list(victim().values())), folder / "given.pt")
    command = [sys.executable, "-c", code, str(LIBRARY), str(folder / "given.pt"), str(folder / "found.pt")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "found.pt")


def assert_is_the_exit_head(found: list[Tensor]) -> None:
    rows, positions, live, logits, confidence, exits = found
    assert (rows.tolist(), positions.tolist(), live.tolist()) == ([0, 2, 1], [2, 0, 1], [1])
    assert (logits.tolist(), exits.tolist()) == ([[2.0], [5.0], [-1.0]], [4, 4, -1])
    torch.testing.assert_close(confidence, torch.tensor([2.0, 5.0, -1.0]).sigmoid().where(exits > 0, -1.0))


@cpp_only
def test_the_library_without_the_package(tmp_path: Path) -> None:
    """The ops are there with the package's schemas, answer as the references, and the package still imports."""
    schemas, head, answers, name = in_another_process(WITHOUT_PYTHON, tmp_path)
    ours = {str(torch._C.parse_schema(f"eefast::{text}")) for text in library.SCHEMAS}
    cpu = {"exit_head", "gather_survivors", "resident_forward", "instruction_set", "resident_int8"}
    cpu |= {"int8_instruction_set"}
    cpu |= {f"resident_loop_{name}" for name in ("open", "put", "take", "cancel", "close", "free")}
    cuda = {"exit_head_cuda", "gather_survivors_cuda", "resident_network"} if ops.CUDA_MISSING is None else set()
    assert {schema.partition("(")[0] for schema in schemas} == {f"eefast::{op}" for op in cpu | cuda}
    assert set(schemas) <= ours
    assert_is_the_exit_head(head)
    for found, expected in zip(answers, reference(*victim().values()), strict=True):
        torch.testing.assert_close(found, expected)
    assert name == ops.instruction_set()


@cpp_only
def test_the_library_after_the_package(tmp_path: Path) -> None:
    """Before, the package answers without it and says why."""
    answered, plan, head = in_another_process(LOADED_LATER, tmp_path)
    assert answered == 3
    assert "switched off by EEFAST_USE_CPP=0" in plan
    assert_is_the_exit_head(head)
