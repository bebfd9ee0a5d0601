"""What the commands of bench/ share: the device asked for, and the table and exit code at the end of a measurement."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import torch
from rows import Record, read, results_file
from summary import failures, show


def add_device_option(parser: ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def chosen_device(parser: ArgumentParser, asked: Namespace, doing: str) -> str:
    """doing: what is done on it, for the message: "measure"."""
    device: str = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: PyTorch finds no CUDA device here; leave the option out to {doing} the CPU")
    return device


def conclude(around: Record) -> int:
    """Show the rows written since `around` was made; 1 where an answer was wrong, or eefast's ops did not run."""
    rows = read([results_file(around)], around["date"])
    print(show(rows))
    return int(failures(rows))


def run_command(main: Callable[[], int]) -> None:
    """Exits with what `main` returns; a missing file or a wrong value is one line on stderr and exit code 1."""
    try:
        sys.exit(main())
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
