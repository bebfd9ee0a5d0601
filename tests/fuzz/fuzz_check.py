"""One random network, called in random ways: every answer beside those of the same layers in float64."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from fuzz_networks import network
from torch import Tensor, nn

import eefast
from eefast.measure.comparison import FLIP_MARGIN

CALLS = 24
SIZES = (0, 1, 2, 3, 7, 16, 17, 31, 64, 97)
RUNS = (
    *(("reference", torch.float32), ("compact", torch.float32), ("resident", torch.float32), ("auto", torch.float32)),
    *(("compact", torch.bfloat16), ("resident", torch.bfloat16)),
)
FLOOR = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Error of logits that is always allowed, as a share of the largest; beyond it, twice that of eager PyTorch."""


@dataclass(frozen=True)
class Case:
    """A network and its calls; `str` is the line of code that repeats it."""

    seed: int

    def __str__(self) -> str:
        return f"check(Case({self.seed}))  # or: python tests/fuzz --case {self.seed}"


@dataclass
class Found:
    """What the checked calls came to.

    rows, calls, refused: rows answered, calls, and ways that said by name why they cannot run.
    edge: rows that left elsewhere with a confidence within the margin of a threshold.
    problems: one line each; lost rows, wrong exits, wrong logits, exceptions.
    """

    rows: int = 0
    calls: int = 0
    networks: int = 0
    refused: int = 0
    edge: int = 0
    engines: Counter[str] = field(default_factory=Counter)
    error: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, other: Found) -> None:
        for name in ("rows", "calls", "networks", "refused", "edge"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.engines += other.engines
        self.problems += other.problems
        for key, value in other.error.items():
            self.error[key] = max(value, self.error.get(key, 0.0))


@dataclass(frozen=True)
class Outputs:
    """What all exits say: logits [n + 1, N, K] and confidences [n + 1, N], float64 or a dtype seen as float64."""

    logits: Tensor
    confidence: Tensor

    def of(self, rows: Tensor) -> Outputs:
        return Outputs(self.logits[:, rows], self.confidence[:, rows])


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with all of its floating-point tensors in one dtype."""
    return nn.Module._apply(copy.deepcopy(module), lambda t: t.to(dtype) if t.is_floating_point() else t)


@torch.no_grad()
def outputs(net: eefast.EarlyExitNet, x: Tensor, dtype: torch.dtype) -> Outputs:
    """A network of this dtype in eager PyTorch, stage by stage, on all images at once."""
    logits, confidence = [], []
    x = x.to(dtype)
    for stage, head in zip(net.stages, net.heads, strict=True):
        x = stage(x)
        # Some stages change their input in place, and exits must not see that.
        seen = head(x.clone())
        logits.append(seen.logits.double())
        row = seen.confidence_logit.double() if dtype != torch.float64 else _row(head, x)
        confidence.append(_confidence(net.criterion.name, logits[-1], row))
    return Outputs(torch.stack(logits), torch.stack(confidence))


def _row(head: nn.Module, x: Tensor) -> Tensor:
    """The confidence row before the sigmoid in float64; heads round it to float32."""
    found: list[Tensor] = []
    rows = head.confidence if hasattr(head, "confidence") else head.rows
    hook = rows.register_forward_hook(lambda m, received, returned: found.append(returned[:, -1]))
    head(x.clone())
    hook.remove()
    return found[0]


def _confidence(criterion: str, logits: Tensor, row: Tensor) -> Tensor:
    """The rules as the papers state them, in float64, written once more."""
    p = torch.softmax(logits, dim=1)
    ordered = p.sort(dim=1, descending=True).values
    if criterion == "learned":
        return torch.sigmoid(row)
    if criterion == "max_probability":
        return ordered[:, 0]
    if criterion == "margin":
        return ordered[:, 0] - (ordered[:, 1] if p.shape[1] > 1 else 0)
    assert criterion == "entropy", f"_confidence has no formula for {criterion!r}"
    return torch.special.entr(p).sum(dim=1)


def check(case: Case) -> Found:
    """Build the case's network and run its calls; problems come back, nothing is raised."""
    found, rng = Found(networks=1), random.Random(case.seed ^ 0x5EED)
    torch.set_num_threads(rng.choice((1, 2)))
    try:
        net, backbone = network(case.seed)
    except Exception as error:
        found.problems.append(f"{case}: the network: {_brief(error)}")
        return found
    ways: dict[tuple[str, torch.dtype], eefast.api.Accelerated] = {}
    before = _state(net)
    for engine, dtype in RUNS:
        try:
            ways[engine, dtype] = eefast.accelerate(net, engine=engine, dtype=dtype)
        except ValueError as error:
            if engine in ("reference", "auto") or "cannot run" not in str(error):
                found.problems.append(f"{case}: accelerate({engine}, {dtype}): {_brief(error)}")
            found.refused += 1
        except Exception as error:
            found.problems.append(f"{case}: accelerate({engine}, {dtype}): {_brief(error)}")
    exact = in_dtype(net, torch.float64), backbone and in_dtype(backbone, torch.float64)
    eager = {dtype: in_dtype(net, dtype) for dtype in {dtype for _, dtype in ways}}
    for call in range(CALLS if ways else 0):
        _call(case, call, random.Random(case.seed * 1009 + call), net, exact, eager, ways, found)
    if not all(torch.equal(a, b) for a, b in zip(before, _state(net), strict=True)):
        found.problems.append(f"{case}: the network's weights or buffers have changed")
    return found


PER_TASK = 20


def check_some(first: int) -> Found:
    """`PER_TASK` cases in a row."""
    found = Found()
    for seed in range(first, first + PER_TASK):
        found.add(check(Case(seed)))
    return found


def _state(net: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for name, t in net.state_dict().items() if name != "thresholds"]


def _call(
    case: Case,
    call: int,
    rng: random.Random,
    net: eefast.EarlyExitNet,
    exact_nets: tuple[nn.Module, nn.Module | None],
    eager_nets: dict[torch.dtype, nn.Module],
    ways: dict[tuple[str, torch.dtype], eefast.api.Accelerated],
    found: Found,
) -> None:
    x, images = _images(rng, net)
    exact = outputs(exact_nets[0], x, torch.float64)
    finite = torch.isfinite(x.flatten(1)).all(1) if len(x) else torch.ones(0, dtype=torch.bool)
    thresholds = _thresholds(rng, net, exact, finite)
    key = rng.choice(list(ways))
    streamed = rng.random() < 0.3
    where = f"{case}: call {call}, {key[0]} {str(key[1])[6:]}, {net.criterion.name}, images {tuple(images.shape)}"
    where += f" {str(images.dtype)[6:]}{', stream' * streamed}, thresholds {thresholds.tolist()}"
    with torch.no_grad():
        net.thresholds.copy_(thresholds)
    fast = ways[key]
    found.calls += 1
    if thresholds.isnan().any():
        try:
            fast(images)
            found.problems.append(f"{where}: a NaN threshold was taken")
        except ValueError:
            return
        except Exception as error:
            found.problems.append(f"{where}: {_brief(error)}")
        return
    kept = images.clone()
    try:
        result = _streamed(rng, fast, images) if streamed else fast(images)
    except Exception as error:
        if _refused(net, images):
            found.refused += 1
        else:
            found.problems.append(f"{where}: {_brief(error)}")
        return
    if not torch.equal(kept.nan_to_num(), images.nan_to_num()):
        found.problems.append(f"{where}: the images have changed")
    found.rows += len(images)
    found.engines[f"{fast.plan.engine} {str(key[1])[6:]}"] += len(images)
    eager = outputs(eager_nets[key[1]], x, key[1]) if len(x) else exact
    for problem in _judged(net, result, exact, eager, thresholds, finite, key, found):
        found.problems.append(f"{where}: {problem}")
    if exact_nets[1] is not None and finite.any():
        with torch.no_grad():
            plain = exact_nets[1](x.double())[finite]
        off = float((plain - exact.logits[-1][finite]).abs().max())
        if not off <= 1e-9 * float(plain.abs().max().clamp_min(1.0)):
            found.problems.append(f"{where}: the final exit is {off:.2g} off the backbone's answer")


def _refused(net: eefast.EarlyExitNet, images: Tensor) -> bool:
    """Whether plain PyTorch cannot run these images either, as where a stage calls `view` on such a layout."""
    try:
        net(images.detach())
    except RuntimeError:
        return True
    return False


def _images(rng: random.Random, net: eefast.EarlyExitNet) -> tuple[Tensor, Tensor]:
    """Normalised float32 images [N, C, H, W] as the network's layers see them, and the tensor to hand in."""
    n, (channels, height, width) = rng.choice(SIZES), net.input_shape
    plain = any(getattr(head, "kind", None) == "plain" for head in net.heads)
    if not plain and rng.random() < 0.25:
        height, width = height + rng.randint(0, 5), width + rng.randint(0, 5)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if net.normalization is not None and rng.random() < 0.4:
        pixels = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)
        mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in net.normalization)
        return (pixels.float() / 255 - mean) / std, _laid_out(rng, pixels)
    x = torch.randn(n, channels, height, width, generator=generator)
    x = x * (0.3 + 1.5 * torch.rand(n, 1, 1, 1, generator=generator)) + torch.randn(
        n, channels, 1, 1, generator=generator
    )
    if n and rng.random() < 0.15:
        x[rng.randrange(n)] = float("nan")
    if n > 1 and rng.random() < 0.05:
        x = x[:1].expand(n, -1, -1, -1)
    return x.contiguous(), _laid_out(rng, x)


def _laid_out(rng: random.Random, x: Tensor) -> Tensor:
    """The same images in another layout."""
    n, c, h, w = x.shape
    kind = rng.randrange(7)
    if kind == 1:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 2:
        wide = torch.zeros(n, c, h, 2 * w + 1, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if kind == 3:
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == 4:
        long = torch.zeros(2 * n + 1, c, h, w, dtype=x.dtype)
        long[1::2] = x
        return long[1::2]
    if kind == 5:
        return torch.cat([x.new_zeros(5), x.flatten()])[5:].view(x.shape)
    if kind == 6 and x.is_floating_point():
        return x.clone().requires_grad_()
    return x


def _thresholds(rng: random.Random, net: eefast.EarlyExitNet, exact: Outputs, finite: Tensor) -> Tensor:
    values = []
    for i in range(net.num_exits):
        seen, kind = exact.confidence[i][finite], rng.random()
        if kind < 0.02:
            values.append(float("nan"))
        elif kind < 0.1:
            values.append(rng.choice((float("inf"), -float("inf"), 0.0, 1.0)))
        elif kind < 0.2 and len(seen):
            values.append(float(seen[rng.randrange(len(seen))]))
        elif len(seen) > 1:
            ordered = seen.sort().values
            # The widest gap near the wanted share, so that the last bit decides rarely.
            k = min(max(1, round(rng.random() * len(ordered))), len(ordered) - 1)
            low = max(k - 2, 1)
            k = low + int(ordered.diff()[low - 1 : k + 2].argmax())
            values.append(float((ordered[k - 1] + ordered[k]) / 2))
        else:
            values.append(rng.random())
    return torch.tensor(values, dtype=torch.float32)


def _streamed(rng: random.Random, fast: Callable[..., eefast.ExitResult], images: Tensor) -> eefast.ExitResult:
    """The images as a stream of batches of random sizes that one buffer brings, as a camera does."""
    sizes, left = [], len(images)
    while left:
        sizes.append(min(left, rng.choice((0, 1, 2, 5, 16, 33))))
        left -= sizes[-1]
    largest = max(sizes, default=1)
    buffer = images.new_zeros(max(largest, 1), *images.shape[1:]).detach()

    def batches() -> Iterator[Tensor]:
        begin = 0
        for size in sizes or [0]:
            buffer[:size].copy_(images[begin : begin + size].detach())
            yield buffer[:size]
            begin += size

    parts = list(fast.stream(batches()))
    if [len(part.logits) for part in parts] != (sizes or [0]):
        raise AssertionError(f"batches of {sizes} came back as {[len(part.logits) for part in parts]}")
    return eefast.ExitResult(*map(torch.cat, zip(*parts, strict=True)))


def _judged(
    net: eefast.EarlyExitNet,
    result: eefast.ExitResult,
    exact: Outputs,
    eager: Outputs,
    thresholds: Tensor,
    finite: Tensor,
    key: tuple[str, torch.dtype],
    found: Found,
) -> Iterator[str]:
    n, taken = exact.logits.shape[1], result.exit_index
    shapes = [tuple(part.shape) for part in result]
    if shapes != [(n, net.num_classes), (n,), (n,), (n,)] or taken.dtype != torch.int64:
        yield f"shapes {shapes}, exits {taken.dtype}"
        return
    if n == 0:
        return
    if not ((taken >= 0) & (taken <= net.num_exits)).all():
        yield f"exits {taken.tolist()} of {net.num_exits + 1}"
        return
    if not torch.equal(result.cost, net.cost[taken]):
        yield "costs are not those of the exits"
    rows = torch.arange(n)
    lost = ~finite & (taken != net.num_exits)
    if lost.any():
        yield f"rows of NaN left at exits {taken[lost].tolist()}"
    scale = float(exact.logits[:, finite].abs().max().clamp_min(1e-6)) if finite.any() else 1.0
    off = float((eager.logits - exact.logits)[:, finite].abs().max()) if finite.any() else 0.0
    allowed = max(FLOOR[key[1]] * scale, 2 * off)
    error = (result.logits.double() - exact.logits[taken, rows])[finite].abs()
    if finite.any():
        name = f"{key[0]} {str(key[1])[6:]}"
        found.error[name] = max(found.error.get(name, 0.0), float(error.max()) / scale)
        if not error.max() <= allowed:
            yield f"logits {float(error.max()):.2g} off, {allowed:.2g} allowed"
    confidence_off = float((eager.confidence - exact.confidence)[:, finite].abs().max()) if finite.any() else 0.0
    margin = max(FLIP_MARGIN[key[1]], 2 * confidence_off)
    if finite.any() and not (result.confidence - exact.confidence[taken, rows])[finite].abs().max() <= margin:
        yield "confidences are not those of the exits taken"
    above = net.criterion.comparison == ">"
    for i in range(net.num_exits):
        gap = (exact.confidence[i] - float(thresholds[i])) * (1 if above else -1)
        here = finite & (taken == i) & (gap <= 0)
        beyond = finite & (taken > i) & (gap > 0)
        # A threshold of infinity has no margin: no rounding moves a confidence across it.
        wrong = (here | beyond) & ~(gap.abs() <= margin)
        found.edge += int(((here | beyond) & ~wrong).sum())
        if wrong.any():
            row = int(wrong.nonzero()[0])
            yield (
                f"{int(wrong.sum())} wrong exits, the first is row {row} at exit {int(taken[row])}, where at exit {i} "
                f"its confidence is {float(exact.confidence[i, row]):.6g}"
            )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]
