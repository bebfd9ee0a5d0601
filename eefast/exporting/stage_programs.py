"""A network → a file per stage, as torch.export writes programs, for any batch size."""

from __future__ import annotations

from pathlib import Path

import torch

from ..model import EarlyExitNet
from ..planning.trial import brief
from .stage_exits import stages_with_examples


def write_programs(net: EarlyExitNet, folder: Path) -> list[str]:
    """The names of the files, in the order of the stages. `ValueError` names a stage that torch.export cannot trace."""
    names = []
    for i, (module, given) in enumerate(stages_with_examples(net)):
        rows = torch.export.Dim("n")
        shapes = {name: {0: rows} for name in module.inputs}
        try:
            program = torch.export.export(module, given, dynamic_shapes=shapes)
        except Exception as error:  # whatever tracing the layers' code raises
            raise ValueError(f"torch.export cannot trace stage {i}: {brief(error)}; format='aoti' may") from error
        names.append(f"stage{i}.pt2")
        torch.export.save(program, folder / names[-1])
    return names
