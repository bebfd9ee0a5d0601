"""docs/scoring.md: its commands run as they are written, one after the other, and so does its Python."""

import re
import shlex
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from networks import lived_in
from pictures import photograph

from eefast import zoo

DOCUMENT = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOCUMENT, re.S) for line in block.splitlines()]
CODE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
# What `make test` runs: each other command starts a worker, which takes seconds.
FIRST = [i for i, line in enumerate(COMMANDS) if "predict" in line or line.endswith("photos --output scored")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the document names: a network, photographs, the same as tar files, parquet and an array."""
    pa = pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("scoring_document")
    for name in ("photos", "shards", "runs"):
        (folder / name).mkdir()
    net = lived_in(zoo.eenet("eenet8", num_classes=2, input_shape=(3, 32, 32), normalization=((0.5,) * 3,) * 2), 1)
    net.save(folder / "runs" / "mine")
    names = ["cat.png", "dog.jpg"]
    for i, name in enumerate(names):
        photograph(40, 50, seed=i).save(folder / "photos" / name)
        with tarfile.open(folder / f"shards/photos-{i:03}.tar", "w") as archive:
            archive.add(folder / "photos" / name, name)
    contents = [(folder / "photos" / name).read_bytes() for name in names]
    parquet.write_table(pa.table({"id": names, "image": contents}), folder / "photos.parquet")
    np.save(folder / "images.npy", np.zeros((5, 3, 32, 32), np.uint8))
    return folder


def test_the_document_shows_all_inputs() -> None:
    assert len(FIRST) == 3
    assert len(CODE) == 3
    assert len(COMMANDS) == 10
    assert all(line.startswith(("eefast predict ", "eefast score ")) for line in COMMANDS)


@pytest.mark.parametrize("which", ["first", pytest.param("all", marks=pytest.mark.slow)])
def test_commands_and_code_run(place: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.chdir(place)
    exec(compile(CODE[0], "scoring.md", "exec"), {})  # which tells the network how images are prepared
    for i, line in enumerate(COMMANDS):
        ray = "--ray" in line
        if (which == "all" or i in FIRST) and not ray:
            run(*shlex.split(line)[1:])
    exec(compile(CODE[1], "scoring.md", "exec"), {})
    parts = sorted(path.relative_to(place).as_posix() for path in place.glob("*/part-*.parquet"))
    folders = ["scored"] if which == "first" else ["from-array", "from-parquet", "from-tars", "recorded", "scored"]
    assert set(parts) >= {f"{folder}/part-00000.parquet" for folder in folders}
    assert (place / "answers.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason='ray is not installed; pip install "eefast[ray]" brings it')
def test_the_command_with_ray_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import sys

    import ray

    monkeypatch.chdir(place)
    exec(compile(CODE[0], "scoring.md", "exec"), {})
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, runtime_env=environment)
    try:
        (line,) = [line for line in COMMANDS if "--ray" in line]
        run(*shlex.split(line)[1:])
        if find_spec("pandas") is not None:
            exec(compile(CODE[2], "scoring.md", "exec"), {})
    finally:
        ray.shutdown()
    assert (place / "on-ray" / "part-00000.parquet").is_file()
