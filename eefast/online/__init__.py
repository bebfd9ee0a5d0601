"""Answers of one batch after the other, without labels → thresholds or the profile of the next batch."""

from .bandit import UCB
from .budget import BudgetController

__all__ = ["UCB", "BudgetController"]
