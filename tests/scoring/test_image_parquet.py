"""Parquet files: contents of files and pixels, ids, row groups, wrong columns."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')
from pyarrow import parquet  # noqa: E402

from eefast.scoring.image_parquet import ImageParquet  # noqa: E402

SHAPE = (3, 2, 5)
PIXELS = np.random.default_rng(0).integers(0, 256, (23, *SHAPE), dtype=np.uint8)
CONTENTS = [bytes([i]) * i for i in range(23)]


def read(source: ImageParquet, shard_size: int, size: int) -> tuple[list[str], list, list[int]]:
    shards = source.plan(shard_size, BytesIO())
    chunks = [list(source.chunks(shard, size, Path("unused"))) for shard in shards]
    assert all(len(chunk.ids) <= size for some in chunks for chunk in some)
    assert [sum(len(chunk.ids) for chunk in some) for some in chunks] == [shard.count for shard in shards]
    whole = [chunk for some in chunks for chunk in some]
    return (
        [name for chunk in whole for name in chunk.ids],
        [i for chunk in whole for i in chunk.images],
        [shard.count for shard in shards],
    )


@pytest.mark.parametrize("groups", [1, 4, 100])
@pytest.mark.parametrize("shard_size", [5, 23])
@pytest.mark.parametrize("kind", ["binary", "struct", "list", "fixed"])
def test_rows_come_back(tmp_path: Path, kind: str, shard_size: int, groups: int) -> None:
    flat = PIXELS.reshape(23, -1)
    column = {
        "binary": lambda: pa.array(CONTENTS, pa.large_binary()),
        "struct": lambda: pa.array([{"bytes": content, "path": "x"} for content in CONTENTS]),
        "list": lambda: pa.array(flat.tolist(), pa.list_(pa.uint8())),
        "fixed": lambda: pa.array(flat.tolist(), pa.list_(pa.uint8(), flat.shape[1])),
    }[kind]()
    parquet.write_table(pa.table({"other": range(23), "image": column}), tmp_path / "x.parquet", row_group_size=groups)
    ids, images, counts = read(ImageParquet([tmp_path / "x.parquet"], "image", None, SHAPE), shard_size, 3)
    assert ids == [f"x.parquet:{i}" for i in range(23)]
    assert counts == [min(shard_size, 23 - start) for start in range(0, 23, shard_size)]
    if kind in ("binary", "struct"):
        assert images == CONTENTS
    else:
        assert np.array_equal(np.stack(images), PIXELS)


@pytest.mark.parametrize(("named", "values"), [("id", ["ä", "b", "c"]), ("key", [7, 8, 9])])
def test_ids_of_a_column(tmp_path: Path, named: str, values: list) -> None:
    table = pa.table({"picture": [b"1", None, b"3"], named: values})
    parquet.write_table(table, tmp_path / "x.parquet")
    source = ImageParquet([tmp_path / "x.parquet"], "picture", None if named == "id" else named, SHAPE)
    ids, images, _ = read(source, 2, 2)
    assert ids == list(map(str, values))
    assert images == [b"1", "there is no image in this row", b"3"]


def test_rows_with_another_number_of_pixels(tmp_path: Path) -> None:
    rows = [PIXELS[0].reshape(-1).tolist(), [1, 2, 3], None, [None] * 30]
    parquet.write_table(pa.table({"image": pa.array(rows, pa.list_(pa.uint8()))}), tmp_path / "x.parquet")
    _, images, _ = read(ImageParquet([tmp_path / "x.parquet"], "image", None, SHAPE), 9, 9)
    assert np.array_equal(images[0], PIXELS[0])
    assert images[1:3] == ["3 pixels, or some missing; the network takes 3 × 2 × 5", "there is no image in this row"]
    assert isinstance(images[3], str)


@pytest.mark.parametrize(
    ("columns", "more", "message"),
    [
        ({"image": [b""]}, {"image_column": "img"}, "no column 'img'; name one of image by --image-column"),
        ({"image": [b""]}, {"id_column": "key"}, "no column 'key'; name one of image by --id-column"),
        ({"image": ["text"]}, {}, "holds string; give the contents of image files"),
        ({"image": [[1, 2]]}, {}, "holds list<.*int64"),
        ({"image": [b""], "id": [1.5]}, {}, "the column 'id' of .* holds double; ids are texts or integers"),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: dict, more: dict, message: str) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        ImageParquet([tmp_path / "x.parquet"], **{"image_column": "image", "id_column": None, "shape": SHAPE, **more})


def test_wrong_channels(tmp_path: Path) -> None:
    column = pa.array([[0] * 20], pa.list_(pa.uint8(), 20))
    parquet.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"holds 20 pixels an image; the network takes 3 × 2 × 5"):
        ImageParquet([tmp_path / "x.parquet"], "image", None, SHAPE)


@pytest.mark.parametrize(
    ("ids", "message"),
    [(["a", "b", "a"], "two images have the id 'a'; name a column"), (["a", None, "b"], "has rows without an id")],
)
def test_wrong_ids(tmp_path: Path, ids: list, message: str) -> None:
    parquet.write_table(pa.table({"image": [b"", b"", b""], "id": ids}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        ImageParquet([tmp_path / "x.parquet"], "image", None, SHAPE).plan(2, BytesIO())


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=r"x\.parquet is no whole parquet file"):
        ImageParquet([tmp_path / "x.parquet"], "image", None, SHAPE)
