"""Early exit as in BatchCond: at every exit the batch goes on padded with dead rows, or is split, or a table decides.

Written from the description of Selvam, "BatchCond", CASES 2024, whose own table is for one GPU and 128 images.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eefast.measure.baselines import Run
from eefast.measure.timing import mean_seconds
from eefast.model import EarlyExitNet
from eefast.planning.folding import fold_stage
from eefast.result import ExitResult

from .peer import Peer, torch_version

MODES = ("padding", "splitting", "table")
ROUNDS = 3

Splits = Callable[[int, int, int], bool]
"""(early exit, rows that arrived, survivors) → whether the survivors become a separate batch."""


class Step(nn.Module):
    """A stage and its exit, BatchNorm folded: features → features, logits [N, K] and confidence [N], both float32."""

    def __init__(self, net: EarlyExitNet, i: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.stage, _ = fold_stage(net.stages[i], dtype)
        head: Any = copy.deepcopy(net.heads[i])
        head.convs, _ = fold_stage(head.convs, torch.float32)
        self.head = head.to(dtype, memory_format=torch.channels_last).requires_grad_(False)
        self.criterion = net.criterion

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.stage(features)
        out = self.head(features)
        logits = out.logits.float()
        return features, logits, self.criterion.confidence(logits, out.confidence_logit)


def steps(net: EarlyExitNet, dtype: torch.dtype) -> list[Step]:
    return [Step(net, i, dtype).eval() for i in range(net.num_exits + 1)]


def prepare(net: EarlyExitNet, mode: str, dtype: torch.dtype, largest: int) -> Run:
    """mode: one of `MODES`. largest: images in a batch at most, up to which the table goes."""
    made = steps(net, dtype)
    if mode == "padding":
        return in_steps(net, made, None)
    if mode == "splitting":
        return in_steps(net, made, lambda i, rows, survivors: True)
    if mode == "table":
        return in_steps(net, made, measured(made, net.input_shape, dtype, net.cost.device, largest))
    raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")


def in_steps(net: EarlyExitNet, steps: Sequence[Callable[[Tensor], Any]], splits: Splits | None) -> Run:
    """steps: as `Step`, one per exit. splits: None carries dead rows to the end, and the host reads nothing."""

    @torch.no_grad()
    def run(x: Tensor) -> ExitResult:
        n, device = len(x), x.device
        logits = torch.zeros(n, net.num_classes, device=device)
        confidence, exits = torch.zeros(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
        features, rows, live = x, torch.arange(n, device=device), torch.ones(n, dtype=torch.bool, device=device)
        for i, step in enumerate(steps):
            features, answer, value = step(features)
            # All live rows answer; those that go on are overwritten at a later exit.
            logits[rows] = answer.where(live[:, None], logits[rows])
            confidence[rows] = value.where(live, confidence[rows])
            exits[rows] = torch.where(live, i, exits[rows])
            if i == net.num_exits:
                break
            live = live & ~net.criterion.leaves(value, net.thresholds[i])
            if splits is None:
                continue
            survivors = int(live.sum())  # the host waits
            if survivors == 0:
                break
            if survivors < len(rows) and splits(i, len(rows), survivors):
                kept = torch.nonzero_static(live, size=survivors).squeeze(1)
                features, rows, live = gathered(features, kept), rows[kept], live[kept]
        return ExitResult(logits, exits, confidence, net.cost[exits])

    return run


def gathered(features: Tensor, kept: Tensor) -> Tensor:
    """Rows of channels-last features, which stay channels-last."""
    return features.permute(0, 2, 3, 1).index_select(0, kept).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class BreakEven:
    """Seconds of what follows each exit, by number of rows.

    stages: of the next stage, with its exit. gathers: to make a batch of that number of survivors.
    """

    stages: tuple[tuple[float, ...], ...]
    gathers: tuple[tuple[float, ...], ...]

    def __call__(self, i: int, rows: int, survivors: int) -> bool:
        # Dead rows are carried to the next exit at most, where the question comes up again.
        stage = self.stages[i]
        return stage[survivors] + self.gathers[i][survivors] < stage[rows]


@torch.no_grad()
def measured(
    steps: Sequence[Step], shape: Sequence[int], dtype: torch.dtype, device: torch.device, largest: int
) -> BreakEven:
    """Measured at 1, 2, 4, … and `largest` rows of noise, in between on a straight line."""
    sizes = [*(2**k for k in range((largest - 1).bit_length())), largest]
    features = torch.randn(largest, *shape, device=device).to(dtype, memory_format=torch.channels_last)
    order = torch.arange(largest, device=device)
    stages, gathers = [], []
    for i, step in enumerate(steps):
        if i:
            stages.append(_line(sizes, [median_seconds(partial(step, features[:n]), device) for n in sizes]))
            gathers.append(
                _line(sizes, [median_seconds(partial(gathered, features, order[:n]), device) for n in sizes])
            )
        features, *_ = step(features)
    return BreakEven(tuple(stages), tuple(gathers))


def _line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    return tuple(np.interp(range(sizes[-1] + 1), sizes, seconds).tolist())


def median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of the host and the device; the first call, which may choose algorithms, is not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return statistics.median([mean_seconds(work, wait=wait) for _ in range(ROUNDS + 1)][1:])


def prepare_cpu(net: EarlyExitNet, mode: str) -> Run:
    """As `prepare`, once for each batch size."""
    made: dict[int, Run] = {}

    def run(x: Tensor) -> ExitResult:
        if len(x) not in made:
            made[len(x)] = prepare(net, mode, torch.float32, len(x))
        return made[len(x)](x)  # type: ignore[no-any-return]

    return run


PEERS = tuple(
    Peer(
        f"BatchCond, {mode}", partial(prepare_cpu, mode=mode), torch_version, False, "torch",
        memory_format=torch.channels_last,
    )
    for mode in MODES
)  # fmt: skip
