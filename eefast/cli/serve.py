"""`eefast serve`: a network → an HTTP server that answers every image when it exits, until a signal ends it."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from .options import CropFraction, Device, Engine, Network, Stages
from .output import echo


def command(
    network: Network,
    host: Annotated[str, Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0: any free one, which is printed.", min=0, max=65535)] = 8000,
    engine: Engine = "auto",
    stages: Stages = "auto",
    device: Device = "auto",
    workers: Annotated[
        int | None,
        Option(
            help="Threads that answer, with the resident engine; by default one per core.", min=1, show_default=False
        ),
    ] = None,
    max_queue: Annotated[int, Option(help="Images that may wait; more are refused with 429.", min=1)] = 256,
    levels: Annotated[
        str,
        Option(
            metavar="NAME,NAME,…",
            help="Profiles of the network (eefast calibrate --profile … --save), the cheapest last: from half a queue "
            "on requests that name no X-Level get a cheaper one.",
        ),
    ] = "",
    deadline_ms: Annotated[float, Option(help="Of requests without X-Deadline-Ms; 0: none.", min=0)] = 0.0,
    max_body: Annotated[float, Option(help="Largest body of a request, in MB.", min=0.001)] = 8.0,
    drain: Annotated[float, Option(help="Seconds to answer what waits after SIGTERM.", min=0)] = 10.0,
    lame_duck: Annotated[
        float, Option(help="Seconds after SIGTERM in which /readyz says 503 and requests are still taken.", min=0)
    ] = 2.0,
    crop_fraction: CropFraction = None,
) -> None:
    """Answer images over HTTP, each as soon as it exits: POST /v1/predict.

    GET /v1/model, /healthz, /readyz, /metrics. SIGTERM answers all that was taken, exit code 0; a second one ends it.
    """
    from ..checkpoint.loading import load
    from ..planning import check_engine
    from ..serving.lifetime import Options, run
    from .inputs import chosen_device

    check_engine(engine, stages)
    options = Options(
        host=host,
        port=port,
        engine=engine,
        stages=stages,
        crop_fraction=crop_fraction,
        max_queue=max_queue,
        workers=workers,
        levels=tuple(filter(None, levels.split(","))),
        deadline_ms=deadline_ms,
        max_body=round(max_body * 2**20),
        drain=drain,
        lame_duck=lame_duck,
    )
    run(load(network).to(chosen_device(device)), options, echo)
