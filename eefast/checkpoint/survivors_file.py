"""Survivors ↔ the content of a safetensors file with a checksum; torn files and other versions are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from struct import unpack_from
from typing import Any

import torch
from torch import Tensor

from ..survivors import FEATURES, Survivors
from ..version import __version__
from . import stored

KIND, FORMAT = "eefast survivors", "2"
TENSORS = ("positions", "logits", "confidence", "limits")
TEXTS = ("criterion", "structure", "weights", "version")


def content(survivors: Survivors, features: str) -> bytes:
    """As `Survivors.to_bytes`. Features are stored channels-last: [M, H, W, C]."""
    from safetensors.torch import save

    if features not in FEATURES:
        raise ValueError(f"features={features!r} is unknown; choose one of {', '.join(FEATURES)}")
    kept, error = _stored(survivors.features.cpu(), features)
    kept |= {name: getattr(survivors, name).cpu() for name in TENSORS}
    kept |= {} if survivors.rule is None else {"rule": survivors.rule.cpu()}
    # safetensors wants every tensor in memory of its own.
    tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in kept.items()}
    header = {
        **{name: getattr(survivors, name) for name in TEXTS},
        "kind": KIND,
        "format": FORMAT,
        "size": str(survivors.size),
        "exit_index": str(survivors.exit_index),
        "dtype": str(survivors.features.dtype).removeprefix("torch."),
        "error": repr(max(error, survivors.error)),
        "arithmetic": json.dumps(dict(survivors.arithmetic)),
    }
    return save(tensors, {**header, "checksum": _checksum(header, tensors)})


def read(path: str | Path) -> Survivors:
    """As `Survivors.load`; the checksum and the version are looked at first."""
    return parsed(stored.read(Path(path)), str(path))


def parsed(data: bytes | bytearray | memoryview, where: str) -> Survivors:
    """where: what error texts call the bytes."""
    data = bytearray(data)
    try:
        header = _header(data)
        tensors = stored.parse_safetensors(data)
    except ValueError as error:
        raise ValueError(f"{where}: no whole file of survivors ({error}); it was cut off or changed") from None
    if header.get("kind") != KIND:
        raise ValueError(f"{where}: a safetensors file, but not one that Survivors.save wrote")
    found = header.get("format"), header.get("version")
    if found != (FORMAT, __version__):
        raise ValueError(
            f"{where}: written by eefast {found[1]} in format {found[0]}, this is eefast {__version__} with format "
            f"{FORMAT}; finish the run with the version that began it"
        )
    if header.pop("checksum", None) != _checksum(header, tensors):
        raise ValueError(f"{where}: its content does not fit its checksum; it was changed, run again")
    try:
        return Survivors(
            features=_features(tensors, header["dtype"]).permute(0, 3, 1, 2),
            size=int(header["size"]),
            exit_index=int(header["exit_index"]),
            error=float(header["error"]),
            arithmetic=stored.parse_json(header["arithmetic"].encode(), "arithmetic"),
            positions=tensors["positions"],
            logits=tensors["logits"],
            confidence=tensors["confidence"],
            limits=tensors["limits"],
            rule=tensors.get("rule"),
            **{name: header[name] for name in TEXTS},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{where}: not survivors as eefast writes them ({error})") from error


def _stored(x: Tensor, features: str) -> tuple[dict[str, Tensor], float]:
    """The tensors that stand for features [M, C, H, W], and the largest difference."""
    rows = x.permute(0, 2, 3, 1)
    if features == "exact" or x.dtype == torch.uint8:
        return {"features": rows}, 0.0
    exact = rows.float()
    if not exact.isfinite().all():
        raise ValueError(f"features has infinite numbers or NaN, which {features} does not keep; use features='exact'")
    if features == "float16":
        half = exact.half()
        if not half.isfinite().all():
            raise ValueError("features has numbers beyond 65504, float16's largest; use features='uint8' or 'exact'")
        tensors = {"features": half}
    else:
        flat = exact.flatten(0, 2)
        low, high = flat.aminmax(dim=0) if len(flat) else (flat.new_zeros(flat.shape[1]),) * 2
        step = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        tensors = {"features": ((exact - low) / step).round().clamp(0, 255).to(torch.uint8), "step": step, "low": low}
    back = _features(tensors, str(x.dtype).removeprefix("torch.")).float()
    return tensors, float((back - exact).abs().max()) if len(x) else 0.0


def _features(tensors: Mapping[str, Tensor], dtype: str) -> Tensor:
    """[M, H, W, C] in the dtype of the engine."""
    x = tensors["features"]
    if "step" in tensors:
        x = x.float() * tensors["step"] + tensors["low"]
    if dtype not in ("float32", "float16", "bfloat16", "float64", "uint8"):
        raise ValueError(f"its features are {dtype}")
    return x.to(getattr(torch, dtype))


def _header(data: bytearray) -> dict[str, Any]:
    if len(data) < 8 or (length := unpack_from("<Q", data)[0]) > len(data) - 8:
        raise ValueError("it is shorter than its header")
    found = stored.parse_json(data[8 : 8 + length], "its header").get("__metadata__", {})
    if not isinstance(found, dict):
        raise ValueError("its metadata are no texts by name")
    return found


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256(json.dumps(dict(sorted(header.items()))).encode())
    for name, x in sorted(tensors.items()):
        state.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        state.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()
