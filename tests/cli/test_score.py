"""`eefast score`: words, progress, figures, notes."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from networks import lived_in

import eefast
from eefast import zoo
from eefast.cli import ending, score
from eefast.scoring import run as scoring_run
from eefast.scoring.tally import Scored, Standing


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    net = lived_in(zoo.eenet("eenet8", num_classes=3, input_shape=(1, 14, 14), normalization=((0.1,), (0.3,))), 2)
    net.save(folder / "net")
    np.save(folder / "x.npy", np.random.default_rng(0).integers(0, 256, (31, 1, 14, 14), dtype=np.uint8))
    return folder


def test_a_run_and_the_same_again(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')
    from pyarrow.parquet import read_table

    words = ("score", place / "net", place / "x.npy", "--output", tmp_path / "out", "--shard-size", 20)
    done = run(*words, "--workers", 1, "--threads-per-worker", 1, "--logits")
    assert "31 images in 2 shards, of which 31 were answered now" in done.stdout
    assert f"rows: {tmp_path / 'out'}" in done.stdout.replace("\n", "")
    rows = [row for i in range(2) for row in read_table(tmp_path / f"out/part-0000{i}.parquet").to_pylist()]
    assert [row["id"] for row in rows] == [str(i) for i in range(31)]
    assert len(rows[0]["logits"]) == 3
    again = run(*words, "--logits", "--json", "-")
    assert "skipped 2 of 2 shards" in again.stderr
    figures = json.loads(again.stdout)
    assert (figures["images"], figures["skipped"], figures["failed"]) == (31, 31, 0)
    assert figures["exits"] == np.bincount([row["exit"] for row in rows], minlength=3).tolist()
    with pytest.raises(ValueError, match=r"other options \(logits\); take another folder, .* --overwrite"):
        run(*words)


def test_without_pyarrow(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError) as error:
        run("score", place / "net", place / "x.npy", "--output", tmp_path / "out")
    assert 'pyarrow is not installed; pip install "eefast[score]" brings it' in ending.missing(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{here}/empty --output {here}/out", r"empty has no images .*; give a folder of image files, or \.parquet"),
        (
            "{here}/x.parquet --output {here}/out --image-column img",
            "no column 'img'; name one of image, id by --image",
        ),
        ("{here}/x.parquet --output {here}/out", "two images have the id 'a'; name a column .* by --id-column"),
        ("{here}/colour.npy --output {here}/out", r"the network takes 1 channels: save \[N, 1, H, W\]"),
        ("{here} --output {here}/out", "out is inside .*, which is read; name a folder elsewhere"),
        ("{place}/x.npy --output {here}/out --workers 9999", "this machine has .* cores; take at most as many"),
        ("{place}/x.npy --output {here}/out --ray", r'ray is not installed; pip install "eefast\[ray\]" brings it'),
        ("{place}/x.npy --output {here}/taken", r"another network \(thresholds\); take another folder, .* --overwrite"),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2_before_any_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, words: str, message: str
) -> None:
    pa = pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')
    from pyarrow import parquet

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(scoring_run, "run_in_processes", lambda *_: None)
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "colour.npy", np.zeros((2, 3, 14, 14), np.uint8))
    parquet.write_table(pa.table({"image": [b"", b""], "id": ["a", "a"]}), tmp_path / "x.parquet")
    net = eefast.load(place / "net")
    net.thresholds += 0.25
    eefast.score(net, place / "x.npy", tmp_path / "taken")
    monkeypatch.setattr(scoring_run, "run_in_processes", lambda *_: pytest.fail("work has begun"))
    if ".parquet" in words:
        words += " --crop-fraction 1"
    given = words.format(here=tmp_path, place=place).split()
    assert ending.run(lambda: run("score", place / "net", *given)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(rf"error: .*{message}", line)
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize("words", ["2", "a/2", "1/b", "-1/2", "1/2/3"])
def test_wrong_shares(place: Path, tmp_path: Path, words: str) -> None:
    with pytest.raises(ValueError, match="give two numbers, such as 0/2 and 1/2"):
        run("score", place / "net", place / "x.npy", "--output", tmp_path / "out", f"--shard-of={words}")


@pytest.mark.parametrize(
    ("words", "address"),
    [(["--ray"], "auto"), (["--ray", "--logits"], "auto"), (["--ray", "10.0.0.1:6379"], "10.0.0.1:6379"), ([], None)],
)
def test_ray_may_have_an_address(place: Path, monkeypatch: pytest.MonkeyPatch, words: list, address: str) -> None:
    seen = {}

    def noted(*_, **options):
        seen.update(options)
        return Scored(0, 0, 0, None, (), 0, 0, 1.0, 1.0)

    monkeypatch.setattr(eefast, "score", noted)
    run("score", place / "net", place / "x.npy", "--output", "out", *words)
    assert seen["ray"] == address


def test_what_is_printed() -> None:
    found = list(score.lines(Scored(2_000, 3, 500, 0.25, (1_000, 997), 4, 1, 12.5, 2.5)))
    assert found == [
        "2,000 images in 4 shards, of which 1,500 were answered now",
        "150 images/s in 10.0 s, after 2.5 s to start workers",
        "mean cost 0.250, images per exit 1000 997",
    ]
    standing = Standing(1_500, 20_000, 3, 812.4, 0.251, 3_723.0)
    expected = "1,500 of 20,000 images, 812/s, mean cost 0.251, 1:02:03 left, 3 could not be read"
    assert score.described(standing) == expected
    assert score.described(Standing(0, 5, 0, 0.0, None, None)) == "0 of 5 images, 0/s"


def test_without_a_terminal_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 31.0, 31.0, 40.0, 62.0, 62.0])
    monkeypatch.setattr(score.time, "monotonic", lambda: next(clock))
    progress = score.lines_now_and_then()
    for images in (1, 2, 3, 4):
        progress(Standing(images, 5, 0, 1.0, None, None))
    assert capsys.readouterr().err.splitlines() == ["2 of 5 images, 1/s", "4 of 5 images, 1/s"]
