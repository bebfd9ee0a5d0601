"""The words `eefast …` → a process that a signal ends in one line, already while it imports PyTorch (seconds)."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

STOPS = {signal.SIGINT: "interrupted by Ctrl-C", signal.SIGTERM: "ended by SIGTERM"}
if hasattr(signal, "SIGHUP"):
    STOPS[signal.SIGHUP] = "ended by SIGHUP"


def main() -> None:
    """Entry point of the `eefast` command, see `eefast.cli.ending.run`."""
    end_on_signals()
    try:
        # Here, because a package's entry point is not called before the package is imported, and PyTorch with it.
        from eefast.cli import main as command
    except (ImportError, OSError) as error:  # PyTorch is missing or broken, or EEFAST_LIBRARY does not load.
        print("error: eefast cannot be imported:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    command()


def end_on_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP end this process at once, unless its parent has told it to ignore them.

    An exception instead would pass through the imports of other packages, some of which drop it.
    """
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # Unbuffered, because the signal may have come in the middle of a print.
    with suppress(OSError, AttributeError):
        os.write(2, f"error: {STOPS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)
