"""The options of a budget and criteria → the best thresholds of each criterion within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..system.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import EarlyExitNet
    from ..result import ExitOutput
    from ..thresholds.calibration import Calibration
    from ..thresholds.candidates import Candidate


def read_budget(**bounds: float | None) -> tuple[str, float]:
    """The one bound that was given as (name, value), or the default; `ValueError` for several, or outside 0 … 1."""
    given = read_bounds(**bounds)
    if len(given) > 1:
        raise ValueError(f"{', '.join(f'{k}={v}' for k, v in given.items())}: give one of them")
    ((name, value),) = given.items()
    return name, value


def read_bounds(**bounds: float | None) -> dict[str, float]:
    """The bounds that were given, or the default; `ValueError` for two on the accuracy, or outside 0 … 1."""
    given = {name: value for name, value in bounds.items() if value is not None} or {"max_accuracy_drop": 0.005}
    if {"min_accuracy", "max_accuracy_drop"} <= given.keys():
        raise ValueError(f"{', '.join(f'{k}={v}' for k, v in given.items())}: give one of them for the accuracy")
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be in 0 … 1")
    return given


BOUND_NAMES = {"drop": "max_accuracy_drop", "accuracy": "min_accuracy", "cost": "max_cost"}


def read_profiles(texts: Sequence[str]) -> dict[str, tuple[dict[str, float], float | None]]:
    """Texts such as "normal:drop=0.005,cost=0.3@0.9" → by name the bounds, and the assurance or None.

    Raises `ValueError` for a text of another form, a name given twice, and bounds as `read_bounds`.
    """
    found: dict[str, tuple[dict[str, float], float | None]] = {}
    for text in texts:
        name, _, rest = text.partition(":")
        bounds, at, assurance = rest.partition("@")
        try:
            pairs = [pair.split("=") for pair in bounds.split(",")]
            given = {BOUND_NAMES[bound]: float(value) for bound, value in pairs}
            wanted = float(assurance) if at else None
        except (KeyError, ValueError):
            raise ValueError(
                f"--profile {text}: give NAME:BOUND=VALUE, with drop, accuracy or cost for BOUND, one on cost beside "
                "another with a comma, and with @0.9 an assurance: normal:drop=0.005@0.9"
            ) from None
        if not name or name in found:
            raise ValueError(f"--profile {text}: give each profile a name of its own")
        if wanted is not None and not 0 < wanted < 1:
            raise ValueError(f"--profile {text}: the assurance must be above 0 and below 1")
        found[name] = read_bounds(**given), wanted
    return found


def criterion_names(name: str, net: EarlyExitNet, fitting: bool = False) -> list[str]:
    """All criteria for "all", else the named one; for "" the one of the network.

    fitting: whether criteria that carry can be given their numbers; otherwise only the network's own has some.
    """
    from .. import criteria
    from ..thresholds.candidates import candidate_of

    if name == "all":
        return [*criteria.CRITERIA, *(criteria.CARRYING if fitting else ())]
    found = criteria.get(name or net.criterion.name).name
    return [found if fitting else candidate_of(net, found).name]


def fit_candidates(
    net: EarlyExitNet,
    outputs: Sequence[ExitOutput],
    labels: Tensor,
    names: Sequence[str],
    fit: bool,
    assurance: float | None,
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The criteria by name, and for each that cannot be fitted the reason; `ValueError` where that is all of them.

    fit: give criteria that carry new numbers; otherwise the network's keeps its own.
    assurance: with one, only the images that lay the path fit, so that the others still judge.
    """
    from .. import criteria
    from ..thresholds.candidates import candidate_of, make_candidate

    seen, answers = fitting_part(outputs, labels, assurance)
    found, impossible = {}, {}
    for name in names:
        try:
            new = fit and criteria.get(name).carries
            found[name] = make_candidate(name, seen, answers) if new else candidate_of(net, name)
        except ValueError as error:
            impossible[name] = str(error)
    if not found:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))
    return found, impossible


def fitting_part(
    outputs: Sequence[ExitOutput], labels: Tensor, assurance: float | None
) -> tuple[list[ExitOutput], Tensor]:
    """What numbers are fitted on: all images or, with an assurance, those that do not judge."""
    from ..thresholds import assured
    from ..thresholds.outputs import some

    if assurance is None:
        return list(outputs), labels
    fitting = assured.divided(len(labels))[0]
    return some(outputs, fitting), labels[fitting]


def least_images(bounds: Mapping[str, float] | None = None, assurance: float | None = None) -> int:
    """The number of held-out images that bounds need, see `calibration.least_images`."""
    from ..thresholds import calibration

    return calibration.least_images((bounds or {}).get("max_accuracy_drop"), assurance)


def choose_thresholds(
    net: EarlyExitNet,
    outputs: Sequence[ExitOutput],
    labels: Tensor | None,
    candidates: Mapping[str, Candidate],
    bounds: Mapping[str, float],
    progress: Progress,
    assurance: float | None = None,
) -> tuple[dict[str, Calibration], dict[str, str]]:
    """The best thresholds of each criterion within the bounds, and for each criterion without any the reason.

    outputs: of the network as it is; bounds, labels, assurance: as `calibration.calibrate` takes them.
    Raises `ValueError` where no criterion has any.
    """
    from ..thresholds import calibration

    calibration.check_bounds(bounds, assurance)
    chosen, impossible = {}, {}
    for i, (name, candidate) in enumerate(candidates.items()):
        progress("choosing thresholds", i, len(candidates))
        try:
            seen = candidate.outputs(outputs)
            chosen[name] = calibration.calibrate(seen, labels, net.cost, name, **bounds, assurance=assurance)
        except ValueError as error:
            impossible[name] = str(error)
    progress("choosing thresholds", len(candidates), len(candidates))
    if not chosen:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))
    return chosen, impossible
