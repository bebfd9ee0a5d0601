"""Ids that occur twice are found and named, and no others."""

import pytest

from eefast.scoring.unique_ids import UniqueIds


@pytest.mark.parametrize("names", [[], ["a"], [str(i) for i in range(5000)], ["ä", "a", "\udcff"]])
def test_different_ids_pass(names: list[str]) -> None:
    unique = UniqueIds()
    for name in names:
        unique.add(name)
    unique.check(lambda: pytest.fail("they need not be read again"), "")


def test_an_id_that_occurs_twice_is_named() -> None:
    unique, names = UniqueIds(), ["a", "b", "c", "b", "d"]
    for name in names:
        unique.add(name)
    with pytest.raises(ValueError, match="two images have the id 'b'; rename one"):
        unique.check(lambda: names, "rename one")
