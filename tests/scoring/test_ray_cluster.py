"""A real cluster of Ray with two CPUs: the rows of a local run, room for Ray's other tasks, killed actors."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scored_rows import assert_answers, rows_of

import eefast
from eefast.scoring.ray_cluster import check_room, connect

ray = pytest.importorskip("ray", reason='ray is not installed; pip install "eefast[ray]" brings it')
pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar", "npy"])
def test_rows_are_the_answers(network: Path, inputs: dict, pixels: dict, tmp_path: Path, kind: str) -> None:
    source, ids = inputs[kind]
    net = eefast.load(network)
    found = eefast.score(net, source, tmp_path / "out", ray="auto", shard_size=7, batch_size=3)
    assert (found.images, found.shards) == (23, 4)
    assert_answers(tmp_path / "out", net, dict(zip(ids, pixels.values(), strict=True)))
    again = eefast.score(net, source, tmp_path / "out", shard_size=7, workers=1)
    assert again.skipped_shards == 4


def test_actors_that_would_take_all_cpus_are_refused_at_once(network: Path, inputs: dict, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"2 workers × 1 CPUs \+ 1 for Ray's other tasks = 3 CPUs, but .* has 2;"):
        eefast.score(network, inputs["npy"][0], tmp_path / "out", ray="auto", workers=2)
    assert time.monotonic() - begin < 5
    assert not (tmp_path / "out").exists()


def test_an_actor_that_is_killed_is_replaced(network: Path, many: tuple, tmp_path: Path) -> None:
    source, pixels = many
    net, killed = eefast.load(network), []

    def kill_one() -> None:
        while len(list((tmp_path / "out").glob("part-*"))) < 3:
            time.sleep(0.01)
        for path in Path("/proc").glob("[0-9]*"):
            if (path / "cmdline").exists() and b"ray::Scorer" in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)
                killed.append(path.name)

    thread = threading.Thread(target=kill_one)
    thread.start()
    eefast.score(net, source, tmp_path / "out", ray="auto", shard_size=20, batch_size=16)
    thread.join()
    assert killed
    assert_answers(tmp_path / "out", net, pixels)


def test_an_image_that_cannot_be_read(network: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, path in enumerate(sorted(pictures.glob("*.*"))):
        (tmp_path / "in" / f"{i}.png").write_bytes(path.read_bytes() if i != 5 else b"")
    with pytest.raises(RuntimeError, match=r"5\.png cannot be read .*--on-error record"):
        eefast.score(network, tmp_path / "in", tmp_path / "out", ray="auto", shard_size=2)
    found = eefast.score(network, tmp_path / "in", tmp_path / "out", ray="auto", shard_size=2, on_error="record")
    assert found.failed == 1
    assert len(rows_of(tmp_path / "out")) == 8


def test_the_class_for_map_batches(network: Path, inputs: dict, pixels: dict) -> None:
    pytest.importorskip("pandas", reason='ray.data needs pandas; pip install "ray[data]" brings it')
    from eefast.integrations.ray import Score

    data = ray.data.from_items([{"id": name, "image": (inputs["folder"][0] / name).read_bytes()} for name in pixels])
    pool = ray.data.ActorPoolStrategy(size=1)
    rows = data.map_batches(Score, fn_constructor_args=(str(network),), compute=pool, batch_size=7).take_all()
    answer = eefast.accelerate(eefast.load(network))(torch.from_numpy(np.stack(list(pixels.values()))))
    assert {row["id"]: (row["label"], row["exit"]) for row in rows} == {
        name: (int(answer.labels[i]), int(answer.exit_index[i])) for i, name in enumerate(pixels)
    }


def test_an_address_where_nothing_listens_is_refused_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"ray='127\.0\.0\.1:1': no cluster of Ray answers .*leave --ray out"):
        connect("127.0.0.1:1")


@pytest.mark.parametrize(("workers", "threads", "fits"), [(1, 1, True), (1, 2, False), (3, 1, True), (4, 1, False)])
def test_room(workers: int, threads: int, fits: bool) -> None:
    cpus = 4.0 if workers > 2 else 2.0
    if fits:
        check_room(cpus, workers, threads)
    else:
        with pytest.raises(ValueError, match="take fewer workers"):
            check_room(cpus, workers, threads)
