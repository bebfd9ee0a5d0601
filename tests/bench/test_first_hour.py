"""The path of a newcomer: the quick start's own commands in its order, on images that are there, within limits."""

import sys

import first_hour
import pytest
from PIL import Image


def test_the_commands_are_those_for_an_own_backbone():
    found = first_hour.commands(random_weights=False)
    assert [words[1] for words in found] == ["train", "calibrate", "predict", "evaluate"]
    assert ["--backbone" in words for words in found] == [True, False, False, False]
    assert "--weights" in found[0]
    bare = first_hour.commands(random_weights=True)
    assert set(found[0]) - set(bare[0]) == {"--weights", "IMAGENET1K_V1", "--download"}
    assert bare[1:] == found[1:]


def test_photographs_are_those_that_the_quick_start_names(tmp_path):
    found = first_hour.photographs(tmp_path / "photos", train=2, to_classify=5)
    assert len(found) == 10
    assert tmp_path / "photos/val/cat/0.png" in found
    assert len({Image.open(path).size for path in found}) > 5
    assert sorted(path.name for path in (tmp_path / "photos/train/dog").iterdir()) == ["0.jpg", "1.jpg"]
    assert (tmp_path / "cat.jpg").is_file()


@pytest.mark.parametrize("slow", [False, True])
def test_each_step_is_timed_and_the_sums_are_held_to_their_limits(tmp_path, monkeypatch, capsys, slow):
    started, clock = [], iter(range(0, 10_000, 1))
    monkeypatch.setattr(first_hour, "run", lambda words, folder: started.append(words))
    monkeypatch.setattr(first_hour, "served", lambda program, folder: started.append(["serve"]))
    monkeypatch.setattr(first_hour.time, "perf_counter", lambda: next(clock) * (200.0 if slow else 1.0))
    monkeypatch.setattr(sys, "argv", ["first_hour.py", "--random-weights", "--json", str(tmp_path / "seconds.json")])
    assert first_hour.main() == int(slow)
    assert [words[0].rpartition("/")[2] for words in started] == ["git", "make", "make", *["eefast"] * 4, "serve"]
    predict = next(words for words in started if words[1:2] == ["predict"])
    assert len(predict) == 3 + 10
    assert "600.0 s  clone, set-up, demo" in capsys.readouterr().out if slow else True
    assert '"random_weights": true' in (tmp_path / "seconds.json").read_text()
