"""The words of the command line → the command that they name: a module each."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..version import __version__
from . import (
    bench,
    calibrate,
    calibrate_device,
    demo,
    env,
    evaluate,
    export,
    plot,
    predict,
    quantize,
    score,
    search,
    serve,
    train,
)
from .ending import Stopped


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Stopped(*stop.args) from stop
        except EOFError as error:
            # Typer would take it for Ctrl-D and print only "Aborted.".
            raise RuntimeError(f"a file ended too early: {error}") from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"eefast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Early-exit CNNs that answer a whole batch as fast as the arithmetic they save.

    In this order: train, calibrate, evaluate, plot, bench, then predict, score or serve; `eefast demo` needs nothing.

    Exit codes: 0 done; 1 failed during the work, or answers disagree; 2 wrong options or files, or a missing package;
    129 SIGHUP; 130 Ctrl-C; 143 SIGTERM. Whatever the end, no file is left half written.
    """


for module in (
    *(demo, train, search, calibrate, quantize, evaluate, predict, score, serve, export, bench, plot),
    *(calibrate_device, env),
):
    name = module.__name__.rpartition(".")[2].replace("_", "-")
    app.command(name, cls=score.RayAlone if module is score else None)(module.command)
