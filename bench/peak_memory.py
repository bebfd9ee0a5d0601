"""The most memory held while something runs: beyond what was held before on a GPU, by the whole process on a CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
PROCESS = Path("/proc/self")


def peak_memory(run: Callable[[], Result], device: str) -> tuple[Result, int | None]:
    """What `run` returns, and bytes.

    "cuda": what PyTorch reserved at most, less what it held before: weights and CUDA graphs that `run` makes are in it,
    those made before are not, nor what others than PyTorch's allocator hold.
    "cpu": the largest resident set of this process, the interpreter, libraries and all else that it holds included;
    None where the system cannot reset it, as only Linux can.
    """
    return _on_cuda(run) if device == "cuda" else of_process(run, PROCESS)


def _on_cuda(run: Callable[[], Result]) -> tuple[Result, int | None]:
    # Cached blocks would be taken instead of new ones, and not show.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    result = run()
    return result, torch.cuda.max_memory_reserved() - before


def of_process(run: Callable[[], Result], process: Path) -> tuple[Result, int | None]:
    try:
        # See proc(5): the peak is reset to what is resident now.
        (process / "clear_refs").write_text("5")
    except OSError:
        return run(), None
    result = run()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", (process / "status").read_text(), re.MULTILINE)
    return result, None if found is None else 1024 * int(found[1])
