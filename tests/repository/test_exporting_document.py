"""docs/exporting.md: its Python runs, its commands have options that exist."""

import re
import shlex
from pathlib import Path

import torch
from networks import images, lived_in
from typer.main import get_command

import eefast
from eefast.cli.commands import app
from eefast.exporting.formats import FORMATS
from eefast.hub import repository

DOCUMENT = (Path(__file__).parents[2] / "docs" / "exporting.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)


def test_the_code_runs(tmp_path, monkeypatch):
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)), 1)
    net.save(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(repository, "push", lambda *given, **more: pushed.append((given, more)))
    monkeypatch.setattr(repository, "pull", lambda *given, **more: net)
    names = {"images": images(31, (3, 12, 12)), "labels": torch.arange(31) % 10}
    assert len(CODE) == 3
    for code in CODE:
        exec(compile(code, "exporting.md", "exec"), names)
    assert torch.equal(names["result"].logits, net(names["images"]).logits)
    (((_, name), more),) = pushed
    assert name == "owner/name"
    assert more["evaluation"].images == 31


def test_the_commands_have_these_options():
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.S)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("eefast")]
    assert lines
    known = {option for p in get_command(app).commands["export"].params for option in p.opts}
    for line in lines:
        assert line[:2] == ["eefast", "export"]
        assert {word for word in line if word.startswith("--")} <= known


def test_the_formats_are_all_there():
    rows = re.findall(r"^\| `(\w+)` \| `", DOCUMENT, re.M)
    assert sorted(rows) == sorted(FORMATS)
