"""`eefast env`: this installation → versions, devices, and which kernels are available, for a report of a fault."""

from __future__ import annotations

from typing import Any

from .options import Json
from .output import check_writable, echo, next_step, write_json


def command(json_path: Json = "") -> None:
    """Print versions, devices, which kernels are available, why each other one is not, and variables that are set."""
    from ..measure.installation import inspect_installation

    check_writable(json_path)
    found = inspect_installation()
    if json_path != "-":
        for title, lines in found.items():
            echo(f"{title}:")
            for line in _lines(lines):
                echo(f"  {line}")
        next_step("put this into a report of a fault")
    write_json(json_path, found)


def _lines(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [str(value)]
    width = max(map(len, value), default=0)
    return [f"{name:{width}}  {'not installed' if v is None else v}" for name, v in value.items()] or ["none"]
