"""A network's profiles ↔ rows of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from math import isinf
from typing import Any

from ..profiles import Profile, Profiles
from .fields import MOST_EXITS, Field, is_int, is_name, is_number

MOST_PROFILES = 4096


def rows(profiles: Profiles) -> dict[str, Any]:
    """JSON has no infinite numbers; they are written as texts."""
    return {
        name: {"thresholds": [str(t) if isinf(t) else t for t in p.thresholds], "last_exit": p.last_exit}
        for name, p in profiles.items()
    }


def read(found: Mapping[str, Any]) -> Profiles:
    """What `rows` wrote, checked before by `FIELD`."""
    return Profiles(
        {name: Profile(tuple(map(float, row["thresholds"])), row["last_exit"]) for name, row in found.items()}
    )


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() == {"thresholds", "last_exit"}
        and isinstance(row["thresholds"], list)
        and len(row["thresholds"]) <= MOST_EXITS
        and all(is_number(t) or t in ("inf", "-inf") for t in row["thresholds"])
        and (row["last_exit"] is None or is_int(row["last_exit"], MOST_EXITS, least=0))
    )


FIELD: Field = (
    lambda v: isinstance(v, dict) and len(v) <= MOST_PROFILES and all(is_name(k) and _is_row(r) for k, r in v.items()),
    'names of profiles, each with thresholds, finite or "inf" or "-inf", and last_exit, null or an exit',
)
