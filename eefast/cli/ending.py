"""How a command ended → its exit code and, unless all went well, one line on stderr that says why."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from eefast_command import STOPS

from ..system.files import WriteError

FAILED, WRONG_USAGE = 1, 2
# Module → the extra of this package that brings it.
EXTRAS = {
    **dict.fromkeys(("typer", "rich"), "cli"),
    **dict.fromkeys(("lightning", "yaml", "scipy", "torchvision"), "train"),
    "matplotlib": "plot",
}
# So long the first signal has for removing what is half written and ending worker processes.
GRACE_SECONDS = 3.0


class Stopped(BaseException):
    """A KeyboardInterrupt on its way through Typer, which would drop its words."""


def main() -> None:
    """Entry point of the `eefast` command, see `run`."""

    def command() -> None:
        # Here, because it needs packages that may be missing.
        from typer.main import get_command

        from .commands import app

        # Called directly, the app would put its own hook for uncaught exceptions in the place of `_Stops`'.
        get_command(app)()

    raise SystemExit(run(command))


def run(command: Callable[[], object]) -> int:
    """The exit code of a command: 0, or its own; says in one line on stderr why it failed.

    1: the work failed (`RuntimeError`, `WriteError`, `MemoryError`). 2: wrong usage, files or packages (`ValueError`,
    other `OSError`, `ImportError`). 128 + number: SIGINT (130), SIGTERM (143), SIGHUP (129); they raise
    `KeyboardInterrupt` in the command, whose text is said too. Other exceptions are faults of this program and pass.
    """
    stops = _Stops()
    code, why, more = 0, "", ""
    try:
        stops.install()
        command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as end:
        code, why = (end.code or 0, "") if end.code is None or isinstance(end.code, int) else (FAILED, str(end.code))
    except (KeyboardInterrupt, Stopped) as stop:
        code, why, more = 128 + signal.SIGINT, STOPS[signal.SIGINT], str(stop)
    except BrokenPipeError:
        # Who read stdout has seen enough.
        code = FAILED
    except (RuntimeError, WriteError, MemoryError) as error:
        code, why = FAILED, str(error) or type(error).__name__
    except ModuleNotFoundError as error:
        code, why = WRONG_USAGE, _missing(error)
    except (ValueError, OSError, ImportError) as error:
        code, why = WRONG_USAGE, str(error) or type(error).__name__
    finally:
        stops.over = True
        _let_go_of_stdout()
    if stops.first is not None:
        # Whatever became of it on the way, such as the SystemExit that Lightning makes of Ctrl-C.
        code, why = 128 + stops.first, STOPS[stops.first]
    if why:
        with suppress(OSError, AttributeError):
            print("error:", " ".join("; ".join(filter(None, (why, more))).split()), file=sys.stderr, flush=True)
    stops.restore()
    return code


class _Stops:
    """Signals that ask for an end: the first one raises KeyboardInterrupt, unless the command is over."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.over, self.since, self.process = False, 0.0, os.getpid()
        self.before: dict[signal.Signals, Any] = {}
        self.hooks = sys.unraisablehook, sys.excepthook

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOPS:
            # What a parent has told this process to ignore, such as nohup, it ignores.
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._stop)
        sys.unraisablehook, sys.excepthook = self._unraisable, self._uncaught

    def restore(self) -> None:
        """After a signal the process is about to end, which no second one should break into."""
        sys.unraisablehook, sys.excepthook = self.hooks
        for number, handler in self.before.items() if self.first is None else ():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            # A worker process that was forked from here and got the signal with the whole group. PyTorch would tell
            # of any other exit code, in the middle of the cleaning up.
            os._exit(0)
        if self.first is not None:
            if time.monotonic() - self.since > GRACE_SECONDS:
                os._exit(128 + number)
            return
        self.first, self.since = signal.Signals(number), time.monotonic()
        self._raise()

    def _raise(self, *_: Any) -> None:
        if not self.over:
            raise KeyboardInterrupt

    def _unraisable(self, what: Any) -> None:
        if self.first is None:
            self.hooks[0](what)
        elif issubclass(what.exc_type, KeyboardInterrupt) and not self.over and hasattr(signal, "setitimer"):
            # It was raised in a destructor or after a fork, where Python lets nothing out: again, once that is over.
            signal.signal(signal.SIGALRM, self._raise)
            signal.setitimer(signal.ITIMER_REAL, 0.01)

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Worker processes inherit this. Only multiprocessing's thread that hands out memory calls it there, when the
        # process that asked for some has gone; in this process, workers may have gone after a signal.
        gone = os.getpid() != self.process or (self.first is not None and issubclass(kind, (OSError, EOFError)))
        if not gone:
            self.hooks[1](kind, error, trace)


def _missing(error: ModuleNotFoundError) -> str:
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return str(error)
    return (
        f'{module} is not installed; pip install "eefast[{EXTRAS[module]}]" brings it, eefast[demo] all of the commands'
    )


def _let_go_of_stdout() -> None:
    """Where stdout takes no more, Python must not try again at its end, and say so in its own words."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
