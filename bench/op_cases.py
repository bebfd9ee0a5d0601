"""What the ops are measured on: shapes, random inputs, the answers in float64, and what a user would write instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eefast import criteria, ops

EXIT = 1
SENTINEL = -7
INDEXED = {"indexed_conv": 3, "indexed_conv_1x1": 1}
"""Kernel size by name: stride 1, as many channels out as in, residual and ReLU, features and residual through rows."""

RULES = {
    "carried": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5),
    "fitted": (0.5, 1.5, 0.3, 0.7, 0.2, -2.0, 0.0, 0.0, 0.0),
}
"""The nine numbers of an exit by the name of the rule that carries: all that the fits of this package may use."""


@dataclass(frozen=True)
class OpCase:
    """One op at one shape.

    samples, channels, side: of the features [N, C, side, side]; all samples are live.
    exit_rate: share that exits; for "compact" and the convolutions, share that is not read.
    compiled: also measure torch.compile here, which takes seconds per shape.
    """

    op: str
    samples: int
    channels: int = 64
    side: int = 8
    classes: int = 10
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    criterion: str = "learned"
    exit_rate: float = 0.5
    compiled: bool = False

    def __str__(self) -> str:
        shape = f"{self.samples}x{self.channels}x{self.side}x{self.side}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{shape}-{self.classes}-{dtype}-{self.layout}-{self.criterion}-{self.exit_rate}"

    @property
    def map_bytes(self) -> int:
        """Of all features."""
        return self.samples * self.channels * self.side**2 * self.dtype.itemsize

    @property
    def leaving(self) -> int:
        return round(self.samples * self.exit_rate)

    @property
    def bytes(self) -> int:
        """Everything that must be read or written at least once."""
        if self.op == "compact":
            survivors = self.samples - self.leaving
            return survivors * (2 * self.map_bytes // self.samples + 4)
        if self.op in INDEXED:
            survivors = self.samples - self.leaving
            return survivors * (3 * self.map_bytes // self.samples + 4) + self._conv_bytes
        lists, results = 16 * self.samples, self.leaving * (4 * self.classes + 12)
        if self.criterion in RULES:  # rows of survivors are written, and with a weight for them read, too
            reads = 4 * self.classes * (RULES[self.criterion][-1] != 0)
            results = self.samples * (4 * self.classes + 4 + reads) + self.leaving * 8
        weights = 4 * (self.classes + 1) * (self.channels + 1)
        if self.op == "exit_conv_head":
            weights += self._conv_bytes
        return self.map_bytes + lists + results + weights

    @property
    def _conv_bytes(self) -> int:
        return self.channels * (self.kernel**2 * self.channels * self.dtype.itemsize + 4)

    @property
    def kernel(self) -> int:
        """Size of the convolution, where there is one."""
        return INDEXED.get(self.op, 3)

    @property
    def flops(self) -> int:
        """Of the convolution, the pooling and the linear layer."""
        if self.op == "compact":
            return 0
        conv = 2 * self.kernel**2 * self.channels**2 * self.side**2
        if self.op in INDEXED:
            return (self.samples - self.leaving) * conv
        a_sample = self.channels * self.side**2 + 2 * (self.classes + 1) * self.channels
        if self.op == "exit_conv_head":
            a_sample += conv
        return self.samples * a_sample

    @property
    def memory(self) -> int:
        """About what the features, their copies by any provider and the float64 computation occupy."""
        return self.map_bytes * {"exit_head": 1, "compact": 3, "exit_conv_head": 3}.get(self.op, 6) + 2**30


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case. Weights are float32.

    converted: bias of the convolution, weight and bias of the linear layer in the features' dtype, as in a network that
        was converted to it.
    rule: [9] float32 or None.
    """

    case: OpCase
    features: Tensor
    residual: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    weight: Tensor
    bias: Tensor
    converted: tuple[Tensor, Tensor, Tensor]
    threshold: Tensor
    rule: Tensor | None
    positions: Tensor
    long_positions: Tensor
    live: Tensor
    survives: Tensor
    logits: Tensor
    confidence: Tensor
    exits: Tensor
    exact_logits: Tensor
    exact_confidence: Tensor


def make_inputs(case: OpCase, device: str) -> Inputs:
    """Features that differ between samples and channels, a threshold in a gap between two exact confidences."""
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=generator, device=device)
    n, c, k = case.samples, case.channels, case.classes
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    features = torch.empty(n, c, case.side, case.side, dtype=case.dtype, device=device, memory_format=memory_format)
    features.normal_(generator=generator).add_(randn(n, c, 1, 1).to(case.dtype))
    conv_weight = randn(c, c, case.kernel, case.kernel).mul_((2 / (case.kernel**2 * c)) ** 0.5)
    conv_weight = conv_weight.to(case.dtype, memory_format=torch.channels_last)
    conv_bias, weight, bias = randn(c).mul_(0.1), randn(k + 1, c).mul_(2 / c**0.5), randn(k + 1)
    exact = _exact_logits(case, features, conv_weight, conv_bias, weight, bias)
    if case.criterion in RULES:  # the answer before is what `check` fills the results with
        exact[:, :-1] += RULES[case.criterion][-1] * SENTINEL
    confidence = EXACT_CONFIDENCE[case.criterion](exact)
    leaves_above = criteria.get(case.criterion).comparison == ">"
    order = confidence.sort(descending=leaves_above).values
    outside = 1.0 if leaves_above else -1.0
    edges = torch.cat([order[:1] + outside, order, order[-1:] - outside])
    positions = torch.arange(n, dtype=torch.int32, device=device)
    return Inputs(
        case, features, features.flip(0) if case.op in INDEXED else features, conv_weight, conv_bias, weight, bias,
        converted=(conv_bias.to(case.dtype), weight.to(case.dtype), bias.to(case.dtype)),
        threshold=edges[case.leaving : case.leaving + 2].mean().float(),
        rule=torch.tensor(RULES[case.criterion], device=device) if case.criterion in RULES else None,
        positions=positions, long_positions=positions.long(),
        live=torch.tensor([n], dtype=torch.int32, device=device),
        survives=torch.rand(n, generator=generator, device=device).argsort() >= case.leaving,
        logits=torch.empty(n, k, device=device), confidence=torch.empty(n, device=device),
        exits=torch.empty(n, dtype=torch.int64, device=device),
        exact_logits=exact[:, :-1], exact_confidence=confidence,
    )  # fmt: skip


def _exact_logits(
    case: OpCase, features: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Class rows and confidence row [N, K + 1] in float64, in parts that fit beside the features."""
    pooled = []
    for part in features.split(max(1, 2**24 // (case.channels * case.side**2))):
        maps = part.double().flatten(2)
        if case.op == "exit_conv_head":
            maps = _exact_conv(part, conv_weight, conv_bias).relu_()
        pooled.append(maps.mean(2))
    return torch.cat(pooled) @ weight.double().T + bias.double()


def _exact_conv(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[N, C, H·W] in float64, tap by tap, since PyTorch's float64 convolutions are slow on GPUs."""
    size, (height, width) = weight.shape[-1], maps.shape[2:]
    padded, filters = F.pad(maps.double(), [size // 2] * 4), weight.double()
    taps = ((y, x) for y in range(size) for x in range(size))
    sums = sum(filters[:, :, y, x] @ padded[:, :, y : y + height, x : x + width].flatten(2) for y, x in taps)
    return sums + bias.double()[:, None]


def _two_best(out: Tensor) -> Tensor:
    return out[:, :-1].softmax(1).topk(2).values


def _fitted(out: Tensor) -> Tensor:
    numbers = [EXACT_CONFIDENCE[name](out) for name in ("learned", "max_probability", "entropy", "margin")]
    numbers[2] = -numbers[2]
    numbers.append(F.softplus(out[:, -1]))
    *weights, bias, _, _, _ = RULES["fitted"]
    return sum((w * x for w, x in zip(weights, numbers, strict=True)), torch.full_like(out[:, -1], bias))


EXACT_CONFIDENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "learned": lambda out: out[:, -1].sigmoid(),
    "max_probability": lambda out: out[:, :-1].softmax(1).amax(1),
    "entropy": lambda out: torch.special.entr(out[:, :-1].softmax(1)).sum(1),
    "margin": lambda out: _two_best(out)[:, 0] - _two_best(out)[:, 1],
    "carried": lambda out: out[:, :-1].softmax(1).amax(1),
    "fitted": _fitted,
}


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    make: inputs → call. A call of an exit op writes the results and returns the positions of the survivors first and
        their number; one of the others returns a tensor whose first rows are the survivors' maps.
    float32: it computes in float32 whatever the dtype of the features.
    capturable: no step waits for the host, so a CUDA graph can hold it.
    """

    name: str
    make: Callable[[Inputs], Callable[[], Any]]
    float32: bool = False
    capturable: bool = True


def _ours(inputs: Inputs) -> Callable[[], Any]:
    i, case = inputs, inputs.case
    # The list as the exit op hands it on: survivors first.
    rows = torch.cat([i.positions[i.survives], i.positions[~i.survives]])
    live = i.survives.sum(dtype=torch.int32).view(1)
    if case.op in INDEXED:
        return lambda: ops.indexed_conv.run(
            i.features, i.conv_weight, i.conv_bias, i.residual, rows, True, live, stride=1, relu=True
        )
    if case.op == "compact":
        out = torch.empty_like(i.features)

        def compact() -> Tensor:
            ops.gather_survivors.run(i.features, rows, live, out)
            return out

        return compact
    criterion = "carried" if case.criterion in RULES else case.criterion
    outputs = (i.positions, i.positions, i.live, criterion, EXIT, i.logits, i.confidence, i.exits, i.rule)
    if case.op == "exit_conv_head":
        arguments = (i.features, i.conv_weight, i.conv_bias, i.weight, i.bias, i.threshold, *outputs)
        return lambda: ops.exit_conv_head.run(*arguments)[1:]
    return lambda: ops.exit_head.run(i.features, i.weight, i.bias, i.threshold, *outputs)[1:]


def _answers(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """What every rival begins with: logits, confidence and the samples that exit, in the features' dtype."""
    conv_bias, weight, bias = i.converted
    maps = i.features
    if i.case.op == "exit_conv_head":
        maps = F.relu(F.conv2d(maps, i.conv_weight, conv_bias, padding=1))
    out = F.linear(maps.mean((2, 3)), weight, bias)
    criterion, logits = criteria.get(i.case.criterion), out[:, :-1]
    if i.rule is None:
        confidence = criterion.confidence(logits, out[:, -1])
    else:
        logits, confidence = criteria.carry(logits, out[:, -1], i.rule, i.logits, i.confidence)
        i.logits[i.long_positions], i.confidence[i.long_positions] = logits, confidence
    return logits, confidence, criterion.leaves(confidence, i.threshold)


def _eager(i: Inputs) -> tuple[Tensor, int]:
    logits, confidence, leaves = _answers(i)
    left = i.long_positions[leaves]
    i.logits[left], i.confidence[left], i.exits[left] = logits[leaves].float(), confidence[leaves], EXIT
    survivors = leaves.logical_not().nonzero()[:, 0]
    return i.long_positions[survivors], len(survivors)


def _fixed_shapes(i: Inputs) -> tuple[Tensor, Tensor]:
    """The same without a shape that depends on data."""
    logits, confidence, leaves = _answers(i)
    at = i.long_positions
    i.logits[at] = logits.float().where(leaves[:, None], i.logits[at])
    i.confidence[at] = confidence.where(leaves, i.confidence[at])
    i.exits[at] = i.exits[at].masked_fill(leaves, EXIT)
    survives = leaves.logical_not()
    survivors = torch.nonzero_static(survives, size=i.case.samples, fill_value=0)[:, 0]
    return at[survivors], survives.sum()


def _compiled(i: Inputs) -> Callable[[], Any]:
    torch._dynamo.reset()
    return torch.compile(lambda: _fixed_shapes(i), dynamic=False)


def _index_select(features: Tensor, rows: Tensor) -> Tensor:
    """Rows of features [N, C, H, W], in the layout of these."""
    if features.is_contiguous():
        return features.index_select(0, rows)
    return features.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def _nonzero_static(i: Inputs) -> Tensor:
    """Without a wait the number of survivors is unknown, so as many rows as there are samples get copied."""
    rows = torch.nonzero_static(i.survives, size=i.case.samples, fill_value=0)[:, 0]
    return _index_select(i.features, rows)


def _known_count(i: Inputs) -> Callable[[], Tensor]:
    rows = i.survives.nonzero()[:, 0]
    return lambda: _index_select(i.features, rows)


def _eager_conv(i: Inputs) -> Tensor:
    sums = F.conv2d(i.features[i.survives], i.conv_weight, i.converted[0], padding=i.case.kernel // 2)
    return F.relu(sums + i.residual[i.survives])


def _cudnn_conv(i: Inputs) -> Callable[[], Tensor]:
    """As fused as cuDNN has it, on gathered rows; the host knows how many."""
    rows, padding = i.survives.nonzero()[:, 0], [i.case.kernel // 2] * 2
    return lambda: torch.cudnn_convolution_add_relu(
        _index_select(i.features, rows), i.conv_weight, _index_select(i.residual, rows), 1.0, i.converted[0],
        [1, 1], padding, [1, 1], 1,
    )  # fmt: skip


def _copy(i: Inputs) -> Callable[[], Tensor]:
    out = torch.empty_like(i.features)
    return lambda: out.copy_(i.features)


OURS = Provider("eefast", _ours, float32=True)
EAGER = Provider("eager", lambda i: lambda: _eager(i), capturable=False)
MASK = Provider("x[mask]", lambda i: lambda: i.features[i.survives], capturable=False)
COPY = Provider("plain copy", _copy)
READ = Provider("plain read", lambda i: i.features.sum, float32=True)
"""PyTorch's sum of all features: the least that a single pass over them takes."""
COMPILED = (Provider("eager, fixed shapes", lambda i: lambda: _fixed_shapes(i)), Provider("torch.compile", _compiled))
GATHERS = (
    MASK,
    Provider("nonzero_static", lambda i: lambda: _nonzero_static(i)),
    Provider("index_select, known count", _known_count),
)
CONVOLUTIONS = (
    Provider("eager", lambda i: lambda: _eager_conv(i), capturable=False),
    Provider("index_select, cuDNN, known count", _cudnn_conv),
)
BASELINES = (EAGER.name, MASK.name)
"""What a speed-up is measured against."""


def providers(case: OpCase) -> tuple[Provider, ...]:
    if case.op == "compact":
        return (OURS, *GATHERS)
    if case.op in INDEXED:
        return (OURS, *CONVOLUTIONS)
    return (OURS, EAGER, *(COMPILED if case.compiled else ()))


def check(i: Inputs, provider: Provider, call: Callable[[], Any]) -> str:
    """What is wrong with a call's answers, or nothing.

    Logits, confidence and decisions agree with float64 within a few rounding errors of what the provider computes in;
    samples closer to the threshold than that may exit or survive.
    """
    if provider is COPY:
        return "" if torch.equal(call(), i.features) else "the copy differs"
    if provider is READ:
        error, magnitude = float(call().double() - i.features.double().sum()), float(i.features.double().abs().sum())
        return "" if abs(error) <= 1e-5 * magnitude else f"the sum is off by {error:.2g}"
    if i.case.op == "compact":
        expected = i.features[i.survives]
        return "" if torch.equal(call()[: len(expected)], expected) else "rows differ from the survivors' maps"
    if i.case.op in INDEXED:
        return _check_conv(i, call())
    for result in (i.logits, i.confidence, i.exits):
        result.fill_(SENTINEL)
    survivors, live = call()
    survivors = survivors[: int(live)].long()
    tolerance = _tolerance(i, provider)
    left = i.exits == EXIT
    distance = i.exact_confidence - i.threshold.double()
    expected = distance > 0 if criteria.get(i.case.criterion).comparison == ">" else distance < 0
    certain = distance.abs() > tolerance
    problems = {
        f"{int((left != expected)[certain].sum())} wrong exits": bool((left != expected)[certain].any()),
        "survivors are not those that stay, in order": not torch.equal(survivors, (~left).nonzero()[:, 0]),
        "results of survivors were written": i.rule is None and bool((i.logits[~left] != SENTINEL).any()),
    }
    written = left if i.rule is None else torch.ones_like(left)
    for name, result, exact in (
        ("logits", i.logits, i.exact_logits),
        ("confidence", i.confidence, i.exact_confidence),
    ):
        error = float((result.double() - exact)[written].abs().max()) if bool(written.any()) else 0.0
        problems[f"{name} off by {error:.2g}, tolerated {tolerance:.2g}"] = not error <= tolerance
    return "; ".join(text for text, present in problems.items() if present)


def _check_conv(i: Inputs, out: Tensor) -> str:
    """Within 16 rounding errors of the features' dtype, in parts as in `_exact_logits`; of TF32 for float32."""
    unit = max(torch.finfo(i.case.dtype).eps, 2**-10)
    features, residual = (x[i.survives].split(max(1, 2**24 // x[0].numel())) for x in (i.features, i.residual))
    for maps, other, found in zip(features, residual, out[: i.survives.sum()].split(len(features[0])), strict=True):
        exact = (_exact_conv(maps, i.conv_weight, i.conv_bias) + other.double().flatten(2)).relu_()
        error, tolerance = float((found.double().flatten(2) - exact).abs().max()), 16 * unit * float(exact.max())
        if not error <= tolerance:
            return f"maps off by {error:.2g}, tolerated {tolerance:.2g}"
    return ""


def _tolerance(i: Inputs, provider: Provider) -> float:
    """Relative to the largest logit: 256 rounding errors of float32, 16 of what rounds to a half precision."""
    relative, case = 256 * torch.finfo(torch.float32).eps, i.case
    if not provider.float32:
        relative = max(relative, 16 * torch.finfo(case.dtype).eps)
        if case.op == "exit_conv_head" and i.features.is_cuda:
            # PyTorch's float32 convolutions round their inputs to TF32.
            relative = max(relative, 16 * 2**-10)
    slope = math.log(case.classes) + 1 if case.criterion in ("entropy", "fitted") else 1
    return relative * slope * max(1.0, float(i.exact_logits.abs().max()))


def gpu_cases() -> list[OpCase]:
    """One axis varied at a time around a base, then corners; what matters most comes first."""
    half, full = torch.float16, torch.float32
    exit_head = OpCase("exit_head", 4096, dtype=half)
    compact = replace(exit_head, op="compact")
    conv = replace(exit_head, op="exit_conv_head")
    indexed, pointwise = (replace(exit_head, op=name) for name in INDEXED)
    compiled = [
        exit_head,
        replace(exit_head, samples=65536),
        conv,
        replace(exit_head, samples=256, channels=2048, side=7, classes=1000),
    ]
    return [
        *(replace(case, compiled=True) for case in compiled),
        compact,
        replace(compact, samples=65536),
        indexed,
        *(replace(indexed, samples=256, channels=c, side=s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
        *(replace(exit_head, samples=n) for n in (1, 16, 256, 1024, 16384)),
        *(replace(exit_head, channels=c, side=s) for c, s in ((16, 32), (32, 16), (256, 14), (512, 7), (2048, 7))),
        *(replace(conv, samples=n) for n in (256, 65536)),
        *(replace(conv, channels=c, side=s) for c, s in ((16, 32), (32, 16))),
        *(replace(conv, samples=1024, channels=c, side=s) for c, s in ((256, 14), (512, 7))),
        *(replace(indexed, channels=c, side=s) for c, s in ((16, 32), (32, 16))),
        *(replace(indexed, samples=256, exit_rate=rate) for rate in (0.1, 0.9)),
        *(replace(pointwise, samples=256, channels=c, side=s) for c, s in ((64, 56), (256, 56), (1024, 14))),
        *(replace(exit_head, classes=k) for k in (200, 1000)),
        *(replace(exit_head, dtype=dtype) for dtype in (torch.bfloat16, full)),
        replace(exit_head, layout="contiguous"),
        *(replace(exit_head, criterion=name) for name in ("max_probability", "entropy", "margin")),
        *(replace(exit_head, exit_rate=rate) for rate in (0.1, 0.9)),
        replace(compact, samples=256),
        *(replace(compact, channels=c, side=s) for c, s in ((16, 32), (2048, 7))),
        replace(compact, dtype=full),
        replace(compact, layout="contiguous"),
        *(replace(compact, exit_rate=rate) for rate in (0.1, 0.9)),
        *(replace(conv, dtype=dtype) for dtype in (torch.bfloat16, full)),
        replace(conv, classes=1000),
        replace(exit_head, samples=256, channels=256, side=56),
        replace(exit_head, samples=1, channels=2048, side=7, classes=1000),
        replace(exit_head, samples=65536, channels=16, side=32, dtype=full),
        replace(exit_head, samples=65536, channels=512, side=7, classes=1000, criterion="entropy"),
        *(replace(exit_head, criterion=name) for name in RULES),
    ]


def cpu_cases() -> list[OpCase]:
    """As `gpu_cases`, around the batch of the CPU target and in the dtype that CPUs run in."""
    exit_head = OpCase("exit_head", 256)
    compact = replace(exit_head, op="compact")
    deep = replace(exit_head, samples=64, channels=2048, side=7, classes=1000)
    return [
        replace(exit_head, compiled=True),
        *(replace(exit_head, samples=n) for n in (1, 16, 4096, 16384, 65536)),
        replace(exit_head, samples=4096, layout="contiguous"),
        *(replace(exit_head, channels=c, side=s) for c, s in ((16, 32), (32, 16), (256, 14))),
        deep,
        *(replace(exit_head, classes=k) for k in (200, 1000)),
        *(replace(exit_head, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)),
        replace(exit_head, layout="contiguous"),
        *(replace(exit_head, criterion=name) for name in ("max_probability", "entropy", "margin", *RULES)),
        *(replace(deep, criterion=name) for name in ("max_probability", *RULES)),
        compact,
        replace(compact, samples=16384),
        replace(exit_head, op="exit_conv_head"),
    ]
