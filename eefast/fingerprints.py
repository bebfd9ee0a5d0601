"""A network → short hashes that tell whether another one is the same: of its structure, of its weights."""

from __future__ import annotations

import hashlib
import json

import torch

from .model import EarlyExitNet


def structure(net: EarlyExitNet) -> str:
    """16 hexadecimal digits: what the network is built of, and the shapes of its weights."""
    built = json.dumps(net.config, sort_keys=True, default=str) if net.config else f"{net.stages}{net.heads}"
    shapes = [(name, str(value.dtype), tuple(value.shape)) for name, value in sorted(net.state_dict().items())]
    return hashlib.sha256(f"{built}{net.layers()}{shapes}{net.input_shape}".encode()).hexdigest()[:16]


def weights(net: EarlyExitNet) -> str:
    """16 hexadecimal digits: all weights, without thresholds and rule: all that the outputs of exits depend on."""
    state = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        if name not in ("thresholds", "rule"):
            state.update(name.encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()[:16]
