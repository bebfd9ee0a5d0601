"""What planning raises where an engine cannot run a network, or would be too slow."""

from __future__ import annotations


class UnsupportedError(ValueError):
    """An engine cannot run something in the network; the message names it.

    path: of the module inside of the traced one that is to blame, "" where none is known.
    """

    path = ""

    def at(self, path: str) -> UnsupportedError:
        """The same error, with the path."""
        self.path = path
        return self


class SlowerError(UnsupportedError):
    """An engine would be slower than another one that is ready; the message says by how much."""
