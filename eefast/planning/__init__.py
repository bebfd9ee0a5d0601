"""Network, device and options → the engine that runs the network."""

from .planner import ENGINES, Options, build

__all__ = ["ENGINES", "Options", "build"]
