"""docs/serving.md: its commands have options that exist, its tables name what there is."""

import re
import shlex
from pathlib import Path

import pytest
from networks import lived_in
from typer.main import get_command

import eefast
from eefast.cli.commands import app
from eefast.integrations import ray_serve
from eefast.serving.application import Application
from eefast.serving.bodies import Decoder
from eefast.serving.levels import Levels

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)


@pytest.fixture(scope="module")
def net():
    return lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12), normalization=((0.5,) * 3, (0.3,) * 3)), 1)


def test_the_other_code_is_that_of_the_adapters():
    ray, litserve = CODE[1:]
    assert "from eefast.integrations.ray_serve import deployment\n" in ray
    assert callable(ray_serve.deployment)
    assert "from eefast.integrations.litserve import EarlyExits\n" in litserve


def test_the_commands_have_these_options():
    commands = [line for block in re.findall(r"```bash\n(.*?)```", DOCUMENT, re.S) for line in block.splitlines()]
    words = [shlex.split(line) for line in commands if line.startswith("eefast")]
    words += [re.search(r"command: \[(.*)\]", DOCUMENT)[1].replace('"', "").split(", ")]
    assert len(words) == 2
    known = {option for p in get_command(app).commands["serve"].params for option in p.opts}
    for line in words:
        assert line[:2] == ["eefast", "serve"]
        assert {word for word in line if word.startswith("--")} <= known
    mentioned = set(re.findall(r"`(--[a-z-]+)", DOCUMENT)) - {"--profile", "--save"}
    assert mentioned <= known


def test_the_metrics_are_all_there(net):
    application = Application(net, Decoder.of(net), Levels())
    lines = application.metrics.text(None, application.levels).decode().splitlines()
    there = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    named = set(re.findall(r"`(eefast_\w+)", DOCUMENT))
    assert named <= there
    assert len(named) >= 10
