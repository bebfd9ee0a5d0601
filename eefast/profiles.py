"""Named rows of thresholds, thresholds of a call and last exits → the limits by which each image of a call exits.

Limits are [n] float32, the same for all images, or [n, N], those of each; there NaN lets an image exit at that exit,
whatever its confidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import isnan, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Profile(NamedTuple):
    """thresholds: one per early exit; last_exit: where an image exits at the latest, None: at the final exit.

    criterion: name of that of the thresholds, None: that of whatever network gets them.
    """

    thresholds: tuple[float, ...]
    last_exit: int | None = None
    criterion: str | None = None


class Profiles(Mapping[str, Profile]):
    """An immutable table of profiles by name; ids number them in this order.

    Values are a `Profile`, a `Calibration`, or thresholds. Raises `ValueError` for thresholds that are no row of
    numbers, of different numbers of them, for NaN, for values of two criteria, and for a last exit that there is not;
    `TypeError` for a name that is no text.
    criterion: of the values that have one, and so of all; None: of whatever network gets the table.
    """

    def __init__(self, profiles: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        found: dict[str, Profile] = {}
        criteria: dict[str, str] = {}
        for name, value in {**(profiles or {}), **named}.items():
            if not isinstance(name, str):
                raise TypeError(f"a profile's name is {name!r}; give a text, such as {str(name)!r}")
            if getattr(value, "criterion", None):
                criteria[value.criterion] = name
            row = _row_of(name, value.thresholds if hasattr(value, "thresholds") else value)
            last_exit = getattr(value, "last_exit", None)
            if last_exit is not None and last_exit not in range(len(row) + 1):
                raise ValueError(f"profile {name!r} has last_exit={last_exit}; exits are 0 … {len(row)}")
            found[name] = Profile(row, None if last_exit is None else int(last_exit))
        if len(criteria) > 1:
            raise ValueError(
                f"profiles of two criteria, {', '.join(f'{name!r} of {c}' for c, name in criteria.items())}; a network "
                "has one"
            )
        if len({len(profile.thresholds) for profile in found.values()}) > 1:
            counts = [len(profile.thresholds) for profile in found.values()]
            raise ValueError(f"profiles have {counts} thresholds; give each one per early exit")
        self.criterion: str | None = next(iter(criteria), None)
        self._profiles = {name: profile._replace(criterion=self.criterion) for name, profile in found.items()}
        self._tables: dict[torch.device, _Table] = {}

    def __getitem__(self, name: str) -> Profile:
        return self._profiles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._profiles)

    def __len__(self) -> int:
        return len(self._profiles)

    def __repr__(self) -> str:
        return f"Profiles({self._profiles})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def check_fit(self, num_exits: int, criterion: str) -> None:
        """`ValueError` unless a network of this criterion and number of early exits can use these profiles."""
        for name, profile in self.items():
            if len(profile.thresholds) != num_exits:
                raise ValueError(
                    f"profile {name!r} has {len(profile.thresholds)} thresholds, the network {num_exits} early exits"
                )
        self.check_criterion(criterion)

    def check_criterion(self, criterion: str) -> None:
        """`ValueError` for thresholds of another criterion."""
        if self.criterion not in (None, criterion):
            raise ValueError(f"the profiles are of criterion {self.criterion!r}, the network has {criterion!r}")

    def of(self, criterion: str) -> Profiles:
        """The same table, of a criterion if it had none."""
        if self.criterion is not None:
            return self
        return Profiles({name: profile._replace(criterion=criterion) for name, profile in self.items()})

    def on(self, device: torch.device) -> _Table:
        """The limits of all profiles, on a device."""
        if device not in self._tables:
            rows = [_cut(torch.tensor(p.thresholds, dtype=torch.float32), p.last_exit) for p in self.values()]
            with torch.inference_mode(False):
                columns = torch.stack(rows, dim=1).to(device)
                limits = columns.T.contiguous().unbind(0)
            found = [
                Limits(row, row) if p.last_exit is None else Limits(row[:, None], OF_EACH)
                for row, p in zip(limits, self.values(), strict=True)
            ]
            self._tables[device] = _Table(columns, tuple(found), dict(zip(self, found, strict=True)))
        return self._tables[device]


INDICES = (torch.int32, torch.int64)

OF_EACH = object()
"""What `Batch.since` is where every image has its limits."""


class Limits(NamedTuple):
    """limits: [n] or [n, N]; since: the same object for as long as batches may run together, see `engines.Batch`."""

    limits: Tensor
    since: object


class _Table(NamedTuple):
    """Limits, NaN from a last exit on.

    columns: [n, P]; rows, named: those of each profile for all images of a call, [n], or [n, 1] with a last exit.
    """

    columns: Tensor
    rows: tuple[Limits, ...]
    named: Mapping[str, Limits]


def limits_of_call(
    profiles: Profiles,
    num_exits: int,
    criterion: str,
    current: tuple[Tensor, object] | None,
    device: torch.device,
    count: int,
    profile: str | Tensor | None,
    thresholds: Tensor | Sequence[float] | None,
    exit_limit: int | Tensor | Sequence[int] | None,
) -> Limits:
    """The limits of a call on `count` images, which are on `device`.

    profiles, num_exits, criterion: of the network; current: its thresholds, and their `since`; not looked at where the
        call has a profile or thresholds.
    profile, thresholds, exit_limit: see `EarlyExitNet.forward`.
    Raises `ValueError` or `TypeError` that names the argument; what is on a GPU is checked there, without a wait of the
    host, by a kernel that stops.
    """
    if profile is not None and thresholds is not None:
        raise ValueError("profile and thresholds are both given; give one of them")
    if thresholds is not None:
        found = _given(thresholds, num_exits, count, device)
    elif profile is not None:
        profiles.check_criterion(criterion)
        found = _named(profiles, profile, count, device)
    else:
        assert current is not None
        found = Limits(*current)
    if exit_limit is None or num_exits == 0:
        return found
    ends = _columns_of("exit_limit", _ends(num_exits, device), exit_limit, count)
    limits = found.limits if found.limits.dim() == 2 else found.limits[:, None]
    return Limits((limits + ends).expand(-1, count), OF_EACH)


def _row_of(name: str, numbers: Any) -> tuple[float, ...]:
    """The thresholds of the profile `name`, rounded to float32."""
    try:
        values = torch.as_tensor(numbers, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"profile {name!r} has the thresholds {numbers!r} ({error}); give one number per early exit"
        ) from error
    if values.dim() != 1:
        raise ValueError(f"profile {name!r} has the thresholds {values.tolist()}; give a list, one per early exit")
    row = tuple(values.tolist())
    if any(map(isnan, row)):
        raise ValueError(f"profile {name!r} has the thresholds {list(row)}; none of them may be NaN")
    return row


def _cut(row: Tensor, last_exit: int | None) -> Tensor:
    """Limits that let everything exit at `last_exit`."""
    return row if last_exit is None else torch.cat([row[:last_exit], torch.full_like(row[last_exit:], nan)])


def _named(profiles: Profiles, profile: str | Tensor, count: int, device: torch.device) -> Limits:
    if not profiles:
        raise ValueError(f"profile={profile!r}, but the network has no profiles; set net.profiles")
    table, row = profiles.on(device), None
    if isinstance(profile, str):
        row = table.named.get(profile)
        if row is None:
            raise ValueError(f"profile={profile!r} is unknown; the network has {', '.join(profiles)}")
    elif count == 1 and _is_one_index(profile):  # an op would take as long as all the rest
        place = profile.item()
        row = table.rows[int(place)] if 0 <= place < len(table.rows) else None
    if row is None:
        return Limits(_columns_of("profile", table.columns, profile, count).expand(-1, count), OF_EACH)
    return row if count == 1 or row.limits.dim() == 1 else Limits(row.limits.expand(-1, count), OF_EACH)


def _is_one_index(values: Any) -> bool:
    """Whether this is one index, which the host can read without waiting for a GPU."""
    return isinstance(values, Tensor) and values.is_cpu and values.dtype in INDICES and values.shape == (1,)


def _given(thresholds: Tensor | Sequence[float], num_exits: int, count: int, device: torch.device) -> Limits:
    values = _as_tensor("thresholds", thresholds, "numbers, one per early exit", torch.float32)
    if values.shape not in ((num_exits,), (count, num_exits)):
        raise ValueError(
            f"thresholds has shape {tuple(values.shape)}; expected ({num_exits},) or one row per image, "
            f"({count}, {num_exits})"
        )
    if isinstance(thresholds, Tensor) and thresholds.is_cuda and thresholds.device != device:
        raise ValueError(f"thresholds is on {thresholds.device}, the images are on {device}; move one of them")
    if not values.is_cuda and values.isnan().any():
        raise ValueError("thresholds holds a NaN; for an exit that every image takes give exit_limit")
    # A copy: no later change reaches an answer under way.
    values = values.detach().to(device, copy=True)
    return Limits(values, values) if values.dim() == 1 else Limits(values.T.contiguous(), OF_EACH)


def _as_tensor(name: str, values: Any, wanted: str, dtype: torch.dtype | None = None) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}={values!r} is no tensor ({error}); give {wanted}") from error


@cache
def _ends(num_exits: int, device: torch.device) -> Tensor:
    """[n, n + 1]: what limits get added so that an image exits at exit 0 … n at the latest: 0, from there on NaN."""
    with torch.inference_mode(False):
        exits = torch.arange(num_exits + 1)
        ends = torch.zeros(num_exits, num_exits + 1, dtype=torch.float32)
        return ends.masked_fill(exits[:-1, None] >= exits, nan).to(device)


def _columns_of(name: str, table: Tensor, values: Any, count: int) -> Tensor:
    """The columns of a table [n, M] that the indices `values` name, [n, count], or [n, 1] for one index for all."""
    indices = _as_tensor(name, values, "int32 or int64, one per image")
    if not isinstance(values, Tensor) and not indices.numel():  # an empty list has no dtype
        indices = indices.long()
    if indices.dtype not in INDICES:
        raise TypeError(f"{name} is {indices.dtype}; give int32 or int64, one per image")
    if indices.dim() and indices.shape != (count,):
        raise ValueError(f"{name} has shape {tuple(indices.shape)} for {count} images; give one number per image")
    if indices.device != table.device:
        if isinstance(values, Tensor) and indices.dim():
            raise ValueError(
                f"{name} is on {indices.device}, the images are on {table.device}; move it with "
                f".to({str(table.device)!r})"
            )
        _check_range(name, indices, table)  # before it is on a GPU, where the host would wait
        indices = indices.to(table.device)
    try:
        return table.index_select(1, indices)
    except (IndexError, RuntimeError):
        _check_range(name, indices, table)
        raise


def _check_range(name: str, indices: Tensor, table: Tensor) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < table.shape[1]:
        raise ValueError(
            f"{name} reaches from {int(indices.min())} to {int(indices.max())}; it must be in 0 … {table.shape[1] - 1}"
        )
