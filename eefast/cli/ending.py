"""How a command ended → its exit code and, after an error or a signal, one line on stderr that says why."""

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
    **dict.fromkeys(("PIL", "pyarrow"), "score"),
    "ray": "ray",
    **dict.fromkeys(("onnx", "onnxruntime"), "onnx"),
    "huggingface_hub": "hub",
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client"), "serve"),
}
# Time after the first signal to remove half-written files and end worker processes; then a second one ends at once.
GRACE_SECONDS = 3.0


class Stopped(BaseException):
    """A KeyboardInterrupt in disguise: Typer would drop its text."""


def main() -> None:
    """Entry point of the `eefast` command, see `run`."""

    def command() -> None:
        # Here, because it needs packages that may be missing.
        from typer.main import get_command

        from .commands import app

        # Called directly, the app would replace the hook for uncaught exceptions that `_Stops` installs.
        get_command(app)()

    raise SystemExit(run(command))


def run(command: Callable[[], object]) -> int:
    """Run a command → its exit code; one line on stderr says why it failed.

    1: the work failed (`RuntimeError`, `WriteError`, `MemoryError`). 2: wrong usage, files or packages (`ValueError`,
    other `OSError`, `ImportError`). 128 + number: SIGINT (130), SIGTERM (143), SIGHUP (129); they raise
    `KeyboardInterrupt` in the command, whose text is printed too. Other exceptions are bugs and are raised.
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
        # The reader of stdout has closed it.
        code = FAILED
    except (RuntimeError, WriteError, MemoryError) as error:
        code, why = FAILED, str(error) or type(error).__name__
    except ModuleNotFoundError as error:
        code, why = WRONG_USAGE, missing(error)
    except (ValueError, OSError, ImportError) as error:
        code, why = WRONG_USAGE, str(error) or type(error).__name__
    finally:
        stops.over = True
        _drop_stdout()
    if stops.first is not None:
        # Whatever it was turned into, such as the SystemExit that Lightning makes of Ctrl-C.
        code, why = 128 + stops.first, STOPS[stops.first]
    if why:
        with suppress(OSError, AttributeError):
            print("error:", " ".join("; ".join(filter(None, (why, more))).split()), file=sys.stderr, flush=True)
    stops.restore()
    return code


class _Stops:
    """Handlers of signals that end a command: the first signal raises KeyboardInterrupt, unless the command is over."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.over, self.since, self.process = False, 0.0, os.getpid()
        self.before: dict[signal.Signals, Any] = {}
        self.hooks = sys.unraisablehook, sys.excepthook

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOPS:
            # A signal that the parent, such as nohup, told this process to ignore stays ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._stop)
        sys.unraisablehook, sys.excepthook = self._unraisable, self._uncaught

    def restore(self) -> None:
        """Not after a signal: the process is about to end, which no second signal should interrupt."""
        sys.unraisablehook, sys.excepthook = self.hooks
        for number, handler in self.before.items() if self.first is None else ():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            # A forked worker process that got the signal with its whole group. PyTorch would report any other exit
            # code in the middle of the cleaning up.
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
            # It was raised in a destructor or after a fork, where Python drops exceptions: raise it again afterwards.
            signal.signal(signal.SIGALRM, self._raise)
            signal.setitimer(signal.ITIMER_REAL, 0.01)

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Worker processes inherit this. There only multiprocessing's thread that shares memory calls it, when the
        # process that asked for some has ended; in this process, workers may have ended after a signal.
        gone = os.getpid() != self.process or (self.first is not None and issubclass(kind, (OSError, EOFError)))
        if not gone:
            self.hooks[1](kind, error, trace)


def missing(error: ModuleNotFoundError) -> str:
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return str(error)
    return (
        f'{module} is not installed; pip install "eefast[{EXTRAS[module]}]" brings it, eefast[demo] all of the commands'
    )


def _drop_stdout() -> None:
    """After an error on stdout: keep Python from trying again when it ends, and from printing a message about it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
