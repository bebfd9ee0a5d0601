"""A network → an ONNX model per stage for any batch size, and one model of all stages for single images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..heads import ExitHead
from ..model import EarlyExitNet
from ..planning.folding import fold_stage
from ..runtimes.onnx_models import onnx_model
from .onnx_branches import one_model
from .stage_exits import stages_with_examples

SINGLE = "single.onnx"


def write_models(net: EarlyExitNet, folder: Path) -> list[str]:
    """The names of the files: those of the stages in their order, then the model for single images."""
    models = stage_models(net)
    names = [f"stage{i}.onnx" for i in range(len(models))]
    single = one_model(models, net.input_shape, net.criterion.comparison, net.thresholds.tolist())
    for name, model in zip([*names, SINGLE], [*models, single], strict=True):
        (folder / name).write_bytes(model)
    return [*names, SINGLE]


def stage_models(net: EarlyExitNet) -> list[bytes]:
    """See `stage_exits.StageExit`; BatchNorm is folded.

    `ValueError` names a stage or head of whose code the exporter, which follows two images, could lose a branch.
    """
    models = []
    for i, (module, given) in enumerate(stages_with_examples(net)):
        if not isinstance(module.head, ExitHead):
            raise ValueError(f"the head of exit {i} is a {type(module.head).__name__}, not an eefast.heads.ExitHead")
        module.stage = _folded(module.stage, f"stage {i}")
        module.head.convs = _folded(module.head.convs, f"the head of exit {i}")
        models.append(onnx_model(module, given, module.outputs, module.inputs))
    return models


def _folded(module: nn.Module, where: str) -> Any:
    folded, note = fold_stage(module, torch.float32)
    if not isinstance(folded, fx.GraphModule):
        raise ValueError(f"{where} is {note}, so that an export to ONNX could lose a branch of it; use format='aoti'")
    made: Any = folded
    return made.to(memory_format=torch.contiguous_format)
