"""Zeroed device memory for the scan over the live list; every launch leaves it zeroed again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def workspace_for(device: torch.device, words: int) -> Tensor:
    """At least `words` int32 zeros. Launches on one stream follow each other and share them; streams do not."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # A graph may be replayed beside anything, so it gets separate memory, cleared in every replay.
        return torch.zeros(words, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = device, stream.cuda_stream
    workspace = _workspaces.get(key)
    if workspace is None or len(workspace) < words:
        # torch.compile's warm-up for CUDA graphs frees what its thread allocates; this memory must stay.
        with ThreadPoolExecutor(1) as thread:
            workspace = _workspaces[key] = thread.submit(_allocate, stream, max(words, 4096)).result()
    return workspace


def _allocate(stream: torch.cuda.Stream, words: int) -> Tensor:
    with torch.cuda.stream(stream):
        return torch.zeros(words, dtype=torch.int32, device=stream.device)
