"""Exits attached to any backbone."""

from .attachment import attach

__all__ = ["attach"]
