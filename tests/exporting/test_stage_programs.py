"""What torch.export cannot trace is named with its stage."""

import pytest
import torch
from torch import nn

import eefast
from eefast.heads import ExitHead


class Decides(nn.Module):
    """Other layers for other values."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize("chosen", ["stages", "onnx"])
def test_a_stage_that_decides_by_values(tmp_path, chosen):
    if chosen == "onnx":
        pytest.importorskip("onnx", reason="needs eefast[onnx]")
        pytest.importorskip("onnxruntime", reason="needs eefast[onnx]")
    shape = 2, 6, 6
    heads = [ExitHead("pool", shape, 3, shape) for _ in range(2)]
    net = eefast.EarlyExitNet([nn.Conv2d(2, 2, 3, padding=1), Decides()], heads, input_shape=shape).eval()
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"cannot trace stage 1: .*|stage 1 is not folded: torch.fx cannot trace it"):
        eefast.export(net, tmp_path / "out", format=chosen)
