"""Files of rows: what is written comes back, and only whole files of the same manifest count."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')
from pyarrow.parquet import read_table

from eefast.scoring import part_files
from eefast.scoring.part_files import Rows, Totals


def made(logits: int | None) -> Rows:
    rows = Rows(5, 3, logits)
    rows.ids = ["a", "b", "ü/c", "d", "e"]
    where = np.array([0, 2, 3, 4])
    rows.label[where], rows.exit[where] = [4, 0, 1, 2], [0, 2, 2, 0]
    rows.confidence[where], rows.cost[where] = [0.5, 0.25, 0.1, np.nan], [0.125, 1.0, 1.0, 0.125]
    rows.answered[where] = True
    rows.errors[1] = "it is empty"
    if rows.logits is not None:
        rows.logits[where] = np.arange(8).reshape(4, 2)
    return rows


@pytest.mark.parametrize("logits", [None, 2])
def test_rows_come_back(tmp_path: Path, logits: int | None) -> None:
    totals = part_files.write(tmp_path, 17, "abc", made(logits))
    assert totals == Totals(5, 1, 2.25, (2, 0, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["part-00017.parquet"]
    found = read_table(tmp_path / "part-00017.parquet").to_pydict()
    assert found["id"] == ["a", "b", "ü/c", "d", "e"]
    assert found["label"] == [4, None, 0, 1, 2]
    assert found["exit"] == [0, None, 2, 2, 0]
    assert found["cost"] == [0.125, None, 1.0, 1.0, 0.125]
    assert found["confidence"][:4] == [0.5, None, 0.25, np.float32(0.1)]
    assert np.isnan(found["confidence"][4])
    assert found["error"] == [None, "it is empty", None, None, None]
    assert found.get("logits") == (None if logits is None else [[0, 1], None, [2, 3], [4, 5], [6, 7]])
    assert part_files.read_totals(tmp_path, 17, "abc") == totals


def test_only_whole_files_of_this_manifest_count(tmp_path: Path) -> None:
    part_files.write(tmp_path, 3, "abc", made(None))
    assert part_files.read_totals(tmp_path, 3, "abd") is None
    assert part_files.read_totals(tmp_path, 4, "abc") is None
    path = part_files.path_of(tmp_path, 3)
    content = path.read_bytes()
    part_files.path_of(tmp_path, 4).write_bytes(content)
    assert part_files.read_totals(tmp_path, 4, "abc") is None
    for damaged in (content[:-1], content[: len(content) // 2], b""):
        path.write_bytes(damaged)
        assert part_files.read_totals(tmp_path, 3, "abc") is None


def test_what_killed_processes_left_is_removed_of_these_shards_only(tmp_path: Path) -> None:
    names = ["part-00003.parquet.0123abcd.partial", "part-00004.parquet.0123abcd.partial", "part-x.partial", "part-3"]
    for name in names:
        (tmp_path / name).touch()
    part_files.remove_partial(tmp_path, {3, 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
