"""A batch → its answers, stage by stage in chunks of measured sizes; survivors of several chunks fill the next one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .program import CompactStep
from .stores import Results, exit_at


class Waiting:
    """Survivors that wait before a stage, the first `count` rows.

    features: [capacity, C, H, W] in the layout of the first that came; positions: [capacity] int32, in the results.
    """

    def __init__(self, capacity: int, like: Tensor) -> None:
        """like: features [M, C, H, W]."""
        rows_last = like[:1].is_contiguous(memory_format=torch.channels_last) and not like[:1].is_contiguous()
        self.layout = torch.channels_last if rows_last else torch.contiguous_format
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


class Pass:
    """One batch on its way through the stages; `run` is called once."""

    def __init__(
        self, steps: Sequence[CompactStep], criterion: str, thresholds: Tensor, results: Results,
        kept: dict[int, Waiting],
    ) -> None:  # fmt: skip
        """thresholds: [n] float32. results: where the exits write.

        kept: by stage, memory of earlier batches for survivors that wait; it is used again, or replaced.
        """
        self.steps, self.criterion, self.thresholds, self.results = steps, criterion, thresholds, results
        self.kept, self.size = kept, len(results.exits)
        self.order = torch.arange(self.size, dtype=torch.int32, device=results.exits.device)

    def run(self, images: Tensor) -> None:
        """images: [N, C, H, W], N that of the results, in the stages' dtype."""
        self._chunks(0, images, self.order)

    def _chunk(self, i: int) -> int:
        return self.steps[i].chunk or max(self.size, 1)

    def _chunks(self, i: int, features: Tensor, positions: Tensor, last: bool = True) -> None:
        """Features through stage i; last: whether no others will come to it."""
        n, chunk = len(features), self._chunk(i)
        for begin in range(0, n, chunk):
            rows = slice(begin, begin + chunk)
            self._stage(i, features[rows], positions[rows], last and begin + chunk >= n)

    def _stage(self, i: int, features: Tensor, positions: Tensor, last: bool) -> None:
        """One chunk through stage i and its exit; last: whether no others will come to it."""
        step, n = self.steps[i], len(features)
        features = step.stage(features.contiguous(memory_format=step.layout))
        final = i == len(self.steps) - 1
        entries = self.order[:n], positions, torch.full((1,), n, dtype=torch.int32, device=features.device)
        threshold = None if final else self.thresholds[i]
        survivors = exit_at(step, i, self.criterion, threshold, features, entries, self.results)
        if not final:
            self._survive(i + 1, features, *survivors, last)

    def _survive(self, i: int, features: Tensor, rows: Tensor, positions: Tensor, live: Tensor, last: bool) -> None:
        """Survivors of a chunk come to stage i and go through it, or wait for more."""
        n, number = len(features), int(live)  # the one place where the host reads a count
        waiting = self.kept.get(i)
        waits = waiting is not None and waiting.count > 0
        if number and not waits and (last or number % self._chunk(i) == 0):
            if number < n:
                arrived, features = features, torch.empty_like(features[:number])
                ops.gather_survivors.run(arrived, rows[:number], live, features)
            self._chunks(i, features, positions[:number], last)
            return
        if number:
            capacity = min(self.size, self._chunk(i) - 1 + n)
            if waiting is None or not (waits or waiting.fits(capacity, features)):
                waiting = self.kept[i] = Waiting(capacity, features)
            waiting.append(features, rows, positions, live, number)
        self._go_on(i, last)

    def _go_on(self, i: int, last: bool) -> None:
        """What fills chunks of those that wait before stage i goes through it; where `last`, all that wait anywhere."""
        waiting, chunk = self.kept.get(i), self._chunk(i)
        if waiting is not None and waiting.count:
            while waiting.count >= chunk or (last and waiting.count):
                # From the end, so that the others stay where they are.
                end = waiting.count
                waiting.count = begin = max(end - chunk, 0)
                self._stage(i, waiting.features[begin:end], waiting.positions[begin:end], last and begin == 0)
        elif last and i + 1 < len(self.steps):
            self._go_on(i + 1, True)
