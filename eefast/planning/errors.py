"""What planning raises where an engine cannot run a network."""


class UnsupportedError(ValueError):
    """An engine cannot run something in the network; the message names it."""
