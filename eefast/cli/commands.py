"""Words of the command line → the command that they name."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from .bench import bench
from .calibrate import calibrate
from .calibrate_device import calibrate_device
from .demo import demo
from .ending import Stopped
from .evaluate import evaluate
from .plot import plot
from .train import train


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped(*stop.args) from stop
        except EOFError as error:
            # Typer would take it for Ctrl-D and say "Aborted.", nothing else.
            raise RuntimeError(f"a file ended too early: {error}") from error


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Early-exit CNNs that answer a whole batch as fast as the arithmetic they save.

    Exit codes: 0 done; 1 failed while it worked, or answers disagree; 2 wrong options or files, or a missing package;
    130 Ctrl-C; 143 SIGTERM. Whatever the end, no file is left half written.
    """


for command in (demo, train, calibrate_device, calibrate, evaluate, bench, plot):
    app.command()(command)
