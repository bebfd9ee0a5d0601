"""What a network says about image files and its classes ↔ the keys of config.json that a folder need not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..model import EarlyExitNet
from ..preprocessing import INTERPOLATIONS, Preprocessing
from .fields import Field, check_fields, is_int


def describe(net: EarlyExitNet) -> dict[str, Any]:
    """The keys that `read` reads; none for what the network does not say, so that older versions read the folder.

    Raises `ValueError` for names of classes that are not one different text for each, and for images that are scaled to
    less than the network takes.
    """
    found: dict[str, Any] = {}
    if net.preprocessing is not None:
        found["preprocessing"] = asdict(net.preprocessing)
        net.preprocessing.check(net.input_shape)
    if net.classes is not None:
        found["classes"] = list(net.classes)
        check_fields({"classes": found["classes"]}, {"classes": _CLASSES}, "the network")
        _check_count(found["classes"], net.num_classes, "the network")
    return found


def take(config: dict[str, Any], file: str) -> tuple[Preprocessing | None, tuple[str, ...] | None]:
    """What `describe` wrote, taken out of `config`, which was read from `file` and may lack any of it."""
    there: dict[str, Any] = {key: config.pop(key) for key in ("preprocessing", "classes") if key in config}
    check_fields(there, {key: _FIELDS[key] for key in there}, file)
    how, classes = there.get("preprocessing"), there.get("classes")
    return None if how is None else Preprocessing(**how), None if classes is None else tuple(classes)


def give(net: EarlyExitNet, preprocessing: Preprocessing | None, classes: tuple[str, ...] | None, file: str) -> None:
    """Tell the network; what its folder does not say, the record of its training does, where there is one."""
    record = net.record
    if preprocessing is None and record is not None:
        preprocessing = Preprocessing(record.resize or min(net.input_shape[1:]))
    if preprocessing is not None:
        preprocessing.check(net.input_shape)
    if classes is not None:
        _check_count(classes, net.num_classes, file)
    net.preprocessing = preprocessing
    net.classes = classes if classes is not None or record is None else record.classes


def _check_count(classes: Any, count: int, owner: str) -> None:
    if len(classes) != count:
        raise ValueError(f"{owner} names {len(classes)} classes, but has {count}")


def _is_preprocessing(value: Any) -> bool:
    if not isinstance(value, Mapping) or value.keys() != {"resize", "interpolation"}:
        return False
    return is_int(value["resize"], 100_000) and value["interpolation"] in INTERPOLATIONS


def _are_names(value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(name, str) and 0 < len(name) <= 255 for name in value)
    return texts and len({*value}) == len(value)


_CLASSES: Field = (_are_names, "a list of different names, each of 1 … 255 characters")
_FIELDS: dict[str, Field] = {
    "preprocessing": (_is_preprocessing, f"resize, 1 … 100000, and interpolation, {' or '.join(INTERPOLATIONS)}"),
    "classes": _CLASSES,
}
