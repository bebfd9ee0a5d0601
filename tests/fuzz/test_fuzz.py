"""5,000 rows of random networks; `make fuzz` takes a million."""

import pytest
from fuzz_check import Case, Found, check

PARTS, ROWS = 4, 5_000


@pytest.fixture(autouse=True)
def poison_fresh_memory():
    """Filling every fresh tensor with NaN takes longer than the checks; the other tests do it."""


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks_called_in_random_ways(part):
    found, seed = Found(), part * 1000
    while found.rows < ROWS / PARTS:
        found.add(check(Case(seed)))
        seed += 1
    assert not found.problems, "\n".join(found.problems)
