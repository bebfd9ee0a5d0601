"""The installed package, away from the repository: that its parts are there, that its kernels run, what it answers.

Run by `make_wheel.py` as `pytest installed_tests.py`, in a fresh environment and another folder; not by `make test`.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import eefast
from eefast import ops

HERE = Path(eefast.__file__).parent
PURE = os.environ.get("EEFAST_WHEEL") == "pure"
SHAPE = (3, 12, 12)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, criterion="max_probability", thresholds=[0.15, 0.2])
    return made.eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(31, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_it_is_the_installed_one():
    assert "site-packages" in str(HERE)
    assert not (HERE.parent / "csrc").exists()


def test_its_version_is_the_package_s():
    assert metadata.version("eefast") == eefast.__version__


def test_the_kernels_are_there_or_were_not_wanted():
    assert (ops.CPP_MISSING is None) == (not PURE), ops.CPP_MISSING


@pytest.mark.skipif(PURE, reason="a wheel without kernels")
def test_the_library_is_the_only_one():
    assert [path.name for path in HERE.glob("_C*")] == ["_C.abi3.so"]


@pytest.mark.skipif(PURE, reason="a wheel without kernels")
def test_the_instructions_are_named():
    assert ops.instruction_set() in ("portable", "avx2", "avx512", "avx512_bf16")


@pytest.mark.parametrize("name", ["py.typed", "assets/eenet-mnist/model.safetensors", "assets/mnist/README.md"])
def test_data_files_are_there(name):
    assert (HERE / name).exists()


def test_no_tests_are_installed():
    assert not (HERE.parent / "tests").exists()
    assert not (HERE.parent / "bench").exists()


@pytest.mark.parametrize("engine", ["reference", "compact", "auto"])
def test_engines_answer_as_the_network(net, x, engine):
    found, wanted = eefast.accelerate(net, engine=engine)(x), net(x)
    assert found.exit_index.tolist() == wanted.exit_index.tolist()
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(PURE, reason="a wheel without kernels")
def test_the_resident_engine_runs(net, x):
    found = eefast.accelerate(net, engine="resident")(x)
    assert found.exit_index.tolist() == net(x).exit_index.tolist()


def test_int8_runs(net, x):
    made = eefast.quantize(net, x)
    found, wanted = eefast.accelerate(made)(x), made(x)
    assert found.exit_index.tolist() == wanted.exit_index.tolist()


def test_the_shipped_network_is_right_on_mnist():
    from eefast.data.mnist import mnist_test

    fast, (images, labels) = eefast.accelerate(eefast.load(HERE / "assets" / "eenet-mnist")), mnist_test()
    assert float((fast(images[:256]).labels == labels[:256]).float().mean()) > 0.97


def test_a_network_is_saved_and_loaded(net, x, tmp_path):
    net.save(tmp_path / "net")
    assert torch.equal(eefast.load(tmp_path / "net")(x).logits, net(x).logits)


def test_exits_are_attached_to_a_backbone(x):
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5),
    )  # fmt: skip
    made = eefast.attach(backbone, ["1"], input_shape=SHAPE).eval()
    assert eefast.accelerate(made)(x).logits.shape == (31, 5)


def test_stages_are_exported(net, tmp_path):
    assert (eefast.export(net, tmp_path / "out") / "manifest.json").exists()


@pytest.mark.parametrize("module", ["eefast.kernels", "eefast.serving", "eefast.online", "eefast.hub", "eefast.search"])
def test_all_folders_are_installed(module):
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_is_installed():
    command = Path(sys.executable).parent / "eefast"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "eefast[cli]" in done.stderr, done.stderr
