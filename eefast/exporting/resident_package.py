"""A network → one package of the resident engine's op, compiled by torch's AOTInductor, beside the library of ops."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..engines.resident import ResidentEngine
from ..model import EarlyExitNet
from ..planning import Options, build, probe
from ..planning.trial import brief

PACKAGE, LIBRARY = "network.pt2", "libeefast.so"


class ResidentNetwork(nn.Module):
    """Images [N, C, H, W] float32 and thresholds [n] → logits [N, K], confidence [N], exit index [N] int64."""

    def __init__(self, engine: ResidentEngine) -> None:
        super().__init__()
        self.program, net = engine.program, engine.net
        self.rows, self.num_classes, self.criterion = net.rows_as_maps, net.num_classes, net.criterion.name
        for name in ("steps", "maps", "groups", "packed"):
            self.register_buffer(name, getattr(self.program, name))
        # Only the references in Python read these.
        self.register_buffer("weights", self.program.weights[:0])
        rule = net.current_rule()
        self.register_buffer("rule", rule if isinstance(rule, Tensor) else None)
        self.register_buffer("image", self.program.image)

    def forward(self, images: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = images.unsqueeze(2) if self.rows else images
        tables = images, self.steps, self.maps, self.groups, self.weights, self.packed, thresholds
        more: Any = ("carried" if self.rule is not None else self.criterion), self.num_classes
        run: Any = ops.resident_forward.run if self.image is None else ops.resident_int8.run
        of_dtype = (*more, self.program.bfloat16) if self.image is None else (self.image, *more)
        answers: tuple[Tensor, Tensor, Tensor] = run(*tables, *of_dtype, rule=self.rule)
        return answers


@torch.no_grad()
def traced(net: EarlyExitNet) -> torch.export.ExportedProgram:
    """The program of `ResidentNetwork`; `ValueError` where the resident engine cannot run the network."""
    engine = build(net, Options(engine="resident"))
    assert isinstance(engine, ResidentEngine)
    given = probe.noise(2, net.input_shape), torch.zeros(net.num_exits)
    return torch.export.export(ResidentNetwork(engine).eval(), given, dynamic_shapes=({0: torch.export.Dim("n")}, None))


def write_package(net: EarlyExitNet, folder: Path, metadata: Mapping[str, str]) -> list[str]:
    """The names of the two files. metadata: texts in the package, which programs in C++ read.

    Raises `ValueError` as `traced`, `RuntimeError` where the package cannot be compiled.
    """
    from torch._inductor import aoti_compile_and_package

    program = traced(net)
    # What is compiled here only calls the op, which chooses among its instruction sets itself.
    wrapper = {"cpp.march": "x86-64", "cpp.simdlen": 1} if platform.machine() in ("x86_64", "AMD64") else {}
    settings = {**wrapper, "aot_inductor.metadata": dict(metadata)}
    try:
        aoti_compile_and_package(program, package_path=str(folder / PACKAGE), inductor_configs=settings)
    except Exception as error:  # of the compiler
        raise RuntimeError(
            f"AOTInductor cannot compile the package: {brief(error)}; it needs a C++ compiler, named by CXX"
        ) from error
    shutil.copyfile(library(), folder / LIBRARY)
    return [PACKAGE, LIBRARY]


def library() -> Path:
    """The C++ library of this package; `ValueError` where it is missing."""
    found = sorted(Path(ops.__file__).parents[1].glob("_C*.so"))
    if not found:
        raise ValueError(f"format='aoti' needs the C++ kernels, which are {ops.CPP_MISSING}")
    return found[0]
