"""Runs that are killed or interrupted end in the bits of an undisturbed one; damaged checkpoints are refused."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from kill_and_resume import same_run
from training_runs import RESUMABLE, trained

from eefast.train.module import EarlyExitModule


def test_killed_runs_go_on_as_if_nothing_had_happened(colours: Path, tmp_path: Path) -> None:
    """Order, tags, augmentation and the crops made by worker processes included."""
    photographs = {"dataset": "folder", "image_size": 8, "held_out": 90, "workers": 1}
    words = [tmp_path, colours, json.dumps({**RESUMABLE, **photographs}), "random", 1]
    # In a separate process: worker processes forked from one that has many threads may hang or crash.
    script = Path(__file__).parents[1] / "helpers" / "kill_and_resume.py"
    # Into a file: a worker whose parent was killed in the moment of its start never ends, and would keep a pipe open.
    with (tmp_path / "said").open("w+") as said:
        command = [sys.executable, script, *map(str, words)]
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        code = process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    found = (tmp_path / "said").read_text()
    assert code == 0, found
    assert found.count("the same bits") == 1, found
    same_run(tmp_path / "whole", tmp_path / "killed0")
    assert len(torch.load(tmp_path / "killed0" / "last.ckpt", weights_only=True)["seconds_per_epoch"]) == 3


def test_broken_run_goes_on_as_if_nothing_had_happened(
    small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**RESUMABLE, "data_root": small_mnist}
    trained(output=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        step = EarlyExitModule.training_step

        def breaking(module, batch, index):
            if (module.current_epoch, index) == (2, 5):
                raise ArithmeticError
            return step(module, batch, index)

        patch.setattr(EarlyExitModule, "training_step", breaking)
        with pytest.raises(ArithmeticError):
            trained(output=tmp_path / "broken", **options)
    with pytest.raises(ValueError, match=r"learning_rate=0\.5, but the run to resume has 0\.01"):
        trained(output=tmp_path / "broken", resume=True, learning_rate=0.5, **options)
    trained(output=tmp_path / "broken", resume=True, **options)
    same_run(tmp_path / "whole", tmp_path / "broken")
    # What is finished can be resumed too: nothing is left to train.
    trained(output=tmp_path / "broken", resume=True, **options)
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_resume_without_a_checkpoint(small_mnist: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong folder is told; a run that was broken off in its first epoch starts again."""
    with pytest.raises(FileNotFoundError, match=r"resume=True: there is no .*last\.ckpt"):
        trained(data_root=small_mnist, output=tmp_path, resume=True, **RESUMABLE)
    options = {**RESUMABLE, "data_root": small_mnist, "loss": "v0", "two_stage": 0, "epochs": 1}
    arguments = trained(output=tmp_path, **options).arguments
    report = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "started.json").write_text(json.dumps({"arguments": arguments}))
    with pytest.raises(ValueError, match=r"seed=2, but the run to resume has 1"):
        trained(output=tmp_path, resume=True, **{**options, "seed": 2})
    capfd.readouterr()
    trained(output=tmp_path, resume=True, **options)
    assert f"resume: no epoch of the run in {tmp_path} was finished, it starts again\n" in capfd.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == report
    # last.ckpt is of an earlier run in the same folder.
    (tmp_path / "started.json").write_text(json.dumps({"arguments": {**arguments, "seed": 2}}))
    trained(output=tmp_path, resume=True, **{**options, "seed": 2})
    assert "it starts again" in capfd.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() != report
    (tmp_path / "started.json").write_text("[]")
    with pytest.raises(ValueError, match=r"started\.json is damaged; delete it"):
        trained(output=tmp_path, resume=True, **options)


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path(self.target),)


@pytest.fixture(scope="module")
def finished(small_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("finished")
    options = {**RESUMABLE, "data_root": small_mnist, "loss": "v0", "two_stage": 0, "epochs": 1}
    trained(output=folder, **options)
    return folder, options


def changed_file(content: bytes, kind: str, folder: Path) -> bytes | None:
    """The checkpoint's bytes after some mishap; None for what is no file at all."""
    if kind == "a folder":
        return None
    if kind == "empty":
        return b""
    if kind == "text":
        return b"# nothing\n" * 50
    if kind == "zeros":
        return bytes(len(content))
    if kind.startswith("cut"):
        return content[: int(float(kind[4:]) * len(content))]
    if kind == "a flipped bit":
        # In the first weights, which fill a good part of the file.
        where = content.index(
            torch.load(io.BytesIO(content))["state_dict"]["net.stages.0.0.0.weight"].numpy().tobytes()
        )
        return content[:where] + bytes([content[where] ^ 64]) + content[where + 1 :]
    found = torch.load(io.BytesIO(content), weights_only=True)
    if kind == "code":
        found["code"] = Hostile()
        found["code"].target = str(folder / "executed")
    elif kind == "another program's":
        found = {"model": found["state_dict"]}
    elif kind == "a list":
        found = [1, 2]
    elif kind == "newer":
        found["format"] = 2
    elif kind == "lacks a weight":
        del found["state_dict"]["net.heads.0.classifier.weight"]
    elif kind == "lacks the optimiser":
        del found["optimizer_states"]
    elif kind == "odd epochs":
        found["seconds_per_epoch"], found["epoch"] = 3, "one"
    elif kind == "odd loops":
        found["loops"] = {"fit_loop": None}
    elif kind == "odd callbacks":
        found["callbacks"] = dict.fromkeys(found["callbacks"], 3)
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a folder", "is no intact checkpoint: it is no regular file"),
        ("empty", "is no intact checkpoint: it is empty"),
        ("text", "is no intact checkpoint: File is not a zip file"),
        ("zeros", "is no"),
        ("cut 0.01", "is no"),
        ("cut 0.5", "is no"),
        ("cut 0.999", "is no"),
        ("a flipped bit", "is no intact checkpoint"),
        ("code", "is no checkpoint of eefast train: it is damaged, or holds code"),
        ("another program's", "is no checkpoint of eefast train"),
        ("a list", "is no checkpoint of eefast train"),
        ("newer", "was written by a newer eefast; install that"),
        ("lacks a weight", "does not fit this run"),
        ("lacks the optimiser", "does not fit this run"),
        ("odd epochs", "is no checkpoint of eefast train"),
        ("odd loops", "does not fit this run"),
        ("odd callbacks", "does not fit this run"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_named(
    finished: tuple[Path, dict], tmp_path: Path, kind: str, message: str
) -> None:
    folder, options = finished
    content = changed_file((folder / "last.ckpt").read_bytes(), kind, tmp_path)
    output = tmp_path / "run"
    output.mkdir()
    if content is None:
        (output / "last.ckpt").mkdir()
    else:
        (output / "last.ckpt").write_bytes(content)
    if "does not fit" in message:
        (output / "best.ckpt").write_bytes((folder / "best.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"last\.ckpt") as raised:
        trained(output=output, resume=True, **options)
    text = str(raised.value)
    assert message in text
    assert "start again without --resume" in text
    assert "\n" not in text
    assert not (tmp_path / "executed").exists()
    if "does not fit" in message:
        (output / "best.ckpt").write_bytes(b"")
        with pytest.raises(ValueError, match=r"best\.ckpt is no intact checkpoint: it is empty; start again"):
            trained(output=output, resume=True, **options)
        return
    assert [path.name for path in output.iterdir()] == ["last.ckpt"]
    # An intact one beside it is offered, and works.
    if kind in ("empty", "cut 0.5"):
        (output / "best.ckpt").write_bytes((folder / "best.ckpt").read_bytes())
        with pytest.raises(ValueError, match=r"copy .*best\.ckpt, of epoch 1, over it"):
            trained(output=output, resume=True, **options)
        (output / "last.ckpt").write_bytes((folder / "best.ckpt").read_bytes())
        trained(output=output, resume=True, **options)
        same_run(folder, output)
