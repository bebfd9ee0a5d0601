"""`eefast env`: versions, devices and kernels, also where something is missing or broken."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import torch
from command_line import run

import eefast
from eefast import ops
from eefast.measure import installation

START = [sys.executable, "-c", "from eefast_command import main; main()"]


def test_the_text_says_what_the_json_says(tmp_path, monkeypatch):
    monkeypatch.setenv("EEFAST_GRAPHS", "0")
    done = run("env", "--json", tmp_path / "env.json")
    found = json.loads((tmp_path / "env.json").read_text())
    assert list(found) == ["versions", "system", "devices", "kernels", "exits_on_gpu", "variables"]
    said = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for title, values in found.items():
        assert f"{title}:" in done.stdout.splitlines()
        for name, value in values.items() if isinstance(values, dict) else ():
            assert f"{name} {value or 'not installed'}" in said
    assert found["versions"]["eefast"] == eefast.__version__
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["system"]["cpp_instructions"] == ops.instruction_set()
    assert found["system"]["threads"] == torch.get_num_threads()
    assert len(found["devices"]) == torch.cuda.device_count()
    assert found["variables"]["EEFAST_GRAPHS"] == "0"
    assert json.loads(run("env", "--json", "-").stdout) == found


def test_faults_are_reported_and_not_raised(monkeypatch):
    def broken():
        raise RuntimeError("EEFAST_ISA=foo is unknown")

    monkeypatch.setattr(ops, "instruction_set", broken)
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setenv("EEFAST_EXIT_KERNELS", "none of them")
    found = installation.inspect_installation()
    assert found["system"]["cpp_instructions"] == found["devices"] == "RuntimeError: EEFAST_ISA=foo is unknown"
    assert found["exits_on_gpu"].startswith("ValueError: EEFAST_EXIT_KERNELS='none of them' is unknown")
    assert "RuntimeError: EEFAST_ISA=foo is unknown" in run("env").stdout


def test_a_library_that_does_not_load_ends_in_one_line(tmp_path):
    library = tmp_path / "broken.so"
    library.write_bytes(b"no library")
    environment = {"EEFAST_LIBRARY": str(library), "PYTHONPATH": str(Path(eefast.__file__).parent.parent)}
    done = subprocess.run([*START, "env"], capture_output=True, text=True, check=False, env=environment, cwd="/")
    assert done.returncode == 2
    assert done.stderr == f"error: eefast cannot be imported: Could not load this library: {library}\n"
