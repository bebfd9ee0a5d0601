"""Whatever interrupts training → an exception of one line that says what can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from ..system import files
from .checkpoints import CheckpointWriter, RunRecord, first_line, read_checkpoint
from .folder import LAST_FILE
from .module import DivergedError


@contextmanager
def explained(record: RunRecord, writer: CheckpointWriter, checkpoint: Path | None) -> Iterator[None]:
    """checkpoint: what the run continues from; one that does not fit it is a `ValueError`."""

    def finished() -> int:
        return writer.epochs or (read_checkpoint(checkpoint)["epoch"] + 1 if checkpoint else 0)

    def more() -> str:
        return f"--resume (resume=True) goes on after epoch {finished()}" if finished() else "no epoch was finished"

    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning makes a SystemExit of Ctrl-C, and another one of SIGTERM, which stays.
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt(more()) from stop
        raise
    except DivergedError as error:
        raise DivergedError(f"{error}; {LAST_FILE} has epoch {finished()}" if finished() else str(error)) from error
    except files.WriteError as error:
        raise files.WriteError(f"{error}; {more()}") from error
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        if checkpoint is not None and not record.started:
            raise ValueError(
                f"resume=True: {checkpoint} does not fit this run ({first_line(error)}); "
                "start again without --resume (resume=False)"
            ) from error
        if record.started and isinstance(error, (OSError, RuntimeError)):
            raise RuntimeError(f"{error}; {more()}") from error
        raise
