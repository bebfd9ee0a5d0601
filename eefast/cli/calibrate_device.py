"""`eefast calibrate-device`: a GPU → the time of its launches and waits, kept for the plans of all later runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from typer import Option

from .options import Json
from .output import check_writable, echo, next_step, write_json


def command(
    device: Annotated[str, Option(help="A CUDA device, such as cuda or cuda:1.")] = "cuda",
    json_path: Json = "",
) -> None:
    """Measure a GPU's launches and waits, and keep the times for the plans of all later runs; takes a second."""
    import torch

    from ..planning import launch_costs

    check_writable(json_path)
    if not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch finds no CUDA device here; the CPU needs no calibration")
    table = launch_costs.calibrate(torch.device(device))
    if json_path != "-":
        echo(f"launch of a CUDA graph, on the host    {1e6 * table.launch:6.1f} µs")
        echo(f"wait for a count, the device idle      {1e6 * table.wait:6.1f} µs")
        echo(f"\nkept in {launch_costs.path(torch.device(device))}")
        next_step("eefast.accelerate reads it whenever it plans for this device")
    write_json(json_path, asdict(table))
