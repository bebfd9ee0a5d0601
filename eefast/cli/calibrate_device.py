"""`eefast calibrate-device`: a GPU → what launches and waits take there, for the plans of all later runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from typer import Option

from .inputs import check_folders
from .options import Json
from .output import say, write_json


def calibrate_device(
    device: Annotated[str, Option(help="A CUDA device, such as cuda or cuda:1.")] = "cuda",
    json_path: Json = "",
) -> None:
    """Measure what a GPU takes for launches and waits, and keep it for the plans of all later runs; takes a second."""
    import torch

    from ..planning import launch_costs

    check_folders(json_path)
    if not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch finds no CUDA device here; on the CPU nothing needs calibration")
    table = launch_costs.calibrate(torch.device(device))
    if json_path != "-":
        say(f"launch of a CUDA graph, on the host    {1e6 * table.launch:6.1f} µs")
        say(f"wait for a count, the device idle      {1e6 * table.wait:6.1f} µs")
        say(f"\nkept in {launch_costs.path(torch.device(device))}")
    write_json(json_path, asdict(table))
