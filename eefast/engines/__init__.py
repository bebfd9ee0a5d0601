"""The engines: functions that run a plan on a batch; all of them give the same answers."""

from . import compact, reference

RUN = {"compact": compact.run, "reference": reference.run}

__all__ = ["RUN"]
