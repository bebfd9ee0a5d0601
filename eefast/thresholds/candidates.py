"""The name of an exit rule and outputs on held-out data → the rule with its numbers, and outputs as it judges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import criteria, rules
from ..model import EarlyExitNet
from ..result import ExitOutput
from . import fitting
from .outputs import carried, check_labels
from .scaling import Scaling, scaled

ALL = (*criteria.CRITERIA, *criteria.CARRYING)


@dataclass(frozen=True)
class Candidate:
    """An exit rule for which thresholds can be chosen.

    criterion: what `EarlyExitNet.with_criterion` takes.
    scaling: what `fold_scaling` must have put into the heads; None: nothing.
    """

    criterion: str | rules.Rule | rules.PythonRule
    scaling: Scaling | None = None

    @property
    def name(self) -> str:
        """By which `calibration.calibrate` judges `outputs`."""
        if isinstance(self.criterion, rules.PythonRule):
            return "carried"
        return self.criterion if isinstance(self.criterion, str) else self.criterion.name

    def outputs(self, outputs: Sequence[ExitOutput]) -> list[ExitOutput]:
        """What `calibration.calibrate` takes, of the outputs of the network as it is."""
        seen = list(outputs) if self.scaling is None else scaled(outputs, self.scaling)
        return seen if isinstance(self.criterion, str) else carried(seen, self.criterion)


def candidate_of(net: EarlyExitNet, name: str) -> Candidate:
    """The criterion as it is, that of the network with its numbers; `ValueError` for another one that carries."""
    if name == net.criterion.name:
        return Candidate(net.exit_rule)
    if criteria.get(name).carries:
        raise ValueError(
            f"criterion={name!r}: this network has no numbers for it; eefast calibrate --criterion {name} --save gives "
            "it some"
        )
    return Candidate(name)


def make_candidate(name: str, outputs: Sequence[ExitOutput], labels: Tensor) -> Candidate:
    """The rule of this name: "carried" and "fitted" are fitted, "vote" weighs each exit by its accuracy here.

    outputs, labels: of n + 1 exits on held-out samples. Raises `ValueError` for unknown names, and as `fit_rule`.
    """
    check_labels(labels, len(outputs[0].logits))
    if name in criteria.CRITERIA:
        return Candidate(name)
    if name == "carried":
        rule, scaling = fitting.fit_rule(outputs, labels)
        changes = any(t != 1 for t in scaling.temperature) or any(map(any, scaling.bias))
        return Candidate(rule, scaling if changes else None)
    if name == "fitted":
        return Candidate(fitting.fit_weights(outputs, labels))
    if name == "vote":
        accuracy = [float((out.logits.argmax(dim=1) == labels).double().mean()) for out in outputs]
        return Candidate(rules.vote([max(a, 1 / len(labels)) for a in accuracy]))
    return Candidate(rules.named(name, len(outputs) - 1))
