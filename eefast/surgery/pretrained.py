"""The name of a backbone's published weights → their file in the library's cache, fetched there where that is asked."""

from __future__ import annotations

from pathlib import Path

import torch


def published(backbone: str) -> list[str]:
    """Names of the weights that "torchvision:NAME" or "timm:NAME" publishes, such as IMAGENET1K_V1 or a1_in1k."""
    library, _, model = backbone.partition(":")
    if library == "torchvision":
        from torchvision import models

        return [weights.name for weights in models.get_model_weights(model)]
    import timm

    return [name.partition(".")[2] for name in timm.list_pretrained(f"{model}.*")]


def weights_file(backbone: str, name: str, download: bool) -> Path:
    """The file of the weights called `name`, one of `published(backbone)`.

    download: fetch it into the library's cache if it is not there; otherwise nothing is fetched.
    Raises `ValueError` for another name, `FileNotFoundError` for a file that is not in the cache.
    """
    library, _, model = backbone.partition(":")
    if name not in published(backbone):
        raise ValueError(
            f"weights={name!r} is no file and no weights of {backbone}, which has "
            f"{', '.join(published(backbone)) or 'none'}"
        )
    found = _of_torchvision(model, name, download) if library == "torchvision" else _of_timm(model, name, download)
    if found is None or not found.is_file():
        raise FileNotFoundError(
            f"weights={name!r} of {backbone} are not in the cache of {library}; --download (download=True) fetches them"
        )
    return found


def _of_torchvision(model: str, name: str, download: bool) -> Path:
    from torchvision import models

    weights = models.get_model_weights(model)[name]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = folder / weights.url.rpartition("/")[2]
    if download and not found.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        digest = found.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(weights.url, str(found), hash_prefix=digest, progress=False)
    return found


def _of_timm(model: str, name: str, download: bool) -> Path | None:
    import timm
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = timm.get_pretrained_cfg(f"{model}.{name}")
    if known is None or not known.hf_hub_id:
        return None
    repository = known.hf_hub_id
    for file in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found)
    return Path(hf_hub_download(repository, "model.safetensors")) if download else None
