"""The options of a search → one frozen value, checked: those of the training of all heads, and what is searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..criteria import CRITERIA, get
from ..heads import HEADS
from ..train.losses import WeightedSum
from ..train.options import FREE_TO_CHANGE, TrainOptions

NOT_READ = (
    "net", "num_exits", "placement", "head", "carry", "backbone", "self_labelled", "two_stage", "cost_weight",
    "max_accuracy_drop",
)  # fmt: skip


@dataclass(frozen=True)
class SearchOptions(TrainOptions):
    """What `eefast.search.run.search` is told, beside what training reads; `eefast search` has an option for each.

    network: a folder or file of a network that was trained, or a name: "eenet20" …, "torchvision:NAME", "timm:NAME".
    weights: file or folder with the weights of a backbone that is named, or the name of published ones, see there.
    kinds: of heads; each is tried at every place.
    exits: names of modules, or numbers of residual blocks, 0: the stem, after which heads are tried; empty: all.
    most_places: how many are tried where `exits` is empty, spread evenly by cost.
    freeze_backbone: train the heads only.
    other_data: take images, seed and held-out images as they are given, even if the network was trained on others.
    criteria: names of exit rules, of which the best is taken.
    max_cost: highest mean cost, heads included, as a share of the network's without exits.
    max_time: highest mean time on this machine, as a share of that network's; instead of max_cost.
    max_parameters: highest number of the network's parameters.
    Those in `NOT_READ` are for training only.

    A run that is resumed may have other limits and rules, which need no further training.
    """

    free_to_change: ClassVar[Sequence[str]] = (
        *FREE_TO_CHANGE, "max_cost", "max_time", "max_parameters", "criteria",
    )  # fmt: skip

    network: str | Path = "eenet32"
    kinds: Sequence[str] = ("pool", "conv1")
    most_places: int = 12
    freeze_backbone: bool = True
    epochs: int = 4
    output: str | Path = "runs/searched"
    criteria: Sequence[str] = tuple(CRITERIA)
    max_time: float | None = None
    max_parameters: int | None = None

    def _check_network(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(HEADS) or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds={list(self.kinds)}: give different kinds of heads, of {', '.join(HEADS)}")
        if not self.criteria:
            raise ValueError(f"criteria={list(self.criteria)}: give at least one of {', '.join(CRITERIA)}")
        for name in self.criteria:
            if name not in CRITERIA:
                get(name)  # raises for unknown names
                raise ValueError(
                    f"criteria={list(self.criteria)}: {name!r} reads earlier exits, too, so that its exits cannot be "
                    f"compared one by one; search by {', '.join(CRITERIA)}, then eefast calibrate --criterion {name}"
                )
        if self.max_cost is not None and self.max_time is not None:
            raise ValueError(f"max_cost={self.max_cost}, max_time={self.max_time}: give one of them")
        if self.max_cost is None and self.max_time is None and self.max_parameters is None:
            raise ValueError("no limit is given; give max_cost, max_time or max_parameters")
        for option in ("max_cost", "max_time", "max_parameters", "most_places"):
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise ValueError(f"{option}={value} must be above 0")

    def _check_frozen(self, loss: WeightedSum) -> None:
        """That there are weights is known once `network` is looked up."""
        if loss.uses_tags or loss.uses_teacher or loss.trains_final_alone:
            raise ValueError(
                f"loss={self.loss!r}: a search trains heads by labels and by the final exit, without exit tags and "
                "teacher; take terms such as deep_supervision, correctness, distillation"
            )

    def _check_teacher(self, loss: WeightedSum) -> None:
        if self.teacher is not None:
            raise ValueError(f"teacher={self.teacher!r}: the final exit teaches here; take loss + distillation")

    def record(self) -> dict[str, Any]:
        """As of training, without what is not read; of `network` the last part of its path."""
        found = {name: value for name, value in super().record().items() if name not in NOT_READ}
        return {**found, "network": Path(self.network).name}
