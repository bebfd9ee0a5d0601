"""Energy: counters that begin again at 0, several packages, unreadable files, and an NVML that counts millijoules."""

import sys
from types import SimpleNamespace

import energy
import pytest
import torch
from energy import Counter, Meter, rapl

RANGE = 1000.0


def zone(folder, name, what, joules):
    """As Linux shows them: the zones within a package are beside it, too."""
    (folder / name).mkdir()
    for file, text in (("name", what), ("energy_uj", joules * 1e6), ("max_energy_range_uj", RANGE * 1e6)):
        (folder / name / file).write_text(f"{text if isinstance(text, str) else int(text)}\n")
    return folder / name / "energy_uj"


def runs(*steps):
    """Something that moves counters: (file, joules)."""

    def run():
        for file, joules in steps:
            file.write_text(f"{int(joules * 1e6)}\n")
        return "done"

    return run


def test_packages_add_up_and_parts_of_them_are_not_counted_twice(tmp_path):
    first, second = (zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", 100 * i) for i in range(2))
    cores = zone(tmp_path, "intel-rapl:0:0", "core", 50)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 500)
    mirror = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    found = rapl(tmp_path)
    assert found.source == "RAPL, 2 whole packages"
    steps = (first, 2.5), (second, 101.25), (cores, 51), (whole, 600), (mirror, 2.5)
    assert found.measure(runs(*steps)) == ("done", pytest.approx(3.75))
    assert found.measure(runs()) == ("done", 0.0)


def test_a_counter_that_begins_again(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 999)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 10)
    assert rapl(tmp_path).measure(runs((first, 4), (second, 11)))[1] == pytest.approx(5 + 1)


def test_why_nothing_is_counted(tmp_path):
    assert rapl(tmp_path / "nowhere") == Meter((), f"RAPL is missing: no package in {tmp_path / 'nowhere'}")
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    assert rapl(tmp_path).source.startswith("RAPL is missing")
    file = zone(tmp_path, "intel-rapl:1", "package-0", 1)
    assert rapl(tmp_path).counters
    file.unlink()
    file.mkdir()  # root may read everything but this
    found = rapl(tmp_path)
    assert found.source.startswith("RAPL cannot be read: ")
    assert str(file) in found.source
    assert found.measure(lambda: 7) == (7, None)


def test_one_unreadable_package_of_two_is_no_half_of_the_energy(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    zone(tmp_path, "intel-rapl:1", "package-1", 1).write_text("")
    assert rapl(tmp_path).counters == ()


def test_a_counter_without_end_is_taken_as_it_is():
    values = iter([10.0, 12.5])
    assert Meter([Counter(lambda: next(values))], "").measure(lambda: None) == (None, 2.5)


@pytest.fixture
def nvml(monkeypatch):
    """A library that knows one GPU; its millijoules."""

    class NVMLError(Exception):
        pass

    millijoules = [1_500_000, 1_750_500, 1_750_500]
    handles = {"GPU-1-2-3": "ours"}

    def by_uuid(uuid):
        if uuid not in handles:
            raise NVMLError("Not Found")
        return handles[uuid]

    def consumed(handle):
        assert handle == "ours"
        return millijoules.pop(0)

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=consumed,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="1-2-3" if i else "other"))
    return millijoules, handles


def test_nvml_counts_the_gpu_that_pytorch_uses(nvml):
    millijoules, _ = nvml
    found = energy.nvml()
    assert found.source == "NVML, the whole GPU"
    millijoules[:] = [1_500_000, 1_750_500]
    assert found.measure(lambda: "done") == ("done", pytest.approx(250.5))


def test_why_nvml_does_not_count(nvml, monkeypatch):
    nvml[1].clear()
    assert energy.nvml() == Meter((), "NVML counts no energy here: Not Found")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.nvml() == Meter((), energy.NVML_MISSING)
