"""What has to be installed is named; stages that are no maps in float32 are refused before anything is exported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eefast.planning.folding import fold_stage
from eefast.runtimes import onnx_models
from eefast.runtimes.onnx_models import ONNX_NEEDS, OPENVINO_NEEDS, exported_once, missing, onnx_stage


@pytest.mark.parametrize(
    ("present", "needs", "message"),
    [
        ((), ONNX_NEEDS, "onnx and onnxruntime not installed: pip install onnx onnxruntime"),
        (("onnx",), OPENVINO_NEEDS, "openvino not installed: pip install openvino"),
        (("onnx", "openvino"), OPENVINO_NEEDS, ""),
    ],
)
def test_what_is_missing_is_named(monkeypatch, present, needs, message):
    monkeypatch.setattr(onnx_models, "find_spec", lambda name: name in present or None)
    assert missing(needs) == message


@pytest.mark.parametrize(
    ("stage", "what"),
    [(nn.Flatten(), r"torch.float32 of shape \[1, 60\]"), (nn.Identity().double(), "torch.float64")],
    ids=["vectors", "float64"],
)
def test_stages_that_return_other_things(monkeypatch, stage, what):
    monkeypatch.setattr(onnx_models, "onnx_model", lambda *args: pytest.fail("it was exported"))
    example = torch.rand(2, 3, 4, 5, dtype=torch.float64 if isinstance(stage, nn.Identity) else torch.float32)
    with pytest.raises(ValueError, match=f"the stage returns {what}.*, not float32 maps"):
        onnx_stage(fold_stage(stage, example.dtype)[0], example)


class Branching(nn.Module):
    def forward(self, x):
        return -x if bool(x.sum() > 0) else x


def test_stages_with_branches_are_not_exported(monkeypatch):
    monkeypatch.setattr(onnx_models, "onnx_model", lambda *args: pytest.fail("it was exported"))
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace the stage, so an export could lose a branch of it"):
        onnx_stage(fold_stage(Branching(), torch.float32)[0], torch.rand(2, 3, 4, 5))


def test_a_stage_is_exported_once_for_several_libraries(monkeypatch):
    made = []
    monkeypatch.setattr(onnx_models, "onnx_model", lambda stage, *_: made.append(stage) or b"%d" % len(made))
    (one, _), (two, _) = (fold_stage(nn.Conv2d(3, 2, 1), torch.float32) for _ in range(2))
    x, larger = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 6)
    with exported_once():
        assert [onnx_stage(stage, seen)[0] for stage in (one, two, one) for seen in (x, larger, x)] == [
            *(b"1", b"2", b"1", b"3", b"4", b"3", b"1", b"2", b"1"),
        ]
    assert onnx_stage(one, x)[0] == b"5"
    assert onnx_stage(one, x)[0] == b"6"
