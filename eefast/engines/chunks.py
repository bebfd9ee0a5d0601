"""A batch → its answers, stage by stage in chunks of measured sizes; survivors of several chunks fill the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..criteria import Step
from .program import CompactStep
from .stores import Results, exit_at


def layout_of_maps(features: Tensor) -> torch.memory_format:
    """Channels-last where each row is so and not contiguous, else contiguous, also for rows with gaps."""
    row = features[:1]
    last = row.is_contiguous(memory_format=torch.channels_last) and not row.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class Waiting:
    """Survivors that wait before a stage, the first `count` rows.

    features: [capacity, C, H, W] in the layout of the first that came; positions: [capacity] int32, in the results.
    """

    def __init__(self, capacity: int, like: Tensor) -> None:
        """like: features [M, C, H, W]."""
        self.layout = layout_of_maps(like)
        # Made in inference mode it could not be written to outside of it.
        with torch.inference_mode(False):
            made = torch.empty(capacity, *like.shape[1:], dtype=like.dtype, device=like.device)
            self.features = made.contiguous(memory_format=self.layout)
            self.positions = torch.empty(capacity, dtype=torch.int32, device=like.device)
        self.count = 0

    def fits(self, capacity: int, like: Tensor) -> bool:
        """Whether survivors of features like these can wait here."""
        mine = self.features
        return len(mine) >= capacity and (mine.shape[1:], mine.dtype) == (like.shape[1:], like.dtype)

    def append(self, features: Tensor, rows: Tensor, positions: Tensor, live: Tensor, number: int) -> None:
        """The rows of `features` that `rows` names, the first `number` = `live` of them."""
        offset = torch.full((1,), self.count, dtype=torch.int32, device=features.device)
        features = features.contiguous(memory_format=self.layout)
        ops.gather_survivors.run(features, rows[:number], live, self.features, offset)
        self.positions[self.count : self.count + number] = positions[:number]
        self.count += number


@dataclass
class Kept:
    """Memory of a batch that later ones use again, for one at a time.

    waiting: by stage, for survivors that wait before it. maps: by name, for features. last: what `map` returned last.
    order: 0, 1, 2 … int32. counts: number → the same as [1] int32.
    """

    waiting: dict[int, Waiting] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    order: Tensor | None = None
    counts: dict[int, Tensor] = field(default_factory=dict)

    def map(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor with any content, in the memory of this name."""
        last = self.last.get(name)
        if last is not None and last.shape == shape and last.dtype == dtype:
            return last
        kept, numbers = self.maps.get(name), shape.numel()
        with torch.inference_mode(False):
            if kept is None or kept.dtype != dtype or kept.shape[0] < numbers:
                kept = self.maps[name] = torch.empty(numbers, dtype=dtype, device=device)
            last = self.last[name] = kept[:numbers].view(shape)
        return last

    def count(self, number: int, device: torch.device) -> Tensor:
        if number not in self.counts:
            with torch.inference_mode(False):
                self.counts[number] = torch.full((1,), number, dtype=torch.int32, device=device)
        return self.counts[number]

    def numbers(self, count: int, device: torch.device) -> Tensor:
        """0 … count - 1, int32."""
        if self.order is None or self.order.shape[0] < count:
            with torch.inference_mode(False):
                self.order = torch.arange(count, dtype=torch.int32, device=device)
        return self.order[:count]


class Pass:
    """One batch on its way through the stages; `run` is called once."""

    def __init__(
        self, steps: Sequence[CompactStep], criterion: str, thresholds: Tensor, results: Results, kept: Kept,
        rule: Tensor | Step | None = None, reached: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        """thresholds: [n] float32. results: where the exits write. kept: of earlier batches. rule: see `exit_at`.

        steps: up to the last exit, where every sample exits. reached: gets copies of the features after the last stage,
            and their positions, part by part; None for no copies.
        """
        self.reached = reached
        self.steps, self.criterion, self.thresholds, self.results = steps, criterion, thresholds, results
        self.rule = rule
        self.kept, self.size, self.device = kept, results.exits.shape[0], results.exits.device
        self.order = kept.numbers(self.size, self.device)

    def run(self, images: Tensor, first: int = 0) -> None:
        """images: [N, C, H, W], N that of the results, in the stages' dtype; or the features before stage `first`."""
        self._chunks(first, images, self.order)

    def _chunk(self, i: int) -> int:
        return self.steps[i].chunk or max(self.size, 1)

    def _chunks(self, i: int, features: Tensor, positions: Tensor, last: bool = True) -> None:
        """Features through stage i; last: whether no others will come to it."""
        n, chunk = features.shape[0], self._chunk(i)
        if 0 < n <= chunk:
            self._stage(i, features, positions, last)
            return
        for begin in range(0, n, chunk):
            rows = slice(begin, begin + chunk)
            self._stage(i, features[rows], positions[rows], last and begin + chunk >= n)

    def _stage(self, i: int, features: Tensor, positions: Tensor, last: bool) -> None:
        """One chunk through stage i and its exit; last: whether no others will come to it."""
        step, n, device = self.steps[i], features.shape[0], self.device
        # What this stage returns is needed until its next chunk begins; all later stages are done with it by then.
        features, seen = step.into(features, lambda shape, dtype: self.kept.map(f"after {i}", shape, dtype, device))
        final = i == len(self.steps) - 1
        entries = self.order[:n], positions, self.kept.count(n, device)
        threshold = None if final else self.thresholds[i]
        survivors = exit_at(step, i, self.criterion, threshold, seen, entries, self.results, self.rule)
        if final and self.reached is not None:
            self.reached.append((features.clone(), positions.clone()))
        if not final:
            self._survive(i + 1, features, *survivors, last)

    def _survive(self, i: int, features: Tensor, rows: Tensor, positions: Tensor, live: Tensor, last: bool) -> None:
        """Survivors of a chunk come to stage i and go through it, or wait for more."""
        n, number = features.shape[0], int(live)  # the one place where the host reads a count
        waiting = self.kept.waiting.get(i)
        waits = waiting is not None and waiting.count > 0
        if number and not waits and (last or number % self._chunk(i) == 0):
            if number < n:
                arrived = features.contiguous(memory_format=layout_of_maps(features))
                features = self._like(f"before {i}", features[:number])
                ops.gather_survivors.run(arrived, rows[:number], live, features)
            self._chunks(i, features, positions[:number], last)
            return
        if number:
            capacity = min(self.size, self._chunk(i) - 1 + n)
            if waiting is None or not (waits or waiting.fits(capacity, features)):
                waiting = self.kept.waiting[i] = Waiting(capacity, features)
            waiting.append(features, rows, positions, live, number)
        self._go_on(i, last)

    def _like(self, name: str, features: Tensor) -> Tensor:
        """Kept memory for survivors, in the layout of `features`."""
        shape, layout = features.shape, layout_of_maps(features)
        if layout == torch.channels_last:
            n, c, h, w = shape
            made = self.kept.map(name, torch.Size((n, h, w, c)), features.dtype, features.device)
            return made.permute(0, 3, 1, 2)
        return self.kept.map(name, shape, features.dtype, features.device)

    def _go_on(self, i: int, last: bool) -> None:
        """What fills chunks of those that wait before stage i goes through it; where `last`, all that wait anywhere."""
        waiting, chunk = self.kept.waiting.get(i), self._chunk(i)
        if waiting is not None and waiting.count:
            while waiting.count >= chunk or (last and waiting.count):
                # From the end, so that the others stay where they are.
                end = waiting.count
                waiting.count = begin = max(end - chunk, 0)
                self._stage(i, waiting.features[begin:end], waiting.positions[begin:end], last and begin == 0)
        elif last and i + 1 < len(self.steps):
            self._go_on(i + 1, True)
