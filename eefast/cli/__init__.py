"""The command line, a file per command: data goes to stdout, everything else to stderr."""

from __future__ import annotations

import typer

from .bench import bench
from .calibrate import calibrate
from .calibrate_device import calibrate_device
from .demo import demo
from .evaluate import evaluate
from .output import talk
from .plot import plot
from .train import train

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Early-exit CNNs that answer a whole batch as fast as the arithmetic they save."""


for command in (demo, train, calibrate_device, calibrate, evaluate, bench, plot):
    app.command()(command)


def main() -> None:
    """Entry point of the `eefast` command: exit code 2 for wrong usage or files, 1 for answers that disagree."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        talk.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from error
