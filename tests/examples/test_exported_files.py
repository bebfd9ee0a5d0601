"""The programs that run exported files, as users start them: in Python without eefast, in C++ without Python."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import images, lived_in, spread_thresholds

import eefast
from eefast import ops

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPE = (3, 12, 12)
PROGRAMS = {"stages": "run_stages.py", "onnx": "run_onnx.py"}
CPP = EXAMPLES / "cpp" / "run_package.cpp"


@pytest.fixture(scope="module")
def net():
    made = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    spread_thresholds(made, images(64, SHAPE), 0.4)
    return made


def run(*command, **variables):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )
    return done.returncode, done.stdout, done.stderr


def lines(result):
    assert len(result.exit_index.unique()) > 1
    pairs = zip(result.labels.tolist(), result.exit_index.tolist(), strict=True)
    return "".join(f"{label} {exit_index}\n" for label, exit_index in pairs)


@pytest.mark.parametrize("rule", ["learned", pytest.param("survival", marks=pytest.mark.slow)])
@pytest.mark.parametrize("chosen", ["stages", "onnx"])
def test_python_without_eefast(net, tmp_path, chosen, rule):
    if chosen == "onnx" and not (find_spec("onnx") and find_spec("onnxruntime")):
        pytest.skip("needs eefast[onnx]")
    made = net if rule == "learned" else net.with_criterion(eefast.rules.survival(2), [0.7, 1.5])
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (37, *SHAPE), dtype=torch.uint8, generator=generator)
    np.save(tmp_path / "x.npy", x.numpy())
    folder, program = eefast.export(made, tmp_path / "out", format=chosen), EXAMPLES / PROGRAMS[chosen]
    code, out, err = run(sys.executable, program, folder, tmp_path / "x.npy")
    assert code == 0, err
    result = made(x)
    assert out == "".join(f"{a} {b}\n" for a, b in zip(result.labels, result.exit_index, strict=True))
    assert len(program.read_text().splitlines()) <= 36
    assert "import eefast" not in program.read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")
def test_cpp_without_python(net, tmp_path):
    """Compiles a package and a program: a minute."""
    x = images(37, SHAPE, seed=1)
    x.numpy().tofile(tmp_path / "x.bin")
    folder = eefast.export(net, tmp_path / "out", format="aoti")
    torch_folder = Path(torch.__file__).parent
    for command in (
        ["-S", CPP.parent, "-B", tmp_path / "build", f"-DTORCH={torch_folder}"],
        ["--build", tmp_path / "build"],
    ):
        code, out, err = run("cmake", *command)
        assert code == 0, out + err
    program = tmp_path / "build" / "run_package"
    log = {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(tmp_path / "loaded")}
    code, out, err = run(program, folder, tmp_path / "x.bin", **log)
    assert code == 0, err
    assert out == lines(net(x))
    loaded = "".join(path.read_text() for path in tmp_path.glob("loaded.*"))
    assert "libeefast.so" in loaded
    assert "libpython" not in loaded
    assert "torch_python" not in loaded
    code, out, err = run(program, folder, tmp_path / "x.bin", EEFAST_ISA="portable")
    assert (code, out) == (2, "")
    assert err == f"exported for {ops.instruction_set()}, here is portable\n"


def test_the_program_in_cpp_is_short():
    assert len(CPP.read_text().splitlines()) <= 52
