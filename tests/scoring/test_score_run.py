"""Whole runs: resumed after a kill, shared by processes, refused before any work."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from killed_scores import children, finish, has_ended, kill, start, wait_for_files
from runtime_stages import Fake
from scored_rows import assert_answers, rows_of, summary

import eefast
from eefast import zoo
from eefast.planning import planner
from eefast.runtimes import RUNTIMES
from eefast.scoring import run
from eefast.scoring.failures import failure
from eefast.scoring.pipeline import Pipeline
from eefast.scoring.run import ScoreOptions

pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_killed_and_resumed(
    network: Path, many: tuple, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a worker, then the process that started it; in between another run on the same folder is refused."""
    source, pixels = many
    net, output, draw = eefast.load(network), tmp_path / "out", random.Random(seed)
    more = {"workers": 1, "threads_per_worker": 1, "shard_size": 20, "batch_size": 16}
    process = start(network, source, output, "--workers", 1 + (seed > 0), "--shard-size", 20, "--batch-size", 16)
    first = draw.randint(1, 20)
    wait_for_files(output, first, process)
    workers = children(process)
    kill(draw.choice(workers))
    wait_for_files(output, first + draw.randint(1, 50), process)
    os.kill(process.pid, signal.SIGSTOP)
    workers += children(process)
    with pytest.raises(ValueError, match=rf"out is written to by another run \(process {process.pid} on"):
        eefast.score(net, source, output, **more)
    kill(process.pid)
    process.communicate()
    assert all(map(has_ended, workers))
    there = {path: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}
    assert 2 <= len(there) < len(pixels) // 20
    (output / "part-00149.parquet.0123abcd.partial").touch()
    if seed == 0:
        monkeypatch.setattr(run, "run_in_processes", in_this_process)
    found = eefast.score(net, source, output, **more)
    assert found.skipped_shards == len(there)
    assert found.skipped == 20 * len(there)
    assert found.images == len(pixels)
    assert_answers(output, net, pixels)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert summary(output)["exits"] == list(found.exits)
    assert found.mean_cost == pytest.approx(np.mean([row["cost"] for row in rows_of(output).values()]))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["folder", "parquet", "tar", "npy"])
def test_worker_processes_give_the_answers(
    network: Path, inputs: dict, pixels: dict, tmp_path: Path, kind: str, workers: int
) -> None:
    net, (source, ids) = eefast.load(network), inputs[kind]
    found = eefast.score(net, source, tmp_path / "out", workers=workers, threads_per_worker=1, shard_size=7)
    assert (found.images, found.shards, found.failed) == (23, 4, 0)
    assert_answers(tmp_path / "out", net, dict(zip(ids, pixels.values(), strict=True)))


def test_shares_are_apart_and_together_the_whole(
    network: Path, inputs: dict, pixels: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_in_processes", in_this_process)
    net, (source, ids) = eefast.load(network), inputs["npy"]
    found = [eefast.score(net, source, tmp_path / "out", shard_size=4, shard_of=(i, 4)) for i in range(3)]
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    found.append(eefast.score(net, source, tmp_path / "out", shard_size=4))
    assert [(part.shards, part.skipped, part.images) for part in found] == [(2, 0, 8), (2, 0, 7), (1, 0, 4), (1, 0, 4)]
    assert_answers(tmp_path / "out", net, dict(zip(ids, pixels.values(), strict=True)))
    monkeypatch.delenv("RANK")
    assert eefast.score(net, source, tmp_path / "out", shard_size=4).skipped == 23


@pytest.mark.slow
def test_two_shares_are_the_whole(network: Path, many: tuple, tmp_path: Path) -> None:
    source, pixels = many
    output, words = tmp_path / "out", ("--workers", 1, "--shard-size", 1000)
    first = start(network, source, output, *words, "--shard-of", "0/2")
    os.environ.update(RANK="1", WORLD_SIZE="2")
    try:
        second = start(network, source, output, *words)
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    assert "2,000 images in 2 shards" in finish(first)
    assert "1,000 images in 1 shard," in finish(second)
    assert_answers(output, eefast.load(network), pixels)
    images = [summary_of["images"] for summary_of in map(_json, sorted(output.glob("summary-*.json")))]
    assert images == [2000, 1000]


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def in_this_process(job, shards, workers, watcher) -> None:
    """`run_in_processes` without processes, which take seconds to start."""
    pipeline = Pipeline(job)
    for shard in shards:
        try:
            watcher.done(shard, pipeline.submit(shard).result(60))
        except Exception as error:
            raise failure(type(error).__name__, str(error), shard.number) from error


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_recorded_before_stops_a_run_that_fails_at_errors(
    network: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    if not processes:
        monkeypatch.setattr(run, "run_in_processes", in_this_process)
    source = tmp_path / "in"
    source.mkdir()
    for i, path in enumerate(sorted(pictures.glob("*.*"))):
        (source / f"{i}.png").write_bytes(path.read_bytes())
    (source / "3.png").write_bytes(b"no image")
    net, more = eefast.load(network), {"workers": 1, "threads_per_worker": 1, "shard_size": 4}
    found = eefast.score(net, source, tmp_path / "out", on_error="record", **more)
    assert (found.images, found.failed) == (8, 1)
    before = rows_of(tmp_path / "out")
    assert before["3.png"]["error"] is not None
    with pytest.raises(RuntimeError, match=r"3\.png cannot be read .*--on-error record"):
        eefast.score(net, source, tmp_path / "out", **more)
    assert str(rows_of(tmp_path / "out")) == str(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 10_000}, "workers=10000: this machine has .* cores; take at most as many"),
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"on_error": "skip"}, "on_error='skip' is unknown; choose fail or record"),
        ({"shard_of": (2, 2)}, r"shard_of=2/2: the first number must be in 0 … 1"),
        ({"shard_of": (0, 2), "ray": "auto"}, "leave one of them out"),
        ({"crop_fraction": 2.0}, "must be above 0 and at most 1"),
        ({"image_column": "x"}, "have no columns; leave it out"),
    ],
)
def test_wrong_options(network: Path, pictures: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eefast.score(network, pictures, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fastest"}, "engine='fastest' is unknown; choose one of auto, reference"),
        ({"stages": "tensorrt"}, "stages='tensorrt' is unknown; choose one of auto, pytorch"),
        ({"stages": "absent"}, "stages='absent' cannot run: fake not installed: pip install fake; use"),
    ],
)
def test_engines_that_cannot_run_are_refused_before_a_folder_is_made(
    network: Path, pictures: Path, tmp_path: Path, options: dict, message: str, monkeypatch
) -> None:
    monkeypatch.setitem(RUNTIMES, "absent", Fake(absent="fake not installed: pip install fake"))
    monkeypatch.setattr(planner, "STAGES", ("auto", "pytorch", "absent"))
    with pytest.raises(ValueError, match=message):
        eefast.score(network, pictures, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_rows_by_other_stages_are_other_rows(network: Path, pictures: Path, tmp_path: Path) -> None:
    more = {"engine": "compact", "workers": 1, "threads_per_worker": 1, "shard_size": 16}
    assert eefast.score(network, pictures, tmp_path / "out", stages="pytorch", **more).shards == 2
    options = json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]
    assert options == {"logits": False, "engine": "compact", "stages": "pytorch", "shard_size": 16}
    with pytest.raises(ValueError, match=r"other options \(stages\); take another folder"):
        eefast.score(network, pictures, tmp_path / "out", **more)


@pytest.mark.parametrize("overwrite", [False, True])
def test_rows_never_replace_what_is_read(network: Path, tmp_path: Path, overwrite: bool) -> None:
    np.save(tmp_path / "part-0.npy", np.zeros((1, 3, 17, 17), np.uint8))
    with pytest.raises(ValueError, match=r"part-0\.npy, which is read, is in .*; name another folder for the rows"):
        eefast.score(network, f"{tmp_path}/part-*.npy", tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["part-0.npy"]


def test_wrong_inputs_and_outputs(network: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"out is inside .*, which is read; name a folder elsewhere"):
        eefast.score(network, pictures, pictures / "b" / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/out cannot be made: .*; name another folder"):
        eefast.score(network, pictures, tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no images"):
        eefast.score(network, tmp_path / "empty", tmp_path / "out")
    plain = zoo.eenet("eenet8", normalization=((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match="--crop-fraction"):
        eefast.score(plain, pictures, tmp_path / "out")
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 17, 17), np.uint8))
    with pytest.raises(ValueError, match="the input is pixels already; leave it out"):
        eefast.score(network, tmp_path / "x.npy", tmp_path / "out", crop_fraction=1.0)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK=2, WORLD_SIZE=2 in the environment are no share"):
        eefast.score(network, pictures, tmp_path / "out")


def test_defaults_are_those_of_the_function() -> None:
    import inspect

    parameters = inspect.signature(eefast.score).parameters
    for name, value in vars(ScoreOptions()).items():
        assert parameters[name].default == value, name


@pytest.mark.slow
def test_ctrl_c_leaves_finished_shards_and_nothing_half_written(network: Path, many: tuple, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(network, many[0], output, "--workers", 2, "--shard-size", 20, "--batch-size", 16)
    wait_for_files(output, 5, process)
    workers = children(process)
    process.send_signal(signal.SIGINT)
    assert "interrupted by Ctrl-C" in finish(process, 130)
    assert all(map(has_ended, workers))
    assert len(rows_of(output)) >= 100
    assert {path.suffix for path in output.iterdir()} == {".parquet", ".json", ".jsonl"}
