"""Rows of networks, and what the bench shows of them on a GPU or a CPU."""

from dataclasses import asdict, replace

from rows import NetworkRow
from summary import show

ON_A_GPU = {"device": "some GPU", "cuda": "13.0", "date": "2026-11-26"}


ON_A_CPU = {"device": "some CPU", "cuda": None, "threads": 2, "date": "2026-11-26"}


def row_of(provider, speed, **fields):
    row = NetworkRow("eenet50", provider, 256, "float16", (0.5, 0.5), True, images_per_s=(speed,) * 3, mean_cost=0.4)
    return replace(row, **{"setting": "cost 0.4", **fields})


def shown(*found, around=ON_A_GPU):
    return show([{**asdict(row), "environment": around} for row in found])
