"""Files of survivors: what is read back, and how torn, changed and foreign ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import images, lived_in
from safetensors.torch import save_file

import eefast
from eefast import zoo
from eefast.checkpoint import survivors_file
from eefast.survivors import Survivors
from eefast.version import __version__


@pytest.fixture(scope="module")
def survivors() -> Survivors:
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 0)
    net.thresholds.fill_(0.99)
    return eefast.accelerate(net, engine="reference").until(1)(images(7, (1, 12, 12))).survivors


def test_all_of_it_comes_back(survivors: Survivors, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    survivors.save(path)
    back = Survivors.load(path)
    for name in Survivors.__dataclass_fields__:
        was, now = getattr(survivors, name), getattr(back, name)
        assert torch.equal(was, now) if isinstance(was, torch.Tensor) else was == now, name
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[:-5],
    "in its header": lambda data: data[:100],
    "to nothing": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "another feature": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "another exit": lambda data: data.replace(b'"exit_index":"1"', b'"exit_index":"0"'),
    "another size": lambda data: data.replace(b'"size":"7"', b'"size":"9"'),
    "no JSON": lambda data: data[:8] + b"[" + data[9:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_torn_and_changed_files_are_refused(survivors: Survivors, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(DAMAGES[damage](survivors.to_bytes()))
    with pytest.raises(ValueError, match=r"run.safetensors: (no whole file of survivors|its content does not fit)"):
        Survivors.load(path)


@pytest.mark.parametrize("keep", range(0, 400, 37))
def test_every_beginning_of_a_file_is_refused(survivors: Survivors, keep: int) -> None:
    data = survivors.to_bytes()
    with pytest.raises(ValueError, match="these bytes: no whole file of survivors"):
        Survivors.from_bytes(data[: len(data) * keep // 400])


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"not one that Survivors\.save wrote"):
        Survivors.load(path)
    with pytest.raises(FileNotFoundError):
        Survivors.load(tmp_path / "none")


@pytest.mark.parametrize("name", ["FORMAT", "__version__"])
def test_another_version_is_refused(survivors: Survivors, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = survivors.to_bytes()
    monkeypatch.setattr(survivors_file, name, "9.9.9")
    with pytest.raises(ValueError, match=rf"written by eefast {__version__} in format 2, this is .*9.9.9.*began it"):
        Survivors.from_bytes(data)
