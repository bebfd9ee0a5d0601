"""Peers in eight bits: what ONNX Runtime quantises, run by it or OpenVINO, whole or per stage; what eefast does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import eefast
from eefast.measure import baselines, runtimes
from eefast.measure.baselines import Run
from eefast.measure.quantized_onnx import ON_MAPS, quantized
from eefast.model import EarlyExitNet

from . import export
from .eefast_engines import describe as eefast_version
from .peer import Peer, onnx_runtime_version, openvino_settings
from .runtime_stages import on_openvino, on_shared_threads

# Images from which ranges are taken: their number changes no speed, and more of them only slow the start down.
CALIBRATION_IMAGES, COMPARED_IMAGES = 16, 16
QDQ = "QDQ, U8S8 per channel"


def whole(net: EarlyExitNet, images: Tensor, run: Callable[[EarlyExitNet, Tensor], Run]) -> Run:
    return run(net, images[:CALIBRATION_IMAGES])


def per_stage(net: EarlyExitNet, images: Tensor, run: Callable[[bytes], runtimes.Call]) -> Run:
    """In eight bits but for the heads' linears; features are float32 between stages."""
    models = quantized(list(export.stages(net)), images[:CALIBRATION_IMAGES].numpy(), ON_MAPS)
    return export.in_stages(net, [run(model) for model in models])


def resident(net: EarlyExitNet, images: Tensor) -> Run:
    """Raises `RuntimeError` where the engine's answer is not that of integer arithmetic in PyTorch."""
    made = eefast.quantize(net, images[:CALIBRATION_IMAGES])
    # As all peers it is asked for the thresholds that the float network has now, which the bench chose.
    made.thresholds, made.config = net.thresholds, None
    run = eefast.accelerate(made, engine="resident", frozen=True)
    part = images[:COMPARED_IMAGES]
    expected, found = made(part), run(part)
    if not torch.equal(found.exit_index, expected.exit_index) or not torch.allclose(
        found.logits, expected.logits, rtol=0, atol=1e-4
    ):
        raise RuntimeError("WRONG: the engine's answers are not those of integer arithmetic in PyTorch")
    return run


def by_default(net: EarlyExitNet, images: Tensor) -> Run:
    """Whatever engine eefast chooses; where other libraries run the stages they may round otherwise.

    Raises `RuntimeError` where the final logits then differ from simulated INT8 more than that does from float32.
    """
    made = eefast.quantize(net, images[:CALIBRATION_IMAGES])
    made.thresholds, made.config = net.thresholds, None
    run = eefast.accelerate(made, frozen=True)
    part = images[:COMPARED_IMAGES]
    never = [net.criterion.never] * net.num_exits
    exact, simulated, found = (each(part, thresholds=never).logits for each in (net, made, run))
    error, allowed = ((a - simulated).norm() / simulated.norm() for a in (found, exact))
    if not error <= allowed:
        raise RuntimeError(
            f"WRONG: the logits differ from simulated INT8 by {error:.1%}, float32 only by {allowed:.1%}"
        )
    return run


def _describe_onnx_runtime() -> str:
    return f"{onnx_runtime_version()}, {QDQ}"


def _describe_openvino() -> str:
    return f"{openvino_settings(torch.float32)}, {QDQ}"


def _peer(name: str, prepare: Callable[..., Run], describe: Callable[[], str], static: bool, family: str) -> Peer:
    needs = {"eefast": (), "openvino": ("onnxruntime", *runtimes.OPENVINO_NEEDS)}.get(family, runtimes.ONNX_NEEDS)
    return Peer(name, prepare, describe, static, family, torch.int8, needs=needs, calibrated=True)


ONNX_RUNTIME = _peer(
    "plain, ONNX Runtime int8", partial(whole, run=baselines.onnx_runtime_int8), _describe_onnx_runtime, True,
    "onnxruntime",
)  # fmt: skip
OPENVINO = _peer(
    "plain, OpenVINO int8", partial(whole, run=baselines.openvino_int8), _describe_openvino, True, "openvino"
)
RESIDENT = _peer("eefast resident, int8", resident, eefast_version, False, "eefast")
BY_DEFAULT = _peer("eefast call, int8", by_default, eefast_version, False, "eefast")
PEERS = (
    ONNX_RUNTIME,
    OPENVINO,
    _peer(
        "ONNX Runtime per stage, int8", partial(per_stage, run=on_shared_threads), _describe_onnx_runtime, False,
        "onnxruntime shared",
    ),
    _peer("OpenVINO per stage, int8", partial(per_stage, run=on_openvino), _describe_openvino, False, "openvino"),
    RESIDENT,
)  # fmt: skip
