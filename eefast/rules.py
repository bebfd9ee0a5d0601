"""Numbers per exit → the table of an exit rule that carries the answer so far from exit to exit, its thresholds.

At exit i, with the exit's logits l and confidence row z, and with L' and s' of the exit before:

    L = l + a · L'                                                     the answer so far, which is what an image is told
    s = bias + Σ weights · (σ(z), p1(L), −H(L), margin(L), softplus(z)) + (keep + keep_if_same · [same class]) · s'

An image exits where s > threshold. L and s are the result's logits and confidence. `criteria.carry` is this step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, isfinite, log1p

import torch
from torch import Tensor

from . import criteria

COLUMNS = ("learned", "max_probability", "-entropy", "margin", "softplus", "bias", "keep", "keep_if_same", "logits")
"""What the nine numbers of an exit are, in their order; the first five are weights, the last one is `a`."""

log = logging.getLogger("eefast")


@dataclass(frozen=True)
class Rule:
    """A table, made by the functions of this module.

    name: of `criteria.CARRYING`, for plans, profiles and folders.
    rows: n + 1 rows of nine numbers, see `COLUMNS`, that are rounded to float32.
    Raises `ValueError` that names exit and column for what is no finite number, and for an exit 0 that reads an exit
    before.
    """

    name: str
    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if self.name not in criteria.CARRYING:
            raise ValueError(f"name={self.name!r} is unknown; choose one of {', '.join(criteria.CARRYING)}")
        if not self.rows or any(len(row) != len(COLUMNS) for row in self.rows):
            raise ValueError(f"rows have {[len(row) for row in self.rows]} numbers; give each exit {len(COLUMNS)}")
        rounded = torch.tensor(self.rows, dtype=torch.float32, device="cpu")
        for i, row in enumerate(self.rows):
            for column, value, kept in zip(COLUMNS, row, rounded[i].tolist(), strict=True):
                if not isfinite(kept):
                    raise ValueError(f"{column!r} of exit {i} is {value}; give a finite number, as float32 has them")
                if i == 0 and value != 0 and column in COLUMNS[-3:]:
                    raise ValueError(f"{column!r} of exit 0 is {value}, but there is no exit before it; give 0")
        object.__setattr__(self, "rows", tuple(map(tuple, rounded.tolist())))

    @property
    def num_exits(self) -> int:
        """Number of early exits."""
        return len(self.rows) - 1

    def table(self) -> Tensor:
        """[n + 1, 9] float32, on the CPU."""
        return torch.tensor(self.rows, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class PythonRule:
    """A rule in Python, for the reference and the compact engine; it cannot be saved.

    name: none of the others. step: (exit, logits [N, K], confidence row [N], L [N, K], s [N]) → L and s, float32, of N
    images, where L and s given are those of the exit before and mean nothing at exit 0. An image exits where
    s > threshold. It may be called by several threads at once, for any images: all state is in L and s.
    default_threshold: where a network is built without thresholds.
    """

    name: str
    step: criteria.Step
    default_threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.name in criteria.CRITERIA or self.name in criteria.CARRYING or self.name == "":
            raise ValueError(f"name={self.name!r} is another rule's; take one that is free")

    @property
    def criterion(self) -> criteria.Criterion:
        return criteria.Criterion(
            self.name, criteria.carried_confidence, ">", self.default_threshold, carries=True, step=self.step
        )


def read(name: str, table: Tensor, num_exits: int) -> Rule:
    """The rule of a table [n + 1, 9] float32; `ValueError` as `Rule`, and for another shape or dtype."""
    shape = (num_exits + 1, len(COLUMNS))
    if table.shape != shape or table.dtype != torch.float32:
        raise ValueError(f"the rule is {table.dtype} of shape {list(table.shape)}; expected float32 of {list(shape)}")
    return Rule(name, tuple(map(tuple, table.tolist())))


def named(name: str, num_exits: int) -> Rule:
    """The rule of this name that needs no fitted numbers; `ValueError` where it does."""
    if name == "patience":
        return patience(num_exits)
    if name == "vote":
        return vote([1.0] * (num_exits + 1))
    if name == "survival":
        return survival(num_exits)
    criteria.get(name)
    raise ValueError(
        f"criterion={name!r} needs numbers for every exit; give eefast.rules.{name}(…), or fit them on held-out images "
        "by `eefast calibrate`"
    )


def patience(num_exits: int) -> Rule:
    """Counts exits in a row that say the same class (PABEE, Zhou et al. 2020); see `patience_thresholds`."""
    return _rule("patience", num_exits, bias=1.0, keep_if_same=1.0)


def vote(weights: Sequence[float]) -> Rule:
    """Adds up weight · p1 for as long as neighbouring exits say the same class (BEEM); see `vote_thresholds`.

    weights: n + 1, above 0.
    """
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"weights={list(weights)} must be above 0")
    return _rule("vote", len(weights) - 1, max_probability=weights, keep_if_same=1.0)


def survival(num_exits: int) -> Rule:
    """Takes −log ∏ (1 − σ(z)) over all exits so far (NACHOS' cumulative confidence); see `survival_thresholds`."""
    return _rule("survival", num_exits, softplus=1.0, keep=1.0)


def carried(logits: Sequence[float]) -> Rule:
    """Largest probability of logits that add up: L = l + a · L' (ZTW's geometric ensembles; boosted heads: all 1).

    logits: a of exits 0 … n, that of exit 0 being 0.
    """
    return _rule("carried", len(logits) - 1, max_probability=1.0, logits=logits)


def fitted(
    weights: Sequence[Sequence[float]],
    bias: Sequence[float],
    *,
    keep: Sequence[float] | float = 0.0,
    keep_if_same: Sequence[float] | float = 0.0,
    logits: Sequence[float] | float = 0.0,
) -> Rule:
    """Any numbers, as of a logistic regression of "this exit is right", whose s is above 0 where that is likelier.

    weights: [n + 1][5], see the top. The others: [n + 1], or one number for all exits but the first.
    """
    if any(len(row) != 5 for row in weights):
        raise ValueError(f"weights have {[len(row) for row in weights]} numbers; give each exit 5")
    columns = dict(zip(COLUMNS[:5], zip(*weights, strict=True), strict=True))
    more = {"keep": keep, "keep_if_same": keep_if_same, "logits": logits}
    return _rule("fitted", len(weights) - 1, **columns, bias=bias, **more)


def stateless(criterion: str, num_exits: int) -> Rule:
    """A criterion of `criteria.CRITERIA` as a table, whose s is its confidence, that of the entropy with a minus."""
    return _rule("fitted", num_exits, **{COLUMNS[list(criteria.CRITERIA).index(criterion)]: 1.0})


def patience_thresholds(patience: int, num_exits: int) -> list[float]:
    """Thresholds by which images exit once `patience` exits in a row have said what the one before them said."""
    if not patience >= 1:
        raise ValueError(f"patience={patience} must be at least 1, the number of exits that agree with the one before")
    if patience > num_exits - 1:
        _log_once(f"patience={patience} with {num_exits} early exits: no image exits early")
    return [patience + 0.5] * num_exits


def vote_thresholds(votes: float, num_exits: int) -> list[float]:
    """Thresholds by which images exit where the weights of agreeing exits reach `votes`."""
    if not votes > 0:
        raise ValueError(f"votes={votes} must be above 0")
    return [_just_below(votes)] * num_exits


def survival_thresholds(probability: float, num_exits: int) -> list[float]:
    """Thresholds by which images exit where 1 − ∏ (1 − σ(z)) reaches `probability`."""
    if not 0 < probability < 1:
        raise ValueError(f"probability={probability} must be between 0 and 1")
    return [_just_below(-log1p(-probability))] * num_exits


def _just_below(limit: float) -> float:
    """The largest float32 below `limit` in float32: above it is what is at least `limit`."""
    return float(torch.nextafter(torch.tensor(limit, dtype=torch.float32), torch.tensor(-inf)))


def _rule(name: str, num_exits: int, **columns: Sequence[float] | float) -> Rule:
    """Columns of n + 1 numbers, or one for all exits; of what reads the exit before, for all but the first."""
    found = []
    for column in COLUMNS:
        given = columns.pop(column, 0.0)
        try:
            values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{column!r} is {given!r} ({error}); give a number, or one per exit") from error
        if values.dim() == 0:
            values = values.repeat(num_exits + 1)
            values[0] = 0 if column in COLUMNS[-3:] else values[0]
        if values.shape != (num_exits + 1,):
            raise ValueError(f"{column!r} has {values.numel()} numbers for {num_exits + 1} exits; give one per exit")
        found.append(values.tolist())
    return Rule(name, tuple(zip(*found, strict=True)))


@cache
def _log_once(message: str) -> None:
    log.warning(message)
