"""A `TrainingRecord` ↔ training.json in a network's folder, checked before commands take their defaults from it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..record import TrainingRecord
from . import RECORD_FILE
from .fields import Field, check_fields, is_int
from .stored import parse_json
from .stored import read as read_bytes

MOST_BYTES = 4 << 20
WAY_OUT = "delete it, or train again"


def text(record: TrainingRecord) -> str:
    """What `read` reads; names of classes that would make the file too large are left out."""
    fields = {"format": 1, **asdict(record)}
    found = json.dumps(fields, indent=2) + "\n"
    return found if len(found) <= MOST_BYTES else json.dumps(fields | {"classes": None}) + "\n"


def read(folder: Path, network: str, num_classes: int, input_shape: Sequence[int]) -> TrainingRecord | None:
    """The record in a folder, None if there is none; no file that it names is opened.

    network, num_classes, input_shape: of the network in the folder.
    Raises `ValueError` for a file that `text` did not write, or that belongs to another network.
    """
    found = read_of_any(folder)
    if found is not None:
        for name, actual in (("network", network), ("num_classes", num_classes), ("input_shape", tuple(input_shape))):
            if getattr(found, name) != actual:
                says = getattr(found, name)
                raise ValueError(f"{RECORD_FILE} says {name}={says!r}, the network has {actual!r}; {WAY_OUT}")
    return found


def read_of_any(folder: Path) -> TrainingRecord | None:
    """As `read`, of whatever network."""
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        found = parse_json(read_bytes(path, MOST_BYTES), RECORD_FILE)
        check_fields(found, _FIELDS, RECORD_FILE)
        _check(found)
    except ValueError as error:
        raise ValueError(f"{error}; {WAY_OUT}") from error
    del found["format"]
    classes = found.pop("classes")
    found["input_shape"] = tuple(found["input_shape"])
    return TrainingRecord(**found, classes=None if classes is None else tuple(classes))


def _check(found: dict[str, Any]) -> None:
    classes = found["classes"]
    if classes is not None and len(classes) != found["num_classes"]:
        raise ValueError(f"{RECORD_FILE} names {len(classes)} classes, but says num_classes={found['num_classes']}")
    if found["held_out"] > found["images"]:
        raise ValueError(f"{RECORD_FILE} says held_out={found['held_out']}, more than images={found['images']}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 255


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


_FIELDS: dict[str, Field] = {
    "format": (lambda v: is_int(v, 1), "1, the format that this eefast reads; a newer eefast may read it"),
    "network": (_is_text, "a name"),
    "num_classes": (lambda v: is_int(v, 2**31 - 1), "a number of classes"),
    "input_shape": (
        lambda v: isinstance(v, list) and len(v) == 3 and all(map(is_int, v)),
        "[channels, height, width]",
    ),
    "dataset": (lambda v: _matches(r"[a-z0-9-]{1,40}", v), "the name of a data set"),
    "classes": (
        lambda v: v is None or (isinstance(v, list) and all(map(_is_text, v)) and len(set(v)) == len(v)),
        "null or a list of different names",
    ),
    "resize": (lambda v: v is None or is_int(v, 100_000), "null or a number of pixels"),
    "images": (lambda v: is_int(v, 2**40), "a number of images"),
    "fingerprint": (lambda v: _matches(r"[0-9a-f]{16}", v), "16 hexadecimal digits"),
    "held_out": (lambda v: is_int(v, 2**40), "a number of images"),
    "seed": (lambda v: is_int(v, 2**64 - 1, 0), "a seed"),
}
