"""Files that are replaced as a whole or not at all: full disks, limits, links, permissions, several at a time."""

import os
import resource
import stat
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from networks import lived_in

from eefast import zoo
from eefast.cli import pictures
from eefast.cli.output import write_json
from eefast.planning import launch_costs
from eefast.result import ExitOutput
from eefast.system import files
from eefast.system.files import WriteError
from eefast.thresholds.calibration import Calibration, save_thresholds
from eefast.thresholds.outputs import save_outputs
from eefast.train.checkpoints import CheckpointWriter
from eefast.train.curves import CurvesLogger
from eefast.train.report import TrainReport, write_report


def whole(folder):
    """Every file below, by its name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def room_for(size):
    """No file of this process may grow beyond `size` bytes, as on a full disk; the error is EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python takes a cut off file of bytecode for a whole one.
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        sys.dont_write_bytecode = written
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("content", ["", "ä\n", b"\0\xff" * 70_000, memoryview(b"abc")])
def test_what_is_written_is_read(tmp_path, content):
    path = tmp_path / "file"
    for _ in range(2):
        files.write(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else bytes(content))
    assert list(whole(tmp_path)) == ["file"]
    files.write(str(path), "other")
    assert path.read_text() == "other"


def test_links_permissions_and_the_umask(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to(Path("there") / "file")
    before = os.umask(0o027)
    try:
        # A link to what does not exist yet, then to what does.
        for mode in (0o640, 0o604):
            files.write(link, "new")
            assert link.is_symlink()
            assert target.read_text() == "new"
            assert stat.S_IMODE(target.stat().st_mode) == mode
            target.chmod(0o604)
            target.write_text("old")
    finally:
        os.umask(before)
    assert sorted(whole(tmp_path)) == ["link", "there/file"]


def test_what_is_no_regular_file_is_written_to(tmp_path):
    files.write("/dev/null", "text")
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    files.write(tmp_path / "pipe", "through")
    reader.join()
    assert read == [b"through"]
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(WriteError, match="/dev/full cannot be written: no space left on device"):
        files.write("/dev/full", "text")


@pytest.mark.parametrize(
    ("place", "why"),
    [("folder", "it is a folder|is a directory"), ("missing/file", "no folder|no such file"),
     ("a file/file", "no folder|not a directory"), ("/proc/file", "no such file|denied")],
)  # fmt: skip
def test_impossible_places_are_named_before_and_after(tmp_path, place, why):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a file").write_text("text")
    before = whole(tmp_path)
    path = tmp_path / place
    with pytest.raises(ValueError, match=f"(?s){path} cannot be written: .*({why})"):
        files.check(path)
    with pytest.raises(WriteError, match=f"(?s){path} cannot be written: .*({why})"):
        files.write(path, "text")
    assert whole(tmp_path) == before


@pytest.mark.parametrize(
    ("attempt", "error"), [(files.check, ValueError), (lambda path: files.write(path, "new"), WriteError)],
    ids=["check", "write"],
)  # fmt: skip
def test_a_protected_file_stays(tmp_path, monkeypatch, attempt, error):
    """Renaming would not ask for the permission of the file. Root has all permissions, so it is asked in its stead."""
    path = tmp_path / "file"
    path.write_text("kept")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda path, mode: bool(path.stat().st_mode & 0o222))
    with pytest.raises(error, match=r"file cannot be written: permission denied"):
        attempt(path)
    assert whole(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("name", ["old", "new", "/dev/stdout"])
def test_checking_leaves_nothing(tmp_path, name):
    (tmp_path / "old").write_text("kept")
    files.check(tmp_path / name)
    assert whole(tmp_path) == {"old": b"kept"}


def writers(folder):
    """Everything in the package that writes a file → what to call."""
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 8, 8), normalization=((0.1,), (0.3,))), 1)
    out = [ExitOutput(torch.zeros(31, 10), torch.zeros(31), torch.zeros(31)) for _ in range(3)]
    chosen = {"learned": Calibration("learned", (0.1, 0.2), 0.9, 0.5)}
    report = TrainReport({}, 1, 0.1, [0.9] * 3, [1.0] * 3, chosen, {"learned": 1.0}, None, None, [2.0])
    checkpoint = {"epoch": 3, "state_dict": net.state_dict()}
    curves = CurvesLogger(folder, "logs", version=0)
    curves.experiment.log_metrics({"loss": torch.tensor(0.1)}, 1)
    (folder / "logs" / "version_0" / "metrics.csv").write_text("old")
    for name in (
        "model.safetensors", "config.json", "thresholds.json", "cache", "last.ckpt", "report.json",
        "figure.png",
    ):  # fmt: skip
        (folder / name).write_text("old")

    def canvas():
        pytest.importorskip("matplotlib")
        with pictures.canvas(folder / "figure.png", 2, 2):
            pass

    return {
        "model": lambda: net.save(folder),
        "thresholds": lambda: save_thresholds(net, folder, chosen),
        "cache": lambda: save_outputs(folder / "cache", out, torch.zeros(31), {"network": "x"}),
        "json": lambda: write_json(str(folder / "report.json"), {"a": list(range(99))}),
        "report": lambda: write_report(folder, report),
        "checkpoint": lambda: CheckpointWriter().save_checkpoint(checkpoint, folder / "last.ckpt"),
        "curves": lambda: curves.save(),
        "figure": canvas,
        "device table": lambda: launch_costs.keep(launch_costs.LaunchCosts(1, 2), torch.device("cuda")),
    }


@pytest.mark.parametrize(
    "name",
    ["model", "thresholds", "cache", "json", "report", "checkpoint", "curves", "figure", "device table"],
)
@pytest.mark.parametrize("fault", ["limit", "full"])
def test_every_writer_names_the_file_and_leaves_the_old_ones(tmp_path, monkeypatch, name, fault):
    monkeypatch.setattr(launch_costs, "path", lambda device: tmp_path / "report.json")
    write = writers(tmp_path)[name]
    before = whole(tmp_path)
    if fault == "limit":
        with room_for(7), pytest.raises(WriteError, match=r"cannot be written: file too large; .* unchanged") as raised:
            write()
    else:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"cannot be written: no space left on device; .* unchanged") as raised:
            write()
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert whole(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.setattr(launch_costs, "path", lambda device: tmp_path / "report.json")
    write()
    after = whole(tmp_path)
    assert after.keys() <= before.keys()  # what a network no longer has goes
    assert after != before


@pytest.mark.parametrize("name", ["cache", "json", "report", "checkpoint", "curves", "figure"])
def test_a_vanished_folder_is_named(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    write = writers(folder)[name]
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match=rf"{folder}/.* cannot be written: no such file or directory"):
        write()
    assert not folder.exists()


def test_files_that_belong_together_change_together(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_text("old")
    before = whole(tmp_path)

    def all_of(*names, then=lambda: None):
        with files.together():
            files.write(tmp_path / names[0], "new")
            with files.together():
                for name in names[1:]:
                    files.write(tmp_path / name, "new")
            then()

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(WriteError, match="missing/c cannot be written"):
        all_of("a", "b", "missing/c")
    assert whole(tmp_path) == before
    with pytest.raises(KeyboardInterrupt):
        all_of("a", "b", then=stop)
    assert whole(tmp_path) == before
    # Ctrl-C between two names: none, or all of them.
    replace = Path.replace

    def interrupted(partial, target):
        replace(partial, target)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        all_of(*"abc")
    assert whole(tmp_path) == dict.fromkeys("abc", b"new")


def test_readers_and_other_writers_find_whole_files(tmp_path):
    path, done = tmp_path / "file", threading.Event()
    path.write_bytes(b"0" * 5000)
    wrong = []

    def read():
        while not done.is_set():
            content = path.read_bytes()
            if len(content) != 5000 or len(set(content)) != 1:
                wrong.append(content)

    threads = [
        threading.Thread(target=lambda k=k: [files.write(path, b"%d" % k * 5000) for _ in range(20)]) for k in range(5)
    ]
    reader = threading.Thread(target=read)
    reader.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert not wrong
    assert list(whole(tmp_path)) == ["file"]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "logs" / "version_3").mkdir(parents=True)
    ours = [tmp_path / "last.ckpt.0123abcd.partial", tmp_path / "logs" / "version_3" / "metrics.csv.ffffffff.partial"]
    others = [tmp_path / name for name in ("film.mkv.partial", "last.ckpt.partial", "best.ckpt.0123abcd.partial")]
    for path in (*ours, *others):
        path.touch()
    files.remove_partial(tmp_path, "last.ckpt", "logs/*/metrics.csv")
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)


def test_a_file_written_in_pieces_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with files.replaced(path) as file:
        file.write(b"new, ")
        assert path.read_bytes() == b"old"
        file.write(b"in pieces")
    assert path.read_bytes() == b"new, in pieces"
    with pytest.raises(TypeError), files.replaced(path) as file:
        file.write("no bytes")
    assert path.read_bytes() == b"new, in pieces"
    with pytest.raises(WriteError, match="nowhere/x cannot be written"), files.replaced(tmp_path / "nowhere" / "x"):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["x"]
