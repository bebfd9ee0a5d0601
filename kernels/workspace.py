"""Zeroed device memory for the scan over the live list; every launch leaves it zeroed again."""

from __future__ import annotations

import torch
from torch import Tensor

_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def workspace_for(device: torch.device, words: int) -> Tensor:
    """At least `words` int32 zeros. Launches on one stream follow each other and share them; streams do not."""
    if device.type != "cuda":
        return torch.zeros(words, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed beside anything, so it gets memory of its own, cleared in every replay.
        return torch.zeros(words, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    workspace = _workspaces.get(key)
    if workspace is None or len(workspace) < words:
        workspace = _workspaces[key] = torch.zeros(max(words, 4096), dtype=torch.int32, device=device)
    return workspace
