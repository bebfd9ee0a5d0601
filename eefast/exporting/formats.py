"""`export`: a network → a folder of files in one of three formats, after its answers were compared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..model import EarlyExitNet

if TYPE_CHECKING:
    from .exported import Exported

FORMATS = ("stages", "aoti", "onnx")


def export(net: EarlyExitNet | str | Path, folder: str | Path, *, format: str = "stages") -> Path:
    """Write a network as files that programs without eefast run, with a manifest; returns the folder.

    net: a network in float32 on the CPU, or the folder of one.
    folder: new, empty, or one that an earlier export wrote, which is replaced when the new files are complete.
    format: "stages": a program of torch.export per stage. "aoti": one package of AOTInductor around eefast's resident
        op, with the library of that op, for C++; it takes about a minute. "onnx": a model per stage, and one model of
        all stages for single images, for ONNX Runtime. All but the last take any number of images.

    The answers of the files are compared with the network's, exit by exit, on noise.
    Raises `ValueError` for a network that this format cannot hold, and where a package is missing, `RuntimeError` where
    files give other answers, `eefast.system.files.WriteError` for a full disk and the like.
    """
    from ..modules.contexts import isolated, mode
    from ..system.files import WriteError

    folder = Path(folder)
    target = folder.resolve()  # a link stays
    net = net if isinstance(net, EarlyExitNet) else _loaded(net)
    check(net, format)
    _check_folder(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name[:40]}.", dir=target.parent) as name:
            made = Path(name) / "made"
            made.mkdir()
            with isolated(net.cost.device), mode(net, False):
                write(net, made, format)
                _compare(net, made, format)
            if target.exists():
                target.replace(Path(name) / "before")
            made.replace(target)
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror or error}; name another folder") from error
    return folder


def check(net: EarlyExitNet, format: str) -> None:
    """`ValueError` for what can be refused before work starts."""
    from ..planning.integer_lowering import is_quantized
    from ..runtimes.onnx_models import ONNX_NEEDS, missing

    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if net.criterion.step:
        raise ValueError(
            f"criterion={net.criterion.name!r} is a rule in Python, which no file holds; export "
            'net.with_criterion("max_probability"), or a rule of eefast.rules'
        )
    weight = next(net.parameters(), net.cost)
    if weight.device.type != "cpu":
        raise ValueError(f"net is on {weight.device}, and exported files run on the CPU; give net.cpu()")
    if weight.dtype != torch.float32:
        raise ValueError(f"net is {weight.dtype}, and exported files compute in float32; give net.float()")
    if is_quantized(net) and format != "aoti":
        raise ValueError(
            f"format={format!r} has no integers as this network's INT8 computes with them; use format='aoti', or "
            "export the float32 network and quantise the files"
        )
    if format == "onnx" and (absent := missing(ONNX_NEEDS)):
        raise ValueError(f"format='onnx' needs what eefast[onnx] installs: {absent}")


def _loaded(net: str | Path) -> EarlyExitNet:
    from ..checkpoint.loading import load

    return load(net)


def _check_folder(folder: Path) -> None:
    from .manifest import written

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if folder.exists() and {path.name for path in folder.iterdir()} - written(folder):
        raise ValueError(f"{folder} holds other files; name a new folder, or one that eefast.export wrote")


def write(net: EarlyExitNet, folder: Path, format: str) -> None:
    from . import manifest
    from .onnx_files import write_models
    from .resident_package import write_package
    from .stage_programs import write_programs

    described = manifest.describe(net, format)
    if format == "aoti":
        names = write_package(net, folder, manifest.as_texts(described))
    else:
        names = (write_programs if format == "stages" else write_models)(net, folder)
    manifest.write(folder, described, names)


def _compare(net: EarlyExitNet, folder: Path, format: str) -> None:
    """`RuntimeError` where the files give other answers than the network, at any exit, for 3 images or for 1."""
    from .exported import load_exported

    _compare_all(net, load_exported(folder), (3, 1))
    if format == "onnx":
        _compare_all(net, load_exported(folder, single=True), (1,))


def _compare_all(net: EarlyExitNet, exported: Exported, batches: tuple[int, ...]) -> None:
    from ..planning import probe
    from ..planning.integer_lowering import is_quantized
    from ..planning.trial import IN_INT8, difference, tolerance

    allowed = IN_INT8 if is_quantized(net) else tolerance(torch.float32, net.cost.device)
    for n in batches:
        images = probe.noise(n, net.input_shape)
        for i in range(net.num_exits + 1):
            exported.thresholds = limits = probe.thresholds(net, i)
            found, wanted = exported(images), net.first_exits(images, limits, net.criterion)
            if found.exit_index.tolist() != wanted.exit_index.tolist():
                raise RuntimeError(f"the exported files take exits {found.exit_index.tolist()} instead of exit {i}")
            if different := difference(found.logits, wanted.logits, allowed):
                raise RuntimeError(f"the exported files' {different} at exit {i}; please report this network")
