"""Pictures: a file of the type that its ending names, whole or not at all."""

from pathlib import Path

import pytest

pyplot = pytest.importorskip("matplotlib.pyplot")

from eefast.cli import pictures  # noqa: E402


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a.svg", b"<?xml"), ("no ending", b"\x89PNG")]
)
def test_the_ending_is_the_type(tmp_path, name, start):
    path = tmp_path / name
    pictures.check_picture(path)
    assert not path.exists()
    with pictures.canvas(path, 2, 1) as drawn:
        drawn.subplots().plot([1, 2])
        assert drawn.get_size_inches().tolist() == [2, 1]
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (Path("x.gif2"), r"x\.gif2 cannot be drawn: its ending must be one of .*png"),
        (Path("no folder/x.png"), "there is no folder"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        pictures.check_picture(path)


def test_an_error_while_drawing_leaves_no_file_and_no_figure(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    open_figures = pyplot.get_fignums()
    with pytest.raises(ZeroDivisionError), pictures.canvas(path, 2, 1):
        1 / 0
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert pyplot.get_fignums() == open_figures
