"""Names of version 0.1 → those that replaced them, with a `DeprecationWarning`; version 0.3 will not know them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

UNTIL = "0.3.0"
"""The version from which on what warns here is gone."""


def warn(old: str, new: str, above: int) -> None:
    """above: how many calls above this one the user's line is."""
    warnings.warn(
        f"{old} is deprecated and will be gone in eefast {UNTIL}; use {new}", DeprecationWarning, stacklevel=above + 1
    )


def renamed_arguments(**new_names: str) -> Callable[[Function], Function]:
    """A function that also takes keywords by their old names: old="new".

    It raises `TypeError` where a call has the old and the new name.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def renaming(*args: Any, **given: Any) -> Any:
            for old, new in new_names.items():
                if old not in given:
                    continue
                if new in given:
                    raise TypeError(f"{function.__name__} got {new}= and {old}=, its old name; leave {old}= out")
                warn(f"{function.__name__}({old}=)", f"{new}=", 2)
                given[new] = given.pop(old)
            return function(*args, **given)

        return renaming  # type: ignore[return-value]

    return decorate
