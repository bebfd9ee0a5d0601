"""A pipeline in this process: rows are the answers of the network, whatever the input; images that cannot be read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import lived_in
from PIL import Image
from runtime_stages import Fake
from scored_rows import assert_answers, huge_png, rows_of

import eefast
from eefast import zoo
from eefast.data.cropping import prepared
from eefast.data.decoding import decode
from eefast.data.image_files import ImageFileError
from eefast.runtimes import RUNTIMES
from eefast.scoring import part_files
from eefast.scoring.image_folder import ImageFolder
from eefast.scoring.manifest import LISTING_FILE
from eefast.scoring.pipeline import Job, Pipeline
from eefast.scoring.sources import open_source
from eefast.system.files import WriteError

pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')


def job_of(network: Path, source, output: Path, **more) -> Job:
    net = eefast.load(network)
    job = Job(net, source, output, "digest", net.preprocessing, "record", False, "auto", 4, 1, "cpu")
    output.mkdir(exist_ok=True)
    return replace(job, **more)


def run(job: Job, shard_size: int) -> list[part_files.Totals]:
    with (job.output / LISTING_FILE).open("wb") as listing:
        shards = job.source.plan(shard_size, listing)
    pipeline = Pipeline(job)
    return [future.result(60) for future in [pipeline.submit(shard) for shard in shards]]


def test_stages_run_as_asked(network: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(RUNTIMES, "onnxruntime", Fake(name="Fake"))
    job = job_of(network, ImageFolder(pictures), tmp_path / "out", stages="onnxruntime")
    plan = Pipeline(job).plan
    assert plan.startswith("compact engine")
    assert plan.count("Fake") == 3


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar", "npy"])
@pytest.mark.parametrize(("shard_size", "batch_size", "engine"), [(7, 3, "auto"), (100, 64, "reference")])
def test_rows_are_the_answers(
    network: Path, inputs: dict, pixels: dict, tmp_path: Path, kind: str, shard_size: int, batch_size: int, engine: str
) -> None:
    source, ids = inputs[kind]
    logits = kind != "tar"
    job = job_of(
        network, open_source(source, (3, 17, 17)), tmp_path / "out", batch_size=batch_size, engine=engine, logits=logits
    )
    totals = run(job, shard_size)
    assert sum(part.images for part in totals) == 23
    if engine == "auto":
        assert_answers(job.output, job.net, dict(zip(ids, pixels.values(), strict=True)))
    found = rows_of(job.output)
    answers = {answer.image: answer for answer in eefast.predict(job.net, inputs["folder"][0])}
    for name, there in zip(pixels, ids, strict=True):
        row, answer = found[there], answers[str(inputs["folder"][0] / name)]
        assert (row["label"], row["exit"], row["cost"]) == (answer.label, answer.exit, answer.cost)
        assert ("logits" in row) == logits
    assert sum(part.cost for part in totals) == pytest.approx(sum(row["cost"] for row in found.values()))
    counted = np.bincount([row["exit"] for row in found.values()], minlength=3).tolist()
    assert np.sum([part.exits for part in totals], axis=0).tolist() == counted


def test_windows_of_a_network_on_rows(tmp_path: Path) -> None:
    net = lived_in(zoo.eenet("eenet20-1d", 1, num_classes=4, input_shape=(6, 31)), 1)
    windows = np.random.default_rng(0).normal(size=(7, 31, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", windows)
    job = Job(
        net,
        open_source(tmp_path / "x.npy", (6, 31)),
        tmp_path / "out",
        "digest",
        None,
        "fail",
        False,
        "auto",
        4,
        1,
        "cpu",
    )
    job.output.mkdir()
    run(job, 5)
    assert_answers(job.output, net, {str(row): window.T.copy() for row, window in enumerate(windows)})


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Images of all modes, and files that are none."""
    folder = tmp_path / "odd ☃"
    folder.mkdir()
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(0, 256, (30, 30, 3), dtype=np.uint8))
    for mode, ending in (("RGBA", "png"), ("P", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png")):
        colour.convert(mode).save(folder / f"{mode}.{ending}")
    Image.fromarray(random.integers(0, 65536, (30, 30), dtype=np.uint16)).save(folder / "16.png")
    colour.save(folder / "whole.jpg")
    (folder / "cut off.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-200])
    (folder / "zero.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "huge.png").write_bytes(huge_png(20_000))
    (folder / "link.jpg").symlink_to(folder / "whole.jpg")
    return folder


BAD = {
    "cut off.jpg": "image file is truncated",
    "zero.png": "it is empty",
    "text.png": "no format that Pillow reads",
    "huge.png": r"400000000 pixels\) exceeds limit",
}


def test_images_that_cannot_be_read_are_rows_and_cost_no_other(network: Path, odd: Path, tmp_path: Path) -> None:
    job = job_of(network, ImageFolder(odd), tmp_path / "out", batch_size=3)
    totals = run(job, 5)
    found = rows_of(job.output)
    assert found.keys() == {path.name for path in odd.iterdir()}
    assert sum(part.failed for part in totals) == len(BAD)
    for name, message in BAD.items():
        row = found.pop(name)
        assert [row[key] for key in ("label", "exit", "confidence", "cost")] == [None] * 4
        assert row["error"].startswith(f"{odd / name} cannot be read as an image")
        with pytest.raises(ImageFileError, match=message):
            raise ImageFileError(row["error"])
    pixels = {name: prepared(decode(odd / name), (3, 17, 17), job.how).numpy() for name in found}
    fast = eefast.accelerate(job.net)

    answer = fast(torch.from_numpy(np.stack(list(pixels.values()))))
    assert [row["label"] for row in found.values()] == answer.labels.tolist()
    assert [row["confidence"] for row in found.values()] == answer.confidence.tolist()


def test_a_shard_without_one_whole_image(network: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").touch()
    (totals,) = run(job_of(network, ImageFolder(tmp_path / "in"), tmp_path / "out"), 10)
    assert totals == part_files.Totals(3, 3, 0.0, (0, 0, 0))
    assert [row["error"] is None for row in rows_of(tmp_path / "out").values()] == [False] * 3


def test_an_image_that_ends_the_run_is_named_and_other_shards_are_whole(
    network: Path, pictures: Path, odd: Path, tmp_path: Path
) -> None:
    job = job_of(network, ImageFolder(odd), tmp_path / "out", on_error="fail")
    with (job.output / LISTING_FILE).open("wb") as listing:
        shards = job.source.plan(1, listing)
    pipeline, names = Pipeline(job), sorted(path.name for path in odd.iterdir())
    futures = dict(zip(names, map(pipeline.submit, shards), strict=True))
    for name, future in futures.items():
        if name in BAD:
            with pytest.raises(ImageFileError, match=f"{name} cannot be read"):
                future.result(60)
        else:
            assert future.result(60).images == 1
    assert rows_of(job.output).keys() == set(names) - BAD.keys()


def test_a_full_disk(network: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_):
        raise WriteError("part-00000.parquet cannot be written: no space left on device")

    monkeypatch.setattr(part_files, "write", full)
    with pytest.raises(WriteError, match="no space left"):
        run(job_of(network, ImageFolder(pictures), tmp_path / "out"), 100)


def test_an_input_that_has_changed(network: Path, pictures: Path, tmp_path: Path) -> None:
    job = job_of(network, ImageFolder(pictures), tmp_path / "out")
    with (job.output / LISTING_FILE).open("wb") as listing:
        (shard,) = job.source.plan(100, listing)
    with pytest.raises(RuntimeError, match="shard 0 has 23 images, not 24: the input has changed"):
        Pipeline(job).submit(replace(shard, count=24)).result(60)
