"""A run that stopped after an exit: the answers so far, and what the samples that go on take along, as a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .result import ExitResult

FEATURES = ("exact", "float16", "uint8")
"""How `Survivors.to_bytes` writes features."""


@dataclass(frozen=True, eq=False)
class Survivors:
    """The samples of a batch that no exit up to `exit_index` has answered; `Accelerated.resume` answers them.

    features: [M, C, H, W] before the next stage, in the engine's dtype; of a quantised network its integers, uint8.
    positions: [M] int64, their rows in the batch of `size` images, each at most once.
    exit_index: the last exit that was evaluated.
    logits, confidence: [M, K] and [M] float32, what that exit says of them: the answer so far, which is the state of a
        rule that carries something from exit to exit.
    limits: [n] float32 thresholds of the call, or [n, M], those of each sample, where NaN ends a sample's run.
    criterion: name of the exit rule.
    structure, weights: hashes of the network, see `eefast.fingerprints`; version: of eefast.
    arithmetic: what else the answers' bits depend on: engine, device, dtype, kernels.
    error: the largest difference of a feature from what the network computed, 0 where none was rounded for a wire.
    rule: [n + 1, 9] float32, of the call, where the criterion carries and is no rule in Python; else None.

    Raises `ValueError` where the tensors do not fit together.
    """

    features: Tensor
    positions: Tensor
    size: int
    exit_index: int
    logits: Tensor
    confidence: Tensor
    limits: Tensor
    criterion: str
    structure: str
    weights: str
    version: str
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    error: float = 0.0
    rule: Tensor | None = None

    def __post_init__(self) -> None:
        count, n = len(self), len(self.limits) if self.limits.dim() else 0
        rows = {"positions": (count,), "confidence": (count,), "logits": (count, *self.logits.shape[1:])}
        for name, wanted in rows.items():
            if getattr(self, name).shape != wanted:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)} for {count} survivors")
        if self.features.dim() != 4 or self.logits.dim() != 2:
            raise ValueError(
                f"features {tuple(self.features.shape)} and logits {tuple(self.logits.shape)} must be [M, C, H, W] and "
                "[M, K]"
            )
        if self.limits.shape not in ((n,), (n, count)):
            raise ValueError(
                f"limits has shape {tuple(self.limits.shape)} for {count} survivors; expected [n] or [n, M]"
            )
        if not 0 <= self.exit_index < n:
            raise ValueError(f"exit_index={self.exit_index} is no early exit of a network that has {n}")
        if self.rule is not None and (self.rule.shape != (n + 1, 9) or self.rule.dtype != torch.float32):
            raise ValueError(
                f"rule is {self.rule.dtype} of shape {tuple(self.rule.shape)}; expected float32 of {(n + 1, 9)}"
            )
        dtypes = {"positions": torch.int64, "logits": torch.float32, "confidence": torch.float32}
        for name, dtype in {**dtypes, "limits": torch.float32}.items():
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"{name} is {getattr(self, name).dtype}; expected {dtype}")
        taken = self.positions.tolist()
        if taken and not 0 <= min(taken) <= max(taken) < self.size:
            raise ValueError(f"positions reach from {min(taken)} to {max(taken)}; expected 0 … {self.size - 1}")
        if len(set(taken)) < count:
            raise ValueError("positions names a row of the batch twice")

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.features.shape[1:]))
        where = " ".join(self.arithmetic.values())
        return f"Survivors({len(self)} of {self.size} after exit {self.exit_index}, features {shape}, {where})"

    def to(self, device: torch.device | str) -> Survivors:
        """The same with all tensors on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, replaced as a whole; an interrupted save leaves the old one readable.

        Raises `eefast.system.files.WriteError` for a full disk and the like.
        """
        from .checkpoint.survivors_file import content
        from .system import files

        files.write(path, content(self, "exact"))

    @classmethod
    def load(cls, path: str | Path) -> Survivors:
        """What `save` wrote, on the CPU. Raises `ValueError` for a file that is torn, of another kind or version."""
        from .checkpoint.survivors_file import read

        return read(path)

    def to_bytes(self, features: str = "exact") -> bytes:
        """The content of a safetensors file, to be sent.

        features: "exact", "float16", or "uint8", 256 steps from the smallest to the largest number of each channel. A
            survivor made of these bytes says how far its features are off: `error`. Integers stay exact.
        Raises `ValueError` for another name, and for features that the format cannot hold.
        """
        from .checkpoint.survivors_file import content

        return content(self, features)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Survivors:
        """What `to_bytes` wrote, on the CPU. Raises `ValueError` as `load`."""
        from .checkpoint.survivors_file import parsed

        return parsed(data, "these bytes")

    @classmethod
    def merged(cls, several: Sequence[Survivors]) -> Survivors:
        """Survivors of several batches as those of one batch that holds all images, one batch after the other.

        Raises `ValueError` unless all stopped after the same exit of the same network, in the same arithmetic.
        """
        if not several:
            raise ValueError("several is empty; give the survivors of at least one batch")
        first, size, positions = several[0], 0, []
        names = ("exit_index", "criterion", "structure", "weights", "version", "arithmetic")
        for other in several:
            for name in names:
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(
                        f"survivors of {name}={getattr(first, name)} and {getattr(other, name)} cannot go on together; "
                        "resume them one by one"
                    )
            if (other.features.shape[1:], other.features.dtype) != (first.features.shape[1:], first.features.dtype):
                raise ValueError(
                    f"survivors with features {tuple(first.features.shape[1:])} and {tuple(other.features.shape[1:])} "
                    "cannot go on together; resume them one by one"
                )
            rules = first.rule, other.rule
            if not (rules[0] is rules[1] or (None not in rules and torch.equal(*rules))):  # type: ignore[arg-type]
                raise ValueError(
                    f"survivors of two tables of the exit rule {first.criterion!r} cannot go on together; resume them "
                    "one by one"
                )
            positions.append(other.positions + size)
            size += other.size
        if all(s.limits.dim() == 1 and torch.equal(s.limits, first.limits) for s in several):
            limits = first.limits
        else:
            each = [s.limits if s.limits.dim() == 2 else s.limits[:, None].expand(-1, len(s)) for s in several]
            limits = torch.cat(each, dim=1)
        features, logits, confidence = (
            torch.cat([getattr(s, name) for s in several]) for name in ("features", "logits", "confidence")
        )
        return replace(
            first,
            features=features,
            positions=torch.cat(positions),
            size=size,
            logits=logits,
            confidence=confidence,
            limits=limits,
            error=max(s.error for s in several),
        )


class Partial(NamedTuple):
    """What `Accelerated.until` returns.

    result: [N], a row for each image, or survivor, that was given; rows of those that go on hold the answer so far,
        with the exit that they passed last.
    exited: [N] bool, the rows whose answer is final.
    survivors: the others, in the order of their rows.
    """

    result: ExitResult
    exited: Tensor
    survivors: Survivors

    def finished(self, rest: ExitResult) -> ExitResult:
        """The result with the answers of the survivors, [M] in their order, in place of those so far."""
        if len(rest.exit_index) != len(self.survivors):
            raise ValueError(f"rest has {len(rest.exit_index)} rows for {len(self.survivors)} survivors")
        goes_on = ~self.exited
        return ExitResult(
            *(
                part.masked_scatter(goes_on if part.dim() == 1 else goes_on[:, None], new.to(part))
                for part, new in zip(self.result, rest, strict=True)
            )
        )
