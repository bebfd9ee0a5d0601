"""torch.compile as what runs a stage: both sizes that it compiles for are compiled while planning."""

from __future__ import annotations

import pytest
import torch
from networks import images
from runtime_stages import stage
from torch import Tensor

from eefast.planning.folding import fold_stage
from eefast.runtimes.compiled import Compiled


@torch.no_grad()
def test_single_images_and_batches_are_compiled_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def compiled(module: torch.nn.Module, dynamic: bool) -> object:
        assert dynamic

        def run(x: Tensor) -> Tensor:
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert not torch.is_grad_enabled()
            sizes.append(len(x))
            return module(x)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    folded = fold_stage(stage("mobile"), torch.float32)[0]
    made = Compiled().build(folded, images(2, (3, 8, 9)), 1)
    assert sizes == [1, 2]
    x = images(5, (3, 8, 9)).contiguous(memory_format=torch.channels_last)
    with torch.enable_grad():
        assert torch.equal(made(x), folded(x))
    assert made.layout == torch.channels_last
