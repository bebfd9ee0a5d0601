"""Costs of the answers so far → the row of a path of thresholds that keeps the mean cost at a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from .. import criteria
from ..result import ExitOutput, ExitResult
from ..thresholds.cuts import Cuts
from ..thresholds.outputs import outcome
from ..thresholds.path import accurate_to_cheap


class BudgetController:
    """Keeps the mean cost of a stream of batches at a target while its images drift, without labels.

    Integral control of one number, the setpoint: the cost that the rows of the path had on known images. Each image
    moves it against its excess, setpoint ← setpoint - (cost - target) / images, and the row whose known cost is nearest
    answers the next batch. As long as the setpoint is not at an end of the path, the mean cost of N images differs from
    the target by |setpoint at the end - at the start| · images / N exactly, however they drift. At an end it stays (no
    windup), so that it answers at once when the target can be reached again. The same answers give the same rows.

    thresholds: the row for the next batch, [n] float32, on the CPU: `fast(x, thresholds=controller.thresholds)`.
    setpoint: see above; row: the index of `thresholds` in the path.
    """

    def __init__(self, path: Tensor, costs: Sequence[float] | Tensor, target: float, images: int = 1000) -> None:
        """path: [M, n], rows of thresholds; costs: [M], the mean cost of each on known images.

        target: mean cost to be kept, within `costs`, but for a millionth, since these are rounded; images: after about
        how many the setpoint has made up for a change of the images: the fewer, the faster, and the more it follows
        chance. A batch of more counts as that many.
        Raises `ValueError` for shapes that do not fit, for NaN, and for a target out of reach.
        """
        self.path = torch.as_tensor(path, dtype=torch.float32, device="cpu").clone()
        self.costs = torch.as_tensor(costs, dtype=torch.float64, device="cpu").clone()
        if self.path.dim() != 2 or not len(self.path) or self.costs.shape != self.path.shape[:1]:
            raise ValueError(
                f"path has shape {tuple(self.path.shape)}, costs {tuple(self.costs.shape)}; give [M, n] thresholds and "
                "[M] costs, at least one"
            )
        if self.path.isnan().any():
            raise ValueError("path holds a NaN; thresholds are numbers or infinite")
        if not self.costs.isfinite().all():
            raise ValueError("costs holds a number that is not finite; give the mean cost of every row")
        low, high = self.costs.min().item(), self.costs.max().item()
        rounding = 1e-6 * max(abs(low), abs(high))
        if not low - rounding <= target <= high + rounding:
            raise ValueError(f"target={target} is out of reach; the rows of the path cost {low:.4f} … {high:.4f}")
        if not 1 <= images < inf:
            raise ValueError(f"images={images} must be at least 1, and finite")
        self.target, self.images, self._ends = float(target), images, (low, high)
        self.setpoint = min(max(self.target, low), high)
        self._exit_costs: Tensor | None = None

    @classmethod
    def from_outputs(
        cls,
        outputs: Sequence[ExitOutput],
        labels: Tensor | None,
        cost: Tensor,
        criterion: str,
        target: float,
        images: int = 1000,
    ) -> BudgetController:
        """With the path from no early exit to the lowest cost on held-out images.

        outputs, labels, cost, criterion: as `thresholds.calibration.calibrate` takes them, outputs of a criterion that
            carries by `thresholds.outputs.answered`; target, images: see above. `cost`, be it `EarlyExitNet.cost` or
            `path_cost`, is also what `update` counts for the exits that were taken.
        """
        labels = outputs[-1].logits.argmax(dim=1) if labels is None else labels
        path = accurate_to_cheap(Cuts(outputs, labels, cost, criterion), criteria.get(criterion))
        costs = [outcome(outputs, labels, cost, criterion, row)[1] for row in path.tolist()]
        controller = cls(path, costs, target, images)
        controller._exit_costs = cost.double().cpu().clone()
        return controller

    @property
    def row(self) -> int:
        return int((self.costs - self.setpoint).abs().argmin())

    @property
    def thresholds(self) -> Tensor:
        return self.path[self.row].clone()

    def update(self, result: ExitResult) -> None:
        """Count the answers to a batch; results of a GPU are waited for. `ValueError` for costs that are not finite."""
        if not len(result.cost):
            return
        spent = result.cost if self._exit_costs is None else self._exit_costs[result.exit_index.cpu()]
        excess = spent.double().mean().item() - self.target
        if not isfinite(excess):
            raise ValueError("result.cost holds a number that is not finite; give the result of a network")
        moved = self.setpoint - excess * min(len(result.cost) / self.images, 1)
        self.setpoint = min(max(moved, self._ends[0]), self._ends[1])

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on in another process, for JSON; without the path."""
        return {"setpoint": self.setpoint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a controller with the same path; `ValueError` for another state."""
        setpoint = state.get("setpoint")
        low, high = self._ends
        if not isinstance(setpoint, int | float) or isinstance(setpoint, bool) or not low <= setpoint <= high:
            raise ValueError(
                f"setpoint={setpoint} is not one of this path, whose rows cost {low:.4f} … {high:.4f}; give the "
                "state_dict() of a controller with this path"
            )
        self.setpoint = float(setpoint)
