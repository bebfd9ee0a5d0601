"""What a peer is: a name, how to make it run a network, what it needs; versions for its description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eefast.measure.baselines import Run
from eefast.measure.runtimes import OPENVINO_PRECISIONS
from eefast.model import EarlyExitNet


@dataclass(frozen=True)
class Peer:
    """One way to run a network.

    prepare: network → run; may raise. run: images → logits [N, K] where `static`, else an `ExitResult` by the network's
        thresholds, which may change between two calls.
    describe: versions and settings.
    static: every image takes the final exit.
    family: peers of one family share a process.
    dtype: of the arithmetic; memory_format: of the images that it is given.
    needs: modules to be installed first; variables: of the process's environment.
    largest_batch: where larger batches would tell nothing new and take long.
    stand_in: network → the other network that a static peer runs instead; its answers are checked against that one's.
    whole_batch: the criterion by which all images of a batch must be sure before it exits as a whole, its thresholds
        letting each image alone exit where the network's would; None: images exit one by one, as the network asks.
    calibrated: `prepare` takes images [N, C, H, W], too, from which the ranges of maps are taken.
    """

    name: str
    prepare: Callable[..., Run]
    describe: Callable[[], str]
    static: bool
    family: str
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    needs: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    largest_batch: float = float("inf")
    stand_in: Callable[[EarlyExitNet], EarlyExitNet] | None = None
    whole_batch: str | None = None
    calibrated: bool = False


def torch_version() -> str:
    return f"torch {torch.__version__}"


def onnx_runtime_version() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def openvino_settings(dtype: torch.dtype) -> str:
    import openvino

    return f"openvino {openvino.__version__.split('-')[0]}, {OPENVINO_PRECISIONS[dtype]}, LATENCY"
