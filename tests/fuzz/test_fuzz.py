"""2,000 rows of random networks; `make test-all` takes 5,000, `make fuzz` a million."""

import pytest
from fuzz_check import Case, Found, check

PARTS, ROWS = 5, 1_000
"""Of which `make test` takes two parts; rows of each."""


@pytest.fixture(autouse=True)
def poison_fresh_memory():
    """Filling every fresh tensor with NaN takes longer than the checks; the other tests do it."""


@pytest.mark.parametrize("part", [pytest.param(i, marks=[pytest.mark.slow] * (i > 1)) for i in range(PARTS)])
def test_random_networks_called_in_random_ways(part):
    found, seed = Found(), part * 1000
    while found.rows < ROWS:
        found.add(check(Case(seed)))
        seed += 1
    assert not found.problems, "\n".join(found.problems)
