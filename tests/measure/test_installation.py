"""What is installed: versions, devices and kernels, also where something is missing or broken."""

import pytest
import torch
from where import GPU

from eefast import ops
from eefast.measure import installation


@pytest.mark.parametrize(
    ("attribute", "kernel"),
    [("CPP_MISSING", "C++ on the CPU"), ("CUDA_MISSING", "CUDA C++"), ("TRITON_MISSING", "Triton")],
)
def test_a_missing_kernel_says_why(monkeypatch, attribute, kernel):
    monkeypatch.setattr(ops, attribute, "_C.so does not load: undefined symbol")
    assert installation.kernels()[kernel] == "_C.so does not load: undefined symbol"
    monkeypatch.setattr(ops, attribute, None)
    assert installation.kernels()[kernel] == (
        "available" if GPU or attribute == "CPP_MISSING" else "PyTorch finds no CUDA device"
    )
    assert installation.kernels()["PyTorch"] == "available"


def test_devices_are_described(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "A GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    assert installation.devices() == {"cuda:0": "A GPU, compute capability 9.0, 80 GiB"}


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(installation, "PACKAGES", ("torch", "no-such-package"))
    assert installation.inspect_installation()["versions"]["no-such-package"] is None
