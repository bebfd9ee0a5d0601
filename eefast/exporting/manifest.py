"""What a program has to know to run exported files ↔ manifest.json beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import fingerprints, ops
from ..model import EarlyExitNet
from ..planning.integer_lowering import is_quantized
from ..system.strict_json import json_text
from ..version import __version__

MANIFEST = "manifest.json"
INSTRUCTIONS, INT8_INSTRUCTIONS = "eefast::instruction_set", "eefast::int8_instruction_set"


def describe(net: EarlyExitNet, kind: str) -> dict[str, Any]:
    """The manifest but for its files.

    kind: "stages", "aoti" or "onnx". rule: nine numbers per exit where the criterion carries the answer so far, else
    null; exported stages contain them. comparison: ">" where images exit above the threshold, "<" where below.
    cost: of each exit. instruction_set: name of an op and what it must return where the files run, or null.
    """
    rule, normalization = net.current_rule(), net.normalization
    op = INT8_INSTRUCTIONS if is_quantized(net) else INSTRUCTIONS
    return {
        "format": 1,
        "kind": kind,
        "eefast": __version__,
        "torch": torch.__version__,
        "network": net.name,
        "weights": fingerprints.weights(net),
        "input_shape": list(net.input_shape),
        "num_classes": net.num_classes,
        "classes": None if net.classes is None else list(net.classes),
        "normalization": None if normalization is None else [[float(v) for v in part] for part in normalization],
        "criterion": net.criterion.name,
        "comparison": net.criterion.comparison,
        "thresholds": net.thresholds.tolist(),
        "rule": rule.tolist() if isinstance(rule, Tensor) else None,
        "cost": net.cost.tolist(),
        "instruction_set": [op, instruction_set(op)] if kind == "aoti" else None,
    }


def as_texts(manifest: dict[str, Any]) -> dict[str, str]:
    """What a program in C++ reads in a package: names, and numbers with spaces between them."""
    op, name = manifest["instruction_set"]
    mean, std = manifest["normalization"] or ([], [])
    numbers = {key: manifest[key] for key in ("input_shape", "thresholds", "cost")} | {"mean": mean, "std": std}
    texts = {key: " ".join(map(str, values)) for key, values in numbers.items()}
    return {**texts, "instruction_set_op": op, "instruction_set": name}


def write(folder: Path, manifest: dict[str, Any], names: Sequence[str]) -> None:
    files = [{"name": name, "sha256": _hash(folder / name)} for name in names]
    (folder / MANIFEST).write_text(json_text({**manifest, "files": files}))


def written(folder: Path) -> set[str]:
    """Names of the files that `write` says it wrote there; none where the manifest is another program's."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        return {MANIFEST, *(file["name"] for file in found["files"])} if "kind" in found else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of files that are whole and can run here.

    Raises `ValueError` where a file is not the one that was exported, and where this machine has other vector
    instructions than the one that exported an AOTInductor package, which was tuned for them and has other last digits.
    """
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no readable {MANIFEST} ({error}); give a folder that eefast.export wrote"
        ) from error
    if found.get("format") != 1:
        raise ValueError(f"{folder / MANIFEST} says format={found.get('format')!r}; a newer eefast may read it")
    for file in found["files"]:
        path = folder / file["name"]
        if not path.is_file() or _hash(path) != file["sha256"]:
            raise ValueError(f"{path} is missing or is not the file that was exported; export the network again")
    if found["instruction_set"] is not None:
        op, wanted = found["instruction_set"]
        check_instructions(op, wanted, folder)
    return found


def instruction_set(op: str) -> str:
    """What an op says that the kernels use here."""
    return {INT8_INSTRUCTIONS: ops.int8_instruction_set, INSTRUCTIONS: ops.instruction_set}[op]()


def check_instructions(op: str, wanted: str, where: Path) -> None:
    """`ValueError` where the kernels use other vector instructions here."""
    if (here := instruction_set(op)) != wanted:
        raise ValueError(
            f"{where} was exported for {wanted}, and this process uses {here}; export it on a machine like this one, "
            "or set EEFAST_ISA to the same name here and where it is exported, such as EEFAST_ISA=avx2"
        )


def _hash(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            made.update(part)
    return made.hexdigest()
