"""Published weights: known by name, read from the library's cache, fetched only where that is asked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from eefast.surgery.pretrained import published, weights_file

RESNET = "torchvision:resnet18"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub/checkpoints"


def test_weights_have_the_names_of_their_library() -> None:
    assert published(RESNET) == ["IMAGENET1K_V1"]
    assert {"IMAGENET1K_V1", "IMAGENET1K_V2"} <= set(published("torchvision:resnet50"))
    pytest.importorskip("timm", reason="timm is not installed")
    assert "a1_in1k" in published("timm:resnet18")
    assert published("timm:resnet18d") != published("timm:resnet18")


def test_other_names_are_refused_with_those_that_there_are(cache: Path) -> None:
    with pytest.raises(ValueError, match="weights='V2' is no file and no weights of torchvision:resnet18, wh"):
        weights_file(RESNET, "V2", download=True)


@pytest.mark.parametrize("backbone", [RESNET, "timm:resnet18"])
def test_nothing_is_fetched_unasked(backbone: str, cache: Path) -> None:
    if backbone.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    name = {RESNET: "IMAGENET1K_V1"}.get(backbone, "a3_in1k")
    library = backbone.partition(":")[0]
    with pytest.raises(FileNotFoundError, match=f"weights='{name}' of {backbone} are not in the cache of {library}"):
        weights_file(backbone, name, download=False)
    assert not cache.exists()


def test_the_file_in_the_cache_is_taken(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "resnet18-f37072fd.pth").write_bytes(b"weights")
    for download in (False, True):
        assert weights_file(RESNET, "IMAGENET1K_V1", download).read_bytes() == b"weights"


@pytest.mark.parametrize("whole", [True, False])
def test_a_fetched_file_is_checked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """From a file: URL, whose name has the first digits of its hash."""
    from torchvision.models import ResNet18_Weights

    data = torch.arange(9).numpy().tobytes()
    source = tmp_path / f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    source.write_bytes(data if whole else data[:-1])
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", source.as_uri())
    if whole:
        assert weights_file(RESNET, "IMAGENET1K_V1", download=True).read_bytes() == data
        return
    with pytest.raises(RuntimeError, match="invalid hash value"):
        weights_file(RESNET, "IMAGENET1K_V1", download=True)
    assert not list(cache.iterdir())
