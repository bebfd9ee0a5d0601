"""Module → ONNX, by PyTorch's exporter; what has to be installed for it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, fx, nn

from .stage_and_head import StageAndHead

ONNX_NEEDS, OPENVINO_NEEDS = ("onnx", "onnxruntime"), ("onnx", "openvino")

OUTPUTS = ("y", "head")
"""Of a stage, and of one with its head."""

Exported = tuple[bytes, list[torch.Size]]
"""A stage as ONNX, "x" [n, C, H, W] → `OUTPUTS`; and the shapes (C', H', W') of these."""


def missing(needs: Sequence[str]) -> str:
    """What is not installed of `needs`, and how to install it; "" where all is."""
    absent = [name for name in needs if not find_spec(name)]
    return f"{' and '.join(absent)} not installed: pip install {' '.join(absent)}" if absent else ""


def onnx_model(
    module: nn.Module, example: Tensor | tuple[Tensor, ...], outputs: Sequence[str], inputs: Sequence[str] = ("x",)
) -> bytes:
    """`module` as ONNX for any batch size: `inputs`, in the layout of `example`, float32 → `outputs` in their order."""
    file = io.BytesIO()
    axes = {name: {0: "n"} for name in [*inputs, *outputs]}
    with warnings.catch_warnings():
        # The exporter by tracing needs no further package, and announces at every call that it is the older one.
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs), "dynamic_axes": axes}
        given = example if isinstance(example, tuple) else (example,)
        torch.onnx.export(module, given, file, dynamo=False, **options)  # type: ignore[arg-type]
    return file.getvalue()


_exports: dict[tuple[int, torch.Size], tuple[nn.Module, Exported]] | None = None
"""By a stage's id and the shape of its images: the stage, which keeps its id meanwhile, and what it was exported to."""


@contextmanager
def exported_once() -> Iterator[None]:
    """Inside, a stage that does not change is exported once for all libraries that read ONNX."""
    global _exports
    before, _exports = _exports, {}
    try:
        yield
    finally:
        _exports = before


def onnx_stage(stage: nn.Module, example: Tensor) -> Exported:
    """See `_exported`; what `exported_once` knows is not exported again."""
    known, key = _exports, (id(stage), example.shape[1:])
    if known is not None and key in known:
        return known[key][1]
    made = _exported(stage, example)
    if known is not None:
        known[key] = stage, made
    return made


def _exported(stage: nn.Module, example: Tensor) -> Exported:
    """`ValueError` where features are no maps in float32, and where stage or head are no graphs of torch.fx: the
    exporter follows one pair of images, and would lose what they do with others.
    """
    parts = (stage.stage, stage.convs) if isinstance(stage, StageAndHead) else (stage,)
    if not all(isinstance(part, fx.GraphModule) for part in parts):
        raise ValueError("torch.fx cannot trace the stage, so an export could lose a branch of it")
    features = example[:1].contiguous()
    with torch.no_grad():
        found = stage(features.clone())
    made = found if isinstance(stage, StageAndHead) else (found,)
    for part in made:
        if part.dim() != 4 or part.dtype != torch.float32:
            what = f"{part.dtype} of shape {list(part.shape)}"
            raise ValueError(f"the stage returns {what}, not float32 maps [N, C, H, W]")
    # Two images, since a batch of one is often taken for a constant.
    return onnx_model(stage, torch.cat([features, features]), OUTPUTS[: len(made)]), [part.shape[1:] for part in made]
