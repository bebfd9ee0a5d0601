"""Tables: Markdown with columns of words and of numbers, and columns that line up."""

import pytest

from eefast.measure import tables

TITLES, ROWS = ["name", "images/s"], [["compact", "1,200"], ["a", "7"]]


@pytest.mark.parametrize(
    ("left", "edges"), [(1, "|---|---:|"), (2, "|---|---|"), (0, "|---:|---:|"), (None, "|---|---|")]
)
def test_the_first_columns_go_to_the_left(left, edges):
    assert tables.markdown(TITLES, ROWS, left) == [
        "| name | images/s |",
        edges,
        "| compact | 1,200 |",
        "| a | 7 |",
    ]


def test_columns_line_up():
    assert tables.aligned(TITLES, ROWS) == [
        "| name    | images/s |",
        "|---------|----------|",
        "| compact | 1,200    |",
        "| a       | 7        |",
    ]


def test_columns_with_a_number_go_to_the_right():
    """A title with a digit, or a cell with one further back, is no number; empty cells do not decide."""
    titles, rows = ["1st", "speed", "dtype"], [["a", "", "float32"], ["bb", "12 ± 3", "int8"]]
    assert tables.aligned(titles, rows, numbers=True) == [
        "| 1st |  speed | dtype   |",
        "|-----|-------:|---------|",
        "| a   |        | float32 |",
        "| bb  | 12 ± 3 | int8    |",
    ]


def test_a_table_without_rows_has_its_titles():
    assert tables.markdown(TITLES, []) == ["| name | images/s |", "|---|---:|"]
    assert tables.aligned(TITLES, [], numbers=True) == ["| name | images/s |", "|------|----------|"]


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        tables.aligned(TITLES, [["alone"]])
