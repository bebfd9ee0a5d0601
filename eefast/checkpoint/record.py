"""What training knew of its images ↔ training.json beside a network's weights, checked before it becomes a default."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .stored import parse_json
from .stored import read as read_bytes

RECORD_FILE = "training.json"
MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class TrainingRecord:
    """The images that a network was trained on, and which of them were kept aside.

    network: name of the network or, with its library, of the backbone.
    num_classes, input_shape: as `EarlyExitNet` has them; input_shape is (C, H, W).
    dataset: a name in `eefast.train.data.DATASETS`.
    classes: names of the classes in the order of the labels, where folders give them names.
    resize: pixels of the shorter side that photographs are brought to before the centre is cut out to H × W; None where
        images are taken as they are.
    images, fingerprint: number of all training images, those kept aside among them, and a hash of which is where, see
        `eefast.train.data.fingerprint`.
    held_out, seed: so many of them, drawn by the seed, were kept aside to choose thresholds on, see
        `eefast.thresholds.evaluation.split`.
    """

    network: str
    num_classes: int
    input_shape: tuple[int, ...]
    dataset: str
    classes: tuple[str, ...] | None
    resize: int | None
    images: int
    fingerprint: str
    held_out: int
    seed: int

    def text(self) -> str:
        """What `read` reads; names of classes that would make the file too large are left out."""
        found = json.dumps({"format": 1, **asdict(self)}, indent=2) + "\n"
        return found if len(found) <= MOST_BYTES else json.dumps({"format": 1, **asdict(self), "classes": None}) + "\n"


def read(folder: Path, network: str, num_classes: int, input_shape: Sequence[int]) -> TrainingRecord | None:
    """The record in a folder, None if there is none; nothing that it names is opened.

    network, num_classes, input_shape: of the network in the folder.
    Raises `ValueError` for a file that `TrainingRecord.text` did not write, or that is of another network.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        found = parse_json(read_bytes(path, MOST_BYTES), RECORD_FILE)
    except ValueError as error:
        raise ValueError(f"{error}; delete it, or train again") from error
    if found.keys() != _FIELDS.keys():
        raise ValueError(f"{RECORD_FILE} must be an object of {', '.join(_FIELDS)}; delete it, or train again")
    for key, (check, wanted) in _FIELDS.items():
        if not check(found[key]):
            said = reprlib.repr(found[key])
            raise ValueError(f"{RECORD_FILE} says {key}={said}; it must be {wanted}; delete it, or train again")
    for key, own in (("network", network), ("num_classes", num_classes), ("input_shape", list(input_shape))):
        if found[key] != own:
            raise ValueError(f"{RECORD_FILE} says {key}={found[key]!r}, the network has {own!r}; delete it")
    classes = found["classes"]
    if classes is not None and len(classes) != num_classes:
        raise ValueError(
            f"{RECORD_FILE} names {len(classes)} classes, the network has {num_classes}; delete it, or train again"
        )
    if found["held_out"] > found["images"]:
        raise ValueError(f"{RECORD_FILE} says held_out={found['held_out']} of images={found['images']}; delete it")
    del found["format"]
    return TrainingRecord(
        **{
            **found,
            "input_shape": tuple(found["input_shape"]),
            "classes": None if classes is None else tuple(classes),
        }
    )


def _is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_text(value: Any, most: int = 255) -> bool:
    return isinstance(value, str) and 0 < len(value) <= most


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda v: type(v) is int and v == 1, "1, the format that this eefast reads; a newer one may read it"),
    "network": (_is_text, "a name"),
    "num_classes": (lambda v: _is_int(v, 1, 2**31 - 1), "a number of classes"),
    "input_shape": (
        lambda v: isinstance(v, list) and len(v) == 3 and all(_is_int(n, 1, 65_535) for n in v),
        "[channels, height, width]",
    ),
    "dataset": (
        lambda v: isinstance(v, str) and re.fullmatch(r"[a-z0-9-]{1,40}", v) is not None,
        "the name of a data set",
    ),
    "classes": (
        lambda v: v is None or (isinstance(v, list) and all(map(_is_text, v)) and len(set(v)) == len(v)),
        "null or a list of different names",
    ),
    "resize": (lambda v: v is None or _is_int(v, 1, 100_000), "null or a number of pixels"),
    "images": (lambda v: _is_int(v, 1, 2**40), "a number of images"),
    "fingerprint": (
        lambda v: isinstance(v, str) and re.fullmatch(r"[0-9a-f]{16}", v) is not None,
        "16 hexadecimal digits",
    ),
    "held_out": (lambda v: _is_int(v, 1, 2**40), "a number of images"),
    "seed": (lambda v: _is_int(v, 0, 2**64 - 1), "a seed"),
}
