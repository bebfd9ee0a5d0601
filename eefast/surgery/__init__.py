"""Exits attached to any backbone."""

from .attachment import attach, new_parameters
from .backbones import backbone

__all__ = ["attach", "backbone", "new_parameters"]
