"""Rows of networks on a GPU, and what the bench shows of them."""

from dataclasses import asdict, replace

from rows import NetworkRow
from summary import show

ON_A_GPU = {"device": "some GPU", "cuda": "13.0", "date": "2026-11-26"}


def row_of(provider, speed, **fields):
    row = NetworkRow("eenet50", provider, 256, "float16", (0.5, 0.5), True, images_per_s=(speed,) * 3, mean_cost=0.4)
    return replace(row, setting="cost 0.4", **fields)


def shown(*found):
    return show([{**asdict(row), "environment": ON_A_GPU} for row in found])
