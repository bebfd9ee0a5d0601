"""Confidence and cost of the answers so far → the profile that answers the next batch."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite, log, sqrt
from random import Random
from typing import Any

from .. import criteria
from ..profiles import Profiles
from ..result import ExitResult


class UCB:
    """A bandit over profiles that seeks the largest mean of confidence - price · cost, without labels.

    UCB1 as in SplitEE and UEE-UCB (Bajpai et al.), for a batch at a time: at first each profile is tried once, then
    `choose` takes the one with the largest mean reward + bonus · √(ln T / T_p), T images in all, T_p of this profile.
    The seed orders the profiles, for the first tries and for ties.

    The reward trusts the confidence: where a network grows overconfident as images drift, wrong answers are rewarded,
    as docs/exit-rules.md measures. All images count alike, those before a drift too: take a new bandit after one.
    """

    def __init__(self, profiles: Profiles, price: float, bonus: float = 1.0, seed: int = 0) -> None:
        """profiles: of the network; price: of a cost of 1, in confidence; bonus: for profiles that are little known.

        Raises `ValueError` without profiles, for those of a criterion in which less means surer, and for a price or a
        bonus that is negative or not finite.
        """
        if not profiles:
            raise ValueError("profiles is empty; give at least one to choose from")
        criterion = profiles.criterion
        if criterion is not None and criteria.get(criterion).comparison == "<":
            surer = ", ".join(name for name, rule in criteria.CRITERIA.items() if rule.comparison == ">")
            raise ValueError(
                f"profiles are of criterion {criterion!r}, which is no confidence in 0 … 1; take one of {surer}"
            )
        for name, value in (("price", price), ("bonus", bonus)):
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be finite and at least 0")
        self.price, self.bonus = price, bonus
        names = sorted(profiles)
        self._order = Random(seed).sample(names, len(names))
        self._chosen: str | None = None
        self._images = dict.fromkeys(self._order, 0)
        self._reward = dict.fromkeys(self._order, 0.0)

    def choose(self) -> str:
        """The name of the profile for the next batch; the same until an update."""
        total = sum(self._images.values())

        def index(name: str) -> float:
            images = self._images[name]
            return self._reward[name] / images + self.bonus * sqrt(log(total) / images) if images else inf

        self._chosen = max(self._order, key=index)
        return self._chosen

    def update(self, result: ExitResult, profile: str | None = None) -> None:
        """Count the answers to a batch; results of a GPU are waited for.

        profile: that answered it, where it is not the one that was chosen last.
        Raises `ValueError` for an unknown profile, for confidences that are not in 0 … 1, and for costs that are not
        finite.
        """
        name = self._chosen if profile is None else profile
        if name is None:
            raise ValueError("no profile has been chosen; call choose first, or name the profile that answered")
        if name not in self._images:
            raise ValueError(f"profile={name!r} is unknown; choose one of {', '.join(self._order)}")
        outside = ~((result.confidence >= 0) & (result.confidence <= 1))
        if outside.any():
            raise ValueError(
                f"{int(outside.sum())} of {len(outside)} confidences are not in 0 … 1, such as "
                f"{result.confidence[outside][0].item():.4f}; use another criterion, and leave out images with NaN"
            )
        if not result.cost.isfinite().all():
            raise ValueError("result.cost holds a number that is not finite; give the result of a network")
        self._images[name] += len(result.confidence)
        self._reward[name] += (result.confidence.double() - self.price * result.cost.double()).sum().item()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on in another process, for JSON; without price and bonus."""
        return {
            "order": list(self._order),
            "chosen": self._chosen,
            "images": dict(self._images),
            "reward": dict(self._reward),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a bandit over profiles of the same names; `ValueError` for another state."""
        values: list[Any] = [state.get(key) for key in ("order", "chosen", "images", "reward")]
        order, chosen, images, reward = values
        known, parts = sorted(self._order), (order, images, reward)
        whole = isinstance(order, list | tuple) and isinstance(images, Mapping) and isinstance(reward, Mapping)
        if not (whole and all(sorted(part, key=str) == known for part in parts)):
            raise ValueError(f"the state is of the profiles {order}, this bandit chooses from {known}")
        counted = all(type(n) is int and n >= 0 for n in images.values())
        if not (counted and chosen in (None, *known) and all(map(_is_finite, reward.values()))):
            raise ValueError(
                f"the state has chosen={chosen!r}, images={images}, reward={reward}; give the state_dict() of a bandit "
                "over these profiles"
            )
        self._order, self._chosen = list(order), chosen
        self._images, self._reward = dict(images), dict(reward)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)
