"""The op namespace `eefast::`, after the C++ library, where it is built, has been loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

log = logging.getLogger("eefast")


def load_cpp(package: Path) -> str | None:
    """Load the C++ kernels, which replace the Python references on the CPU; None, or why that was not possible.

    Raises `OSError` where EEFAST_LIBRARY names a library that does not load.
    """
    if os.environ.get("EEFAST_USE_CPP", "1") == "0":
        return "switched off by EEFAST_USE_CPP=0"
    if wanted := os.environ.get("EEFAST_LIBRARY"):
        torch.ops.load_library(wanted)
        return None
    libraries = sorted(package.glob("_C*.so"))
    if not libraries:
        if not (package.parent / "csrc").is_dir():
            return "not built; install with a C++ compiler"
        why = "not built; run `make` or `pip install --no-build-isolation -e .` in the checkout"
        log.warning("the C++ kernels are %s", why)
        return why
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}"
    return None


CPP_MISSING = load_cpp(Path(__file__).parent.parent)
"""None where the C++ kernels are loaded, else the reason why the references run instead."""

namespace = torch.library.Library("eefast", "DEF")

SCHEMAS: list[str] = []
"""Schemas of all ops. csrc/bind*.cpp repeat those with C++ kernels, for processes that load the library without this
package."""


def define(schema: str) -> None:
    """Define an op unless the C++ library, which was loaded before, has defined it."""
    SCHEMAS.append(schema)
    if not hasattr(torch.ops.eefast, schema.partition("(")[0]):
        namespace.define(schema)
