"""The fields of a JSON object from a file → the same, checked one by one against a schema."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from .stored import quoted

Field = tuple[Callable[[Any], bool], str]
"""A check of a field's value, and the values that pass it in words."""
MOST_ELEMENTS = 2**31 - 1
MOST_EXITS = 64


def check_fields(config: Mapping[str, Any], schema: Mapping[str, Field], file: str) -> None:
    """`ValueError` unless `config` has exactly the keys of `schema`, each with a value that its check takes.

    file: where `config` was read.
    """
    if difference := schema.keys() ^ config.keys():
        kind = {True: "lacks", False: "has the unknown key"}
        named = sorted(difference)[:8]
        raise ValueError(f"{file} " + ", ".join(f"{kind[k in schema]} {quoted(k)}" for k in named))
    for key, (check, wanted) in schema.items():
        if not check(config[key]):
            raise ValueError(f"{file} says {key}={reprlib.repr(config[key])}; it must be {wanted}")


def is_int(value: Any, most: int = 65_535, least: int = 1) -> bool:
    """Whether `value` is an integer of `least` … `most`, and no bool."""
    return type(value) is int and least <= value <= most


def is_name(value: Any) -> bool:
    """Whether `value` is a text of 1 … 200 characters."""
    return isinstance(value, str) and 0 < len(value) <= 200


def is_shape(value: Any, sides: Sequence[int] = (2,)) -> bool:
    """Whether `value` is (channels, height, width) of an image that PyTorch can count; sides: how many it may have."""
    shape = isinstance(value, (tuple, list)) and len(value) - 1 in sides and all(map(is_int, value))
    return shape and prod(value) <= MOST_ELEMENTS


def is_normalization(value: Any) -> bool:
    """Whether `value` is None, or (means, deviations) of finite numbers, the deviations above 0."""
    if value is None:
        return True
    parts = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(p, (tuple, list)) for p in value)
    return parts and all(map(is_number, (*value[0], *value[1]))) and all(v > 0 for v in value[1])


def check_channels(normalization: Sequence[Sequence[float]] | None, shape: Sequence[int]) -> None:
    """`ValueError` unless there is one mean and one deviation per channel of images of `shape`."""
    if normalization is not None and {len(part) for part in normalization} != {shape[0]}:
        counts = " means and ".join(str(len(part)) for part in normalization)
        raise ValueError(f"normalization has {counts} deviations, but images have {shape[0]} channels")


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float that float32 can hold."""
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max
