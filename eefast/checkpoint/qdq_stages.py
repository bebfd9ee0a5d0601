"""Weights of unknown origin → the network with exits, its stages in simulated INT8, that they are claimed to be of.

The float network is built first, without memory for its weights, see `attached`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import zoo
from ..model import EarlyExitNet
from ..qdq import QdqConvolution, QuantizeDequantize
from ..quantization.assembly import with_qdq_stages
from ..quantization.qdq_graphs import folded_graph, qdq_stage
from . import CONFIG_FILE
from .attached import empty_network, fill
from .building import put
from .fields import MOST_EXITS, Field, is_name
from .quantized_rows import THRESHOLDS_FIELD, read_thresholds

MOST_CONVOLUTIONS = 4096


def build_qdq(config: Mapping[str, Any], weights: dict[str, Tensor], size: int) -> EarlyExitNet:
    """config: the fields of config.json, checked one by one; size: see `attached.build_attached`.

    Raises `ValueError` for convolutions that the network does not have, and for scales that are no scales.
    """
    of_floats = {key: value for key, value in config.items() if key not in QDQ_FIELDS}
    names = config["convolutions"]
    if "backbone" in config:
        float_net, made = empty_network(of_floats)
    else:
        float_net, made = zoo.eenet(**of_floats, device="meta"), None
    if len(names) != float_net.num_exits + 1:
        raise ValueError(f"{CONFIG_FILE} has convolutions of {len(names)} stages for {float_net.num_exits} exits")
    stages = [
        qdq_stage(folded_graph(stage, f"stages.{i}"), of_stage, f"{CONFIG_FILE}: stages.{i}")
        for i, (stage, of_stage) in enumerate(zip(float_net.stages, names, strict=True))
    ]
    thresholds = read_thresholds(config["float_thresholds"])
    more = {"kind": "qdq", "convolutions": names, "float_thresholds": thresholds}
    net = with_qdq_stages(float_net, stages, {**(float_net.config or {}), **more})
    put(net, weights, size, net.name)
    if made is not None:
        fill(net, made)
    _check_numbers(net)
    net.check_thresholds()
    return net.eval().requires_grad_(False)


def _check_numbers(net: EarlyExitNet) -> None:
    """`ValueError` for what `eefast.quantize` does not write, and other libraries would take for something else."""
    for path, module in net.named_modules():
        if not isinstance(module, QdqConvolution | QuantizeDequantize):
            continue
        if module.scale.dtype != torch.float32 or not (module.scale > 0).all():
            raise ValueError(f"{path}.scale must be float32 numbers above 0; save the network again")
        if isinstance(module, QuantizeDequantize) and not 0 <= int(module.zero) <= 255:
            raise ValueError(f"{path}.zero={int(module.zero)} must be in 0 … 255; save the network again")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_CONVOLUTIONS and all(map(is_name, value))


QDQ_FIELDS: dict[str, Field] = {
    "convolutions": (
        lambda v: isinstance(v, list) and len(v) <= MOST_EXITS + 1 and all(map(_are_names, v)),
        f"a list of at most {MOST_CONVOLUTIONS} names of convolutions for each stage",
    ),
    "float_thresholds": THRESHOLDS_FIELD,
}
