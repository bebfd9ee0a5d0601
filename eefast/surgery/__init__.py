"""Exits attached to any backbone."""

from .attachment import attach, new_parameters

__all__ = ["attach", "new_parameters"]
