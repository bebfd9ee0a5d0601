"""Network, device and options → the engine that runs the network."""

from .planner import ENGINES, Options, build, check_engine

__all__ = ["ENGINES", "Options", "build", "check_engine"]
