"""Epochs of a run ↔ best.ckpt and last.ckpt, Lightning's checkpoints: replaced whole, read without running code."""

from __future__ import annotations

import pickle
import time
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..system import files
from .folder import BEST_FILE, LAST_FILE

CHECKPOINT_FORMAT = 1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `eefast train`; no code in it is run. `ValueError`, which names the fault, for anything else."""
    try:
        if not path.is_file():
            raise ValueError("it is no regular file" if path.exists() else "it is gone")
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        with ZipFile(path) as archive:
            # PyTorch does not look at the check sums, and never compresses.
            if any(part.compress_type != ZIP_STORED for part in archive.infolist()) or archive.testzip():
                raise ValueError("its check sums are wrong")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's text recommends to load it all the same.
        raise ValueError(f"{path} is no checkpoint of eefast train: it is damaged, or holds code") from error
    except Exception as error:  # reading raises whatever the bytes lead to
        raise ValueError(f"{path} is no intact checkpoint: {first_line(error)}") from error
    parts = {"arguments": dict, "state_dict": dict, "seconds_per_epoch": list, "epoch": int}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in parts.items()):
        raise ValueError(f"{path} is no checkpoint of eefast train")
    found.setdefault("format", 1)
    if not isinstance(found["format"], int):
        raise ValueError(f"{path} is no checkpoint of eefast train")
    return found


def first_line(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


class RunRecord(Callback):
    """Puts options, seconds per epoch and the fingerprints of training images and teacher into every checkpoint.

    teacher: of its weights; "" without one.
    started: whether training has begun in this process, with whatever was loaded.
    """

    def __init__(self, arguments: dict[str, Any], images: str, teacher: str = "") -> None:
        self.arguments, self.images, self.teacher = arguments, images, teacher
        self.seconds, self.started = list[float](), False

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["format"] = CHECKPOINT_FORMAT
        checkpoint["arguments"], checkpoint["seconds_per_epoch"] = self.arguments, list(self.seconds)
        checkpoint["images"], checkpoint["teacher"] = self.images, self.teacher

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if checkpoint.get("images", self.images) != self.images:
            # The held-out images would be others, some of which it was trained on.
            raise ValueError("the training images have changed since")
        if checkpoint.get("teacher", self.teacher) != self.teacher:
            raise ValueError("the teacher's weights have changed since")
        self.seconds = list(checkpoint["seconds_per_epoch"])

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.started = True

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class CheckpointWriter(TorchCheckpointIO):
    """Writes checkpoints as `eefast.system.files` does; `epochs`: number of finished epochs in the last one."""

    epochs = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = BytesIO()
        torch.save(checkpoint, content)
        files.write(path, content.getbuffer())
        if Path(path).name == LAST_FILE:
            self.epochs = checkpoint["epoch"] + 1


# Checkpoints refer to this class by its name.
class _Checkpoint(ModelCheckpoint):
    """Finds its best epoch also after the folder was moved or renamed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = Path(self.dirpath or "")

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path else path

        names = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {name: here(state_dict[name]) for name in names if name in state_dict}
        models = {here(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath})


def best_and_last(output: Path) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """Callbacks that write best.ckpt, by the held-out loss, and then last.ckpt, which records the best score too."""
    shared: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": True}
    best = _Checkpoint(output, BEST_FILE.removesuffix(".ckpt"), monitor="held_out_loss", **shared)
    return best, _Checkpoint(output, LAST_FILE.removesuffix(".ckpt"), **shared)
