"""Try a network's unchanged stages and heads on a few images: what engines must answer, or why they cannot."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..engines.program import Plan, StagePlan
from ..model import EarlyExitNet
from ..qdq import QdqStage
from ..result import ExitOutput
from ..system.progress import Progress
from .errors import UnsupportedError
from .head_packing import head_obstacle
from .inference_copies import inference_copy, is_computing_hook

IMAGES = 2

TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 0.25}
"""By dtype, the largest difference from the network's answers ÷ largest of these that planning allows.

Folding and another order of additions change the last digits; a wrong formula changes the first ones.
"""

IN_INT8 = 0.25
"""The same for stages in simulated INT8, where the last digit of a sum decides between two integers."""

TF32 = 0.02
"""The same for float32 on CUDA, where convolutions round to TensorFloat-32."""


def tolerance(dtype: torch.dtype, device: torch.device, module: Any = None) -> float:
    """The difference ÷ largest number that planning allows; module: whose answers are compared."""
    if isinstance(module, QdqStage):
        return IN_INT8
    return TF32 if dtype == torch.float32 and device.type == "cuda" else TOLERANCES.get(dtype, 0.25)


@dataclass(frozen=True)
class Expected:
    """What a stage and the head after it compute.

    seen, features: [IMAGES, C, H, W] before and after the stage. rows: [IMAGES, K + 1] logits and confidence row.
    """

    seen: Tensor
    features: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Subject:
    """A network for which an engine is built, what that must answer, and on what it is to run.

    dtype: of the stages. example_inputs: prepared images to measure on, or None. max_batch_size: images for which CUDA
    graphs are captured. stages: what runs them, see `stage_runtimes.STAGES`. progress: told of each stage.
    rival: seconds of an image to each exit by an engine that is ready, () where none is; see `SlowerError`.
    """

    net: EarlyExitNet
    device: torch.device
    dtype: torch.dtype
    expected: tuple[Expected, ...]
    example_inputs: Tensor | None = None
    max_batch_size: int = 256
    stages: str = "auto"
    progress: Progress = lambda what, done, total: None
    rival: tuple[float, ...] = ()

    def plan(self, engine: str, stages: Sequence[StagePlan], *reasons: str) -> Plan:
        return Plan(engine, self.device, self.dtype, self.net.criterion.name, reasons, tuple(stages))


def shares(net: EarlyExitNet) -> Sequence[float]:
    """Each stage's part of all stages' MACs."""
    total = max(sum(c.stage_macs for c in net.stage_costs), 1)  # stages may be all identities
    return [c.stage_macs / total for c in net.stage_costs]


def expected(net: EarlyExitNet, images: Tensor) -> tuple[Expected, ...]:
    """Every stage and head on prepared images [N, C, H, W], in float32 or, if the network is, in float64.

    Raises `UnsupportedError` where an engine would answer something else than the network: heads that are not as
    `ExitHead` makes them, hooks, parts in training mode, answers that depend on other images or change from call to
    call, exceptions. It names the exit and the module.
    """
    parts = list(zip(net.stages, net.heads, strict=True))
    for i, (stage, head) in enumerate(parts):
        obstacle = _unlike(stage, f"stage {i}") or _unlike(head, f"the head of exit {i}") or head_obstacle(head, i)
        if obstacle:
            raise UnsupportedError(obstacle)
    weight = next(net.parameters())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    seen, found = images[:IMAGES].to(weight.device, dtype), list[Expected]()
    for i, (stage, head) in enumerate(parts):
        features = _tried(stage, seen, f"stage {i}")
        if features.dim() != 4:
            raise UnsupportedError(f"stage {i} returns shape {list(features.shape)}, not maps [N, C, H, W]")
        rows = _tried(head, features, f"the head of exit {i}")
        found.append(Expected(seen, features, rows))
        seen = features
    return tuple(found)


def _unlike(module: nn.Module, where: str) -> str:
    """What an engine would not do as the module does."""
    for name, part in module.named_modules():
        what = f"{where} has {type(part).__name__} {name!r}" if name else f"{where}, {type(part).__name__},"
        before = [hook for hook in part._forward_pre_hooks.values() if not is_computing_hook(hook)]
        if part._forward_hooks or before:
            return f"{what} with a forward hook, which only the reference engine calls"
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            return f"{what} without running statistics, so that its answers depend on the whole batch"
    return ""


def _tried(module: nn.Module, x: Tensor, where: str) -> Tensor:
    """What the module answers in eval mode, which must be the same twice and for an image alone."""
    copied = inference_copy(module).to(x.dtype)

    def answer(part: Tensor) -> Tensor:
        return _as_rows(run(copied, part, where))

    first = answer(x)
    if not isinstance(first, Tensor) or first.shape[:1] != x.shape[:1]:
        what = f"shape {list(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise UnsupportedError(f"{where} returns {what}, not a tensor with a row for each image")
    allowed = tolerance(x.dtype, x.device, module)
    if difference(answer(x[-1:]), first[-1:], allowed):
        again = difference(answer(x), first, allowed)
        why = "when it is called again" if again else "for an image alone, so it depends on the whole batch"
        raise UnsupportedError(f"{where} answers differently {why}")
    return first


def writes_to_images(net: EarlyExitNet, images: Tensor) -> bool:
    """Whether the first stage writes over images [N, C, H, W] in any layout; also where it raises an exception."""
    x = images[:IMAGES].to(next(net.parameters()))
    layouts = [torch.contiguous_format, *[torch.channels_last] * (x.dim() == 4)]
    try:
        with torch.no_grad():
            stage = inference_copy(net.stages[0])
            for own in [x.clone(memory_format=layout) for layout in layouts]:
                version = own._version
                stage(own)
                if own._version != version:
                    return True
    except Exception:  # a stage raises whatever it does
        return True
    return False


def _as_rows(out: Any) -> Any:
    if not isinstance(out, ExitOutput):
        return out
    return torch.cat([out.logits, out.confidence_logit[:, None].to(out.logits)], 1)


def check_modes(net: EarlyExitNet, images: Tensor) -> None:
    """`ValueError` where a network in eval mode has parts in training mode that answer differently there.

    That happens where a module is exchanged after `net.eval()`, and no engine's answers would be those of `net.eval()`.
    """
    parts = [*zip(net.stages, net.heads, strict=True)]
    if net.training or not any(m.training for pair in parts for part in pair for m in part.modules()):
        return
    weight = next(net.parameters())
    x = images[:IMAGES].to(weight)
    for i, pair in enumerate(parts):
        for part, where in zip(pair, (f"stage {i}", f"the head of exit {i}"), strict=True):
            try:
                wanted, found = (run(inference_copy(part, mode), x, where) for mode in (True, False))
            except UnsupportedError:  # which `expected` reports
                return
            rows = _as_rows(wanted)
            if not isinstance(rows, Tensor):
                return
            if difference(_as_rows(found), rows, tolerance(x.dtype, x.device)):
                names = ", ".join(sorted({type(m).__name__ for m in part.modules() if m.training}))
                raise ValueError(
                    f"{where} has parts in training mode that change its answers ({names}); call net.eval()"
                )
            x = wanted if part is pair[0] else x


def run(module: nn.Module | Callable[[Tensor], Any], x: Tensor, where: str) -> Any:
    """`module` on a copy of x; `UnsupportedError` names the submodule that raised an exception."""
    # torch.fx prints what goes wrong in a call, but not in `forward`.
    call = module.forward if isinstance(module, fx.GraphModule) else module
    try:
        with torch.no_grad():
            return call(x.clone())
    except Exception as error:  # a stage raises whatever it does
        raise UnsupportedError(f"{where}{_place(module, error)}: {brief(error)}") from error


def _place(module: object, error: Exception) -> str:
    """The path of the innermost submodule in which an error came up, as " in 'layer1.conv'"."""
    names = {id(m): name for name, m in module.named_modules()} if isinstance(module, nn.Module) else {}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    paths = [names.get(id(frame.f_locals.get("self")), "") for frame in frames]
    return next((f" in {path!r}" for path in reversed(paths) if path), "")


def brief(error: Exception) -> str:
    """One line about an exception."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def difference(got: Tensor, wanted: Tensor, allowed: float) -> str:
    """Why `got` is not `wanted` up to `allowed` × its largest number; "" if it is. NaN and infinities must agree."""
    if not isinstance(got, Tensor) or got.shape != wanted.shape:
        what = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        return f"shape {what} instead of {list(wanted.shape)}"
    got, wanted = got.double(), wanted.double()
    if wanted.numel():  # all finite and alike is found quickly
        error, limit = float((got - wanted).abs().max()), allowed * float(wanted.abs().max())
        if error <= limit < float("inf"):
            return ""
    finite = wanted[wanted.isfinite()].abs()
    largest = max(float(finite.max()) if len(finite) else 0.0, 1e-6)
    if torch.isclose(got, wanted, rtol=0, atol=allowed * largest, equal_nan=True).all():
        return ""
    return f"answers differ by {float((got - wanted).abs().max()) / largest:.2g} of the largest"


def mismatch(
    candidate: Callable[[Tensor], Tensor], x: Tensor, wanted: Tensor, dtype: torch.dtype, module: Any = None
) -> str:
    """Why an inference copy of a module in `dtype`, called with channels-last features, does not give the wanted
    answers; or "".
    """
    allowed = tolerance(dtype, x.device, module)
    x = x.to(dtype, copy=True, memory_format=torch.channels_last)
    try:
        return difference(run(candidate, x, "its copy"), wanted, allowed)
    except UnsupportedError as error:
        return f"on channels-last maps in {str(dtype).removeprefix('torch.')} {error}"
