"""A folder that `export` wrote → what answers images as the exported network does, with PyTorch or ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..criteria import get
from ..result import ExitResult
from . import manifest as manifests
from .onnx_files import SINGLE
from .resident_package import PACKAGE
from .stage_exits import INPUTS

Stage = Callable[[dict[str, Tensor]], list[Tensor]]
"""Tensors by the names in `INPUTS` → those in `OUTPUTS`."""


class Exported:
    """images [N, C, H, W] float32, normalised → `ExitResult`, on the CPU.

    manifest: see `manifest.describe`. thresholds: [n] float32, may be replaced.
    """

    def __init__(self, manifest: dict[str, Any], answer: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> None:
        self.manifest, self._answer = manifest, answer
        self.thresholds = torch.tensor([float(value) for value in manifest["thresholds"]], dtype=torch.float32)
        self.cost = torch.tensor(manifest["cost"], dtype=torch.float32)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ExitResult:
        logits, confidence, exits = self._answer(images, self.thresholds)
        return ExitResult(logits, exits, confidence, self.cost[exits])


def load_exported(folder: str | Path, single: bool = False) -> Exported:
    """What runs the files in `folder`, after they were compared with their hashes.

    single: of format "onnx" the model for single images, which takes no other number of them.
    Raises `ValueError` as `manifest.read`.
    """
    folder = Path(folder)
    manifest = manifests.read(folder)
    if manifest["kind"] == "aoti":
        return Exported(manifest, _package(folder / PACKAGE))
    if single:
        return Exported(manifest, _single(folder / SINGLE))
    load = _program if manifest["kind"] == "stages" else _session
    stages = [load(folder / file["name"]) for file in manifest["files"] if file["name"] != SINGLE]
    return Exported(manifest, _loop(stages, manifest))


def _package(path: Path) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
    from torch._inductor import aoti_load_package

    # It warns that the package was compiled for no vector instructions, which is what makes it run on all processors.
    log = logging.getLogger("torch.export.pt2_archive._package")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return aoti_load_package(str(path))  # type: ignore[no-any-return]
    finally:
        log.setLevel(level)


def _program(path: Path) -> Stage:
    module = torch.export.load(path).module()
    return lambda given: module(*given.values())


def _session(path: Path) -> Stage:
    from ..runtimes.onnx_sessions import session, spin_briefly

    made = session(path.read_bytes(), torch.get_num_threads(), spin_briefly)
    read = {value.name for value in (*made.get_inputs(), *made.get_overridable_initializers())}

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        return [torch.from_numpy(y) for y in made.run(None, {k: v.numpy() for k, v in given.items() if k in read})]

    return run


def _single(path: Path) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
    run = _session(path)
    return lambda images, thresholds: run({"x": images, "thresholds": thresholds})


def _loop(stages: Sequence[Stage], manifest: dict[str, Any]) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
    """Stage by stage, the samples that go on are the batch of the next one."""
    criterion, carries = get(manifest["criterion"]), manifest["rule"] is not None

    def run(x: Tensor, thresholds: Tensor) -> Sequence[Tensor]:
        n, position = len(x), torch.arange(len(x))
        logits, confidence = torch.empty(n, manifest["num_classes"]), torch.empty(n)
        exits = torch.empty(n, dtype=torch.int64)
        before: list[Tensor] = []
        for i, stage in enumerate(stages):
            if not len(position):
                break
            found, value, *features = stage(dict(zip(INPUTS, [x, *before], strict=False)))
            leaves = criterion.leaves(value, thresholds[i]) if i < len(thresholds) else torch.ones_like(value) > 0
            left = position[leaves]
            logits[left], confidence[left], exits[left] = found[leaves], value[leaves], i
            position = position[~leaves]
            if features:
                x = features[0][~leaves]
                before = [found[~leaves], value[~leaves]] if carries else []
        return logits, confidence, exits

    return run
