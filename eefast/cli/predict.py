"""`eefast predict`: a network and a few image files → a table of classes, probabilities, exits and costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from .options import BatchSize, CropFraction, Device, Engine, Json, Network, Stages
from .output import check_writable, echo, next_step, note, write_json
from .render import table

if TYPE_CHECKING:
    from ..scoring.predictions import Candidate, Prediction


def command(
    network: Network,
    images: Annotated[list[Path], Argument(help="Image files, folders with some, .npy files.")],
    top: Annotated[int, Option(help="Number of most probable classes of each image.", min=1)] = 1,
    crop_fraction: CropFraction = None,
    engine: Engine = "auto",
    stages: Stages = "auto",
    batch_size: BatchSize = 64,
    device: Device = "auto",
    json_path: Json = "",
) -> None:
    """Classify image files, prepared as the network was trained; `eefast score` takes millions.

    Rows of a .npy file are pixels or windows as the network takes them.
    An image that cannot be read is a row with the reason, and the exit code is 1.
    """
    from .. import predict
    from .inputs import chosen_device

    check_writable(json_path)
    found = predict(
        network,
        images,
        top=top,
        crop_fraction=crop_fraction,
        on_error="record",
        engine=engine,
        device=chosen_device(device),
        batch_size=batch_size,
        stages=stages,
    )
    if json_path != "-":
        echo(table(["image", "class", "probability", "exit", "cost"], [_row(answer) for answer in found]))
        next_step(f"many images, into parquet files: eefast score {network} FOLDER --output OUT")
    write_json(json_path, {"network": str(network), "images": [_figures(answer) for answer in found]})
    if failed := [answer for answer in found if answer.error is not None]:
        for answer in failed:
            note(str(answer.error))
        raise RuntimeError(f"{len(failed)} of {len(found)} images could not be read")


def _row(answer: Prediction) -> list[str]:
    from ..data.image_files import shown

    if answer.error is not None:
        return [shown(answer.image), "cannot be read", "", "", ""]
    names = "\n".join(_name(candidate) for candidate in answer.top)
    values = "\n".join(f"{candidate.probability:.2%}" for candidate in answer.top)
    return [shown(answer.image), names, values, str(answer.exit), f"{answer.cost:.3f}"]


def _name(candidate: Candidate) -> str:
    from ..data.image_files import shown

    return shown(candidate.label if candidate.name is None else candidate.name)


def _figures(answer: Prediction) -> dict[str, Any]:
    return {**asdict(answer), "label": answer.label, "name": answer.name, "probability": answer.probability}
