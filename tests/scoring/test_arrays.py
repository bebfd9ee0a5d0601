"""Files of pixels: layouts, dtypes, rows and ids of shards; wrong files."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from idx_files import idx_bytes

from eefast.scoring.arrays import Arrays

RANDOM = np.random.default_rng(0)


def read(source: Arrays, shard_size: int, size: int) -> tuple[list[str], np.ndarray, list[int]]:
    listing = BytesIO()
    shards = source.plan(shard_size, listing)
    chunks = [chunk for shard in shards for chunk in source.chunks(shard, size, Path("unused"))]
    assert all(len(chunk.ids) <= size for chunk in chunks)
    images = np.concatenate([chunk.images for chunk in chunks])
    return [name for chunk in chunks for name in chunk.ids], images, [shard.count for shard in shards]


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rows_come_back(tmp_path: Path, order: str, dtype: type) -> None:
    pixels = RANDOM.integers(0, 256, (31, 3, 5, 4)).astype(dtype)
    np.save(tmp_path / "x.npy", pixels if order == "NCHW" else pixels.transpose(0, 2, 3, 1).copy())
    ids, images, counts = read(Arrays([tmp_path / "x.npy"], (3, 5, 4)), 10, 4)
    assert ids == [str(i) for i in range(31)]
    assert counts == [10, 10, 10, 1]
    assert images.dtype == dtype
    assert np.array_equal(images, pixels)


def test_several_files_and_grey_images(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (9, 5, 4), dtype=np.uint8)
    (tmp_path / "a-images-idx3-ubyte").write_bytes(idx_bytes(pixels[:3]))
    np.save(tmp_path / "b.npy", pixels[3:])
    ids, images, counts = read(Arrays([tmp_path / "a-images-idx3-ubyte", tmp_path / "b.npy"], (1, 5, 4)), 4, 4)
    assert ids == [*(f"a-images-idx3-ubyte:{i}" for i in range(3)), *(f"b.npy:{i}" for i in range(6))]
    assert counts == [3, 4, 2]
    assert np.array_equal(images, pixels[:, None])


@pytest.mark.parametrize(("channels", "order"), [(6, "NCL"), (6, "NLC"), (1, "NCL"), (1, "NL")])
def test_windows(tmp_path: Path, channels: int, order: str) -> None:
    windows = RANDOM.normal(size=(7, channels, 31))
    np.save(tmp_path / "x.npy", {"NCL": windows, "NLC": windows.transpose(0, 2, 1).copy(), "NL": windows[:, 0]}[order])
    source = Arrays([tmp_path / "x.npy"], (channels, 31))
    assert np.array_equal(read(source, 3, 2)[1], windows)
    assert np.array_equal(np.stack(list(source.all())), windows)
    with pytest.raises(ValueError, match=r"the network takes 5 channels: save \[N, 5, L\]"):
        Arrays([tmp_path / "x.npy"], (5, 31))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            np.zeros((2, 4, 5, 4), np.uint8),
            r"has shape \(2, 4, 5, 4\); the network takes 3 channels: save \[N, 3, H, W\]",
        ),
        (np.zeros((2, 3, 5, 4), np.int64), "holds int64; save pixels as uint8"),
        (np.zeros((2, 3), np.uint8), r"has shape \(2, 3\)"),
        (np.zeros((2, 3, 5, 4), np.uint8, order="F"), "is stored column by column"),
        (np.array([None]), "no .npy or idx file|holds object"),
    ],
)
def test_other_shapes_and_dtypes(tmp_path: Path, pixels: np.ndarray, message: str) -> None:
    np.save(tmp_path / "x.npy", pixels, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        Arrays([tmp_path / "x.npy"], (3, 5, 4))


def test_damaged_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((9, 3, 5, 4), np.uint8))
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"x\.npy is shorter than its header says"):
        read(Arrays([tmp_path / "x.npy"], (3, 5, 4)), 4, 4)
    (tmp_path / "x.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"x\.npy is no \.npy or idx file"):
        Arrays([tmp_path / "x.npy"], (3, 5, 4))
    (tmp_path / "y").mkdir()
    for folder in (tmp_path, tmp_path / "y"):
        np.save(folder / "x.npy", np.zeros((1, 3, 5, 4), np.uint8))
    with pytest.raises(ValueError, match=r"two of the files are called x\.npy"):
        Arrays([tmp_path / "x.npy", tmp_path / "y" / "x.npy"], (3, 5, 4)).plan(4, BytesIO())
