"""`eefast export`: a network → a folder of files that run without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .options import Json, Network
from .output import check_writable, echo, next_step, write_json
from .render import table

NEXT = {
    "stages": "run it with PyTorch alone, as examples/run_stages.py does",
    "aoti": "run it from C++, as examples/cpp/run_package.cpp does",
    "onnx": "run it with ONNX Runtime and NumPy, as examples/run_onnx.py does",
}


def command(
    network: Network,
    output: Annotated[Path, Argument(help="A new folder, or one that an earlier export wrote, which is replaced.")],
    file_format: Annotated[
        str,
        Option(
            "--format",
            help="stages: a program of torch.export per stage; aoti: one package for C++, compiled in about a minute; "
            "onnx: a model per stage, and one of all stages for single images.",
        ),
    ] = "stages",
    json_path: Json = "",
) -> None:
    """Write a network as files that run without eefast, after their answers were compared with the network's."""
    from .. import export, load
    from ..exporting.manifest import read

    check_writable(json_path)
    folder = export(load(network), output, format=file_format)
    manifest = read(folder)
    if json_path != "-":
        sizes = [(file["name"], (folder / file["name"]).stat().st_size / 1e6) for file in manifest["files"]]
        echo(table(["file", "MB"], [[name, f"{size:.3f}"] for name, size in sizes]))
        echo(f"\nsaved: {folder}, with manifest.json")
        next_step(NEXT[file_format])
    write_json(json_path, {"output": str(folder), **manifest})
