"""Random calls of the exit ops and their answers in float64, computed by code that shares nothing with the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from where import GPU

CRITERIA = ("learned", "max_probability", "entropy", "margin")
BELOW = ("entropy",)
"""Criteria by which a sample exits below the threshold."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "cropped", "cropped channels_last", "every second", "transposed", "expanded")
SENTINEL = -7.0
# Units in the last place. On tensor cores a float32 product is three of 11 bits each, and sums round towards zero.
UNITS = 4 if GPU else 2


def dtypes_and_shapes(
    shapes: dict[str, tuple[Any, ...]], each_dtype: tuple[str, ...], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> pytest.MarkDecorator:
    """Parameters `dtype` and `shape`: all shapes in float16, those named `each_dtype` in every dtype; the rest is slow.

    Shapes choose blocks and loops, dtypes how elements are loaded: one does not depend on the other. The names of
    float16 cases say that they go through compute-sanitizer, see bench/gpu.sh.
    """
    found = []
    for dtype, (name, shape) in itertools.product(dtypes, shapes.items()):
        half = dtype == torch.float16
        marks = [] if half or name in each_dtype else pytest.mark.slow
        found.append(pytest.param(dtype, shape, marks=marks, id=f"{'sanitize-' * half}{dtype}-{name}"))
    return pytest.mark.parametrize(("dtype", "shape"), found)


@dataclass(frozen=True)
class Case:
    """The arguments of one call, but for the results."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    threshold: Tensor | None
    rows: Tensor
    positions: Tensor
    live: Tensor
    criterion: str
    results: int

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Results full of sentinels, as views into larger buffers that must stay untouched as well."""
        n, k = self.results, len(self.bias) - 1
        return (
            torch.full((2 * n + 1, k + 3), SENTINEL)[1::2][:n, 1 : k + 1],
            torch.full((2 * n + 1,), SENTINEL)[1::2][:n],
            torch.full((2 * n + 1,), int(SENTINEL))[1::2][:n],
        )

    def arguments(self, exit_index: int = 3) -> tuple[Any, ...]:
        return (
            self.features, self.weight, self.bias, self.threshold, self.rows, self.positions, self.live,
            self.criterion, exit_index, *self.outputs(),
        )  # fmt: skip


def layout(values: Tensor, name: str) -> Tensor:
    """The same values in another memory layout; the surroundings of a crop are NaN, so that reading them shows."""
    m, c, h, w = values.shape
    if name == "contiguous":
        return values.contiguous()
    if name == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if name == "transposed":
        return values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if name == "expanded":
        return values[:, :, :1].expand(m, c, h, w)
    step = 2 if name == "every second" else 1
    buffer = values.new_full((m + 1, c * step + 2, h * step + 1, w * step + 3), math.nan)
    if "channels_last" in name:
        buffer = buffer.contiguous(memory_format=torch.channels_last)
    crop = buffer[1:, 1 : c * step + 1 : step, : h * step : step, 2 : w * step + 2 : step]
    crop.copy_(values)
    return crop


def make_case(
    r: int, k: int, c: int, h: int, w: int, *, dtype: torch.dtype = torch.float32, memory: str = "contiguous",
    criterion: str = "learned", live: str = "all", final: bool = False, seed: int = 0,
) -> Case:  # fmt: skip
    """Live lists with gaps, in any order; garbage beyond `live`; a threshold in the widest gap of the confidences."""
    g = torch.Generator().manual_seed(seed)
    m, n = r + 3, r + 5
    features = layout(torch.randn(m, c, h, w, generator=g).to(dtype), memory)
    rows = torch.randperm(m, generator=g)[:r].int()
    positions = torch.randperm(n, generator=g)[:r].int()
    count = {"all": r, "part": r * 2 // 3, "none": 0}[live]
    rows[count:], positions[count:] = 2**31 - 1, -(2**31)
    weight, bias = torch.randn(k + 1, c, generator=g) * 2 / c**0.5, torch.randn(k + 1, generator=g)
    case = Case(features, weight, bias, None, rows, positions, torch.tensor([count]).int(), criterion, n)
    return case if final else replace(case, threshold=torch.tensor(gap(case)))


def with_each(case: Case, stride: int = 1) -> Case:
    """A threshold for each place in the results: in the widest gap, where none or every number exits, or NaN."""
    g = torch.Generator().manual_seed(case.results)
    kinds = torch.tensor([gap(case), -math.inf, math.inf, math.nan])
    values = kinds[torch.randint(4, (case.results,), generator=g)]
    if stride == 0:
        return replace(case, threshold=kinds[3].expand(case.results))
    return replace(case, threshold=values.repeat_interleave(stride)[::stride])


@dataclass(frozen=True)
class Exact:
    """One call's answers in float64 for the live entries, and what a rounding error of float32 is in each."""

    logits: np.ndarray
    confidence: np.ndarray
    logits_unit: np.ndarray
    confidence_unit: np.ndarray


def expected(case: Case) -> Exact:
    """Units: 2^-23 of the sum of the magnitudes that are added up for a logit."""
    weight, bias = case.weight.double().numpy(), case.bias.double().numpy()
    features = case.features.contiguous()
    pooled = np.empty((2, int(case.live), weight.shape[1]))
    with np.errstate(all="ignore"):
        for i, row in enumerate(case.rows[: int(case.live)].tolist()):
            pixels = features[row].double().numpy().reshape(weight.shape[1], -1)
            pooled[:, i] = np.stack([pixels, np.abs(pixels)]).sum(axis=2) / pixels.shape[1]
        out = pooled[0] @ weight.T + bias
        unit = np.nan_to_num((pooled[1] @ np.abs(weight.T) + np.abs(bias)) * 2**-23, posinf=0)
        confidence = np.array([expected_confidence(row, case.criterion) for row in out])
    # No criterion but the entropy changes faster than the logits do; that one at most log K + 1 times as fast.
    slope = math.log(len(bias)) + 1 if case.criterion == "entropy" else 1
    return Exact(out[:, :-1], confidence, unit[:, :-1], unit.max(axis=1, initial=0) * slope + 2**-23)


def expected_confidence(out: np.ndarray, criterion: str) -> float:
    logits, confidence_logit = out[:-1], out[-1]
    if criterion == "learned":
        return 1 / (1 + np.exp(-confidence_logit))
    if np.isnan(logits).any() or np.isinf(logits.max()):
        return math.nan
    probs = np.sort(np.exp(logits - logits.max()))[::-1]
    probs = probs / probs.sum()
    if criterion == "max_probability":
        return probs[0]
    if criterion == "margin":
        return probs[0] - (probs[1] if len(probs) > 1 else 0)
    assert criterion == "entropy", f"expected_confidence has no formula for {criterion!r}"
    probs = probs[probs > 0]
    return -(probs * np.log(probs)).sum()


def eager(case: Case) -> tuple[Tensor, Tensor]:
    """What a user would write, in float32: the yardstick of the rounding error."""
    pooled = case.features[case.rows[: int(case.live)].long()].float().mean((2, 3))
    out = torch.nn.functional.linear(pooled, case.weight, case.bias)
    logits, probs = out[:, :-1], torch.softmax(out[:, :-1], 1)
    if case.criterion == "learned":
        return logits, torch.sigmoid(out[:, -1])
    if case.criterion == "entropy":
        return logits, torch.special.entr(probs).sum(1)
    best = probs.sort(1, descending=True).values
    return logits, best[:, 0] - (best[:, 1] if case.criterion == "margin" and best.shape[1] > 1 else 0)


def gap(case: Case) -> float:
    """A threshold that is as far as possible from every confidence, so that rounding cannot change a decision."""
    values = np.sort(expected(case).confidence)
    if len(values) < 2:
        return 0.3
    middle = slice(len(values) // 4, max(len(values) * 3 // 4, len(values) // 4 + 1))
    widest = int(np.argmax(np.diff(values)[middle])) + middle.start
    return float(values[widest] + values[widest + 1]) / 2


def leaves(case: Case, confidence: np.ndarray) -> np.ndarray:
    if case.threshold is None:
        return np.ones(len(confidence), dtype=bool)
    threshold = case.threshold.double().numpy()
    if case.threshold.dim():
        threshold = threshold[case.positions[: int(case.live)]]
        with np.errstate(invalid="ignore"):
            beyond = confidence < threshold if case.criterion in BELOW else confidence > threshold
        return beyond | np.isnan(threshold)
    return confidence < threshold if case.criterion in BELOW else confidence > threshold


def assert_close(actual: np.ndarray, plain: np.ndarray, exact: np.ndarray, unit: np.ndarray) -> None:
    """At most twice the error of eager PyTorch, or some units where that is exact by luck; NaN and infinities equal."""
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(actual[~finite], exact[~finite])
    error = np.abs(plain - exact)[finite].max(initial=0)
    worst = (np.abs(actual - exact)[finite] - np.maximum(2 * error, UNITS * unit[finite])).max(initial=0)
    assert worst <= 0, f"{worst} beyond twice the error of eager PyTorch, {error}"


def check(
    run: Any, case: Case, exit_index: int = 3, plain: Callable[[Case], tuple[Tensor, Tensor]] = eager
) -> tuple[Tensor, Tensor, Tensor]:
    """Run and compare everything: returned lists, written results, and all that must not be written.

    plain: logits and confidence as a user would compute them, the yardstick of the rounding error.
    """
    arguments = case.arguments(exit_index)
    next_rows, next_positions, next_live = run(*arguments)
    logits, confidence, exits = arguments[-3:]
    exact = expected(case)
    plain_logits, plain_confidence = (x.double().numpy() for x in plain(case))
    left = leaves(case, exact.confidence)

    live, size = int(case.live), len(case.rows)
    order = [i for i in range(live) if not left[i]]
    order += [i for i in reversed(range(size)) if i >= live or left[i]]
    assert next_rows.dtype == next_positions.dtype == next_live.dtype == torch.int32
    assert next_rows.tolist() == case.rows[order].tolist()
    assert next_positions.tolist() == case.positions[order].tolist()
    assert next_live.tolist() == [live - int(left.sum())]

    written = case.positions[:live].numpy()[left]
    untouched = np.setdiff1d(np.arange(case.results), written)
    assert (exits.numpy()[written] == exit_index).all()
    with np.errstate(invalid="ignore"):
        assert_close(logits.numpy()[written], plain_logits[left], exact.logits[left], exact.logits_unit[left])
        value = confidence.numpy()[written]
        assert_close(value, plain_confidence[left], exact.confidence[left], exact.confidence_unit[left])
    for result in (logits, confidence, exits):
        assert (result.numpy()[untouched] == SENTINEL).all()
        buffer = result._base.clone()
        view = buffer.as_strided(result.shape, result.stride(), result.storage_offset())
        view.fill_(int(SENTINEL))
        assert (buffer == SENTINEL).all()
    return logits, confidence, exits


def assert_same_bits(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """The same, bit by bit; in Triton's interpreter, whose products NumPy computes, up to its order of additions.

    On some processors NumPy adds up a row in another order when it is elsewhere in a matrix.
    """
    if GPU or not a.is_floating_point():
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def cuda_arguments(arguments: tuple[Any, ...]) -> list[Any]:
    return [x.cuda() if isinstance(x, Tensor) else x for x in arguments]


def launched(call: Callable[[], Any]) -> list[str]:
    """The kernels that a call runs on the GPU."""
    # Else filling fresh memory with NaN would count.
    torch.use_deterministic_algorithms(False)
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    return [name for name in names if "Mem" not in name and "Buffer" not in name]


def without_waiting(call: Callable[[], Any]) -> None:
    """Fails where the host waits for the GPU."""
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(run: Any) -> Any:
    """`run` with every tensor of the call moved to the GPU, layout and surroundings too, and the results moved back.

    The results are the only int64 among the tensors, the exits, and the two before them.
    """

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        base = x if x._base is None else x._base
        return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())

    def run_there(*arguments: Any) -> tuple[Tensor, ...]:
        there = [moved(x) for x in arguments]
        lists = run(*there)
        end = next(i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.dtype == torch.int64) + 1
        for here, result in zip(arguments[end - 3 : end], there[end - 3 : end], strict=True):
            (here if here._base is None else here._base).copy_(result if result._base is None else result._base)
        return tuple(x.cpu() for x in lists)

    return run_there
