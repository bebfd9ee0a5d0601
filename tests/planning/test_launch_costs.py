"""The table of a device on disk; measuring it takes a GPU, see test_graphs.py."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from eefast.planning import launch_costs
from eefast.planning.launch_costs import LaunchCosts


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[torch.device]:
    """Devices that were measured, each with another result; a CUDA device that has a name."""
    seen: list[torch.device] = []

    def measure(device: torch.device) -> LaunchCosts:
        seen.append(device)
        return LaunchCosts(launch=len(seen) * 1e-6, wait=1e-5)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch_costs, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A/B 80GB")
    return seen


def test_measured_once_and_kept(measured: list[torch.device]) -> None:
    device = torch.device("cuda")
    first = launch_costs.load(device)
    assert launch_costs.load(device) == first
    assert len(measured) == 1
    assert launch_costs.calibrate(device) != first
    assert launch_costs.load(device).launch == 2e-6
    assert len(measured) == 2


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "[" * 100_000, '{"seconds": {"launch": 1}}', '{"seconds": {"other": 1}}', '{"seconds": [1, 2]}',
        '{"seconds": {"launch": NaN, "wait": 1}}', '{"seconds": {"launch": 1, "wait": -1}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(measured: list[torch.device], content: str) -> None:
    device = torch.device("cuda")
    launch_costs.load(device)
    launch_costs.path(device).write_text(content)
    launch_costs.load(device)
    assert len(measured) == 2
    assert launch_costs.load(device).wait == 1e-5


def test_a_folder_that_cannot_be_written_to(
    measured: list[torch.device], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert launch_costs.load(torch.device("cuda")).wait == 1e-5
    # Keeping it is what `calibrate` is called for.
    with pytest.raises(OSError, match="file"):
        launch_costs.calibrate(torch.device("cuda"))


def test_the_cpu_needs_none() -> None:
    with pytest.raises(ValueError, match="device='cpu' needs no calibration; choose a CUDA device"):
        launch_costs.calibrate(torch.device("cpu"))


def test_the_device_is_busy_until_all_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what the host takes to queue the work would be measured, too."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("busy"), raising=False)
    assert launch_costs.seconds(lambda: order.append("work"), torch.device("cuda")) == 2e-3
    assert order == ["busy", "record", "work", "record", "wait"]
