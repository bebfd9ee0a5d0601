"""The command line, a file per command: data goes to stdout, everything else to stderr."""

from .ending import main

__all__ = ["main"]
