"""A network that uses all its exits, and images of all kinds in files."""

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import lived_in, spread_thresholds
from PIL import Image

import eefast
from eefast import zoo
from eefast.data.cropping import prepared
from eefast.data.decoding import decode

SHAPE = (3, 17, 17)


def picture(number: int) -> Image.Image:
    """Noise of other contrast and colour in each."""
    random = np.random.default_rng(number)
    pixels = (
        128 + random.normal(0, 60, 3) + random.normal(0, 1 + 3 * (number % 20), (17 + number % 4, 30 - number % 23, 3))
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a network that knows how images are prepared, and its classes."""
    folder = tmp_path_factory.mktemp("scoring") / "net"
    net = zoo.eenet("eenet8", num_classes=5, input_shape=SHAPE, normalization=((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    lived_in(net, 3)
    net.preprocessing = eefast.Preprocessing(20)
    pixels = torch.stack([prepared(picture(i), SHAPE, net.preprocessing) for i in range(60)])
    spread_thresholds(net, net.prepare(pixels), 0.4)
    net.classes = ("ant", "bee", "cat", "dog", "Ente")
    net.save(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 image files of several sizes in a folder and folders below it."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(23):
        path = folder / ("", "b", "a/ö ü")[i % 3] / f"{i}.{('png', 'jpg')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path, quality=95)
    return folder


def pixels_in(folder: Path) -> dict[str, np.ndarray]:
    """The prepared pixels of all image files in a folder, by their paths from there."""
    paths = sorted(path for path in folder.rglob("*.*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): prepared(decode(path), SHAPE, eefast.Preprocessing(20)).numpy()
        for path in paths
    }


@pytest.fixture(scope="session")
def pixels(pictures: Path) -> dict[str, np.ndarray]:
    return pixels_in(pictures)


@pytest.fixture(scope="session")
def inputs(pictures: Path, pixels: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same images as every kind of input: (INPUT, id of each image)."""
    import pyarrow as pa
    from pyarrow import parquet

    place = tmp_path_factory.mktemp("inputs")
    contents = {name: (pictures / name).read_bytes() for name in pixels}
    parquet.write_table(
        pa.table({"image": list(contents.values()), "id": list(contents)}), place / "x.parquet", row_group_size=5
    )
    for i in range(2):
        with tarfile.open(place / f"x-{i}.tar", "w") as archive:
            for name in list(pixels)[i::2]:
                info = tarfile.TarInfo(name)
                info.size = len(contents[name])
                archive.addfile(info, BytesIO(contents[name]))
    np.save(place / "x.npy", np.stack(list(pixels.values())))
    return {
        "folder": (pictures, list(pixels)),
        "parquet": (place / "x.parquet", list(pixels)),
        "tar": (f"{place}/x-{{0..1}}.tar", [name.partition(".")[0] for name in pixels]),
        "npy": (place / "x.npy", [str(i) for i in range(len(pixels))]),
    }


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """3,000 images in a .npy file, and the same by id."""
    pixels = np.stack([prepared(picture(i), SHAPE, eefast.Preprocessing(20)).numpy() for i in range(60)])
    random = np.random.default_rng(0)
    changed = pixels[random.integers(0, 60, 3000)] ^ random.integers(0, 16, (3000, *SHAPE), dtype=np.uint8)
    path = tmp_path_factory.mktemp("many") / "x.npy"
    np.save(path, changed)
    return path, {str(i): image for i, image in enumerate(changed)}
