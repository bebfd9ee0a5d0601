"""Run an interpreted Triton launch with its programs in threads that take turns at random moments.

Triton's interpreter runs one program after the other, so that nothing ever waits and no race shows.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from typing import Any

import triton.language as tl  # noqa: F401  (the interpreter looks for it among the globals of what it runs)
from eefast.kernels.launch import Launch
from triton.runtime.interpreter import GridExecutor, interpreter_builder


def run_concurrently(launch: Launch, threads: int) -> None:
    """`launch.run()`. The programs must not ask for their program_id, which the interpreter keeps once for all."""
    program = launch.kernel.rewrite()
    waiting = list(range(launch.grid[0]))
    errors: list[BaseException] = []

    @functools.wraps(program)
    def all_programs(**arguments: Any) -> None:
        interpreter_builder.set_grid_dim(launch.grid[0], 1, 1)

        def work() -> None:
            try:
                while waiting and not errors:
                    waiting.pop()
                    program(**arguments)
            except IndexError:
                pass  # another thread took the last one
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
        if any(worker.is_alive() for worker in workers) and not errors:
            errors.append(TimeoutError("programs still wait for one another after a minute"))

    all_programs.__signature__ = inspect.signature(program)  # type: ignore[attr-defined]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        GridExecutor(all_programs, launch.kernel.arg_names, (1,))(**launch.arguments)
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
