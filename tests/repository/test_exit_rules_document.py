"""docs/exit-rules.md: its Python runs, its policies choose the profiles that the text says, its commands exist."""

import queue
import re
import shlex
from math import inf
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from networks import images, lived_in
from typer.main import get_command

import eefast
from eefast import ExitOutput
from eefast.cli.commands import app
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.dropping import find_thresholds_and_exits
from eefast.thresholds.fitting import fit_rule
from eefast.thresholds.outputs import carried
from eefast.thresholds.scaling import fold_scaling, scaled

DOCUMENT = (Path(__file__).parents[2] / "docs" / "exit-rules.md").read_text()
RULES, BOUND, PROFILES, POLICIES, DROPPED, ONLINE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
SHAPE = (3, 12, 12)


def outputs_of(exits: int) -> tuple[list[ExitOutput], torch.Tensor]:
    """Of 800 images about which exits are hardly ever wrong."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (800,), generator=random)
    found = []
    for _ in range(exits):
        logits = torch.randn(800, 10, generator=random) + 7 * torch.nn.functional.one_hot(labels, 10)
        z = torch.randn(800, generator=random)
        found.append(ExitOutput(logits, z.sigmoid(), z))
    return found, labels


def names(early_exits: int) -> dict[str, object]:
    """What the text speaks of."""
    net = lived_in(eefast.zoo.eenet("eenet20", early_exits, input_shape=SHAPE, criterion="max_probability"), 1).eval()
    net.cost.copy_(torch.linspace(0.05, 1, early_exits + 1))  # of a deeper one
    outputs, labels = outputs_of(early_exits + 1)
    found = {"net": net, "outputs": outputs, "labels": labels, "thresholds": [0.9] * early_exits, "x": images(3, SHAPE)}
    modules = {"eefast": eefast, "torch": torch, "inf": inf, "calibrate": calibrate, "fit_rule": fit_rule}
    modules |= {"carried": carried, "scaled": scaled, "fold_scaling": fold_scaling}
    return found | modules | {"find_thresholds_and_exits": find_thresholds_and_exits}


def run(code: str, names: dict[str, object]) -> dict[str, object]:
    exec(compile(code, "exit-rules.md", "exec"), names)
    return names


def test_rules_and_bounds_run():
    found = run(RULES, names(3))
    assert found["net"].criterion.name == "carried"
    found = run(BOUND, names(3))
    assert found["found"].assurance == 0.9
    assert found["net"].thresholds.tolist() == list(found["found"].thresholds)


def test_profiles_and_their_policies_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = names(5)
    ids = torch.tensor([0, 1, 2])
    requests = [(given["x"], ids)]
    found = run(PROFILES, given | {"ids": ids, "limits": [0, 5, 2], "requests": requests})
    assert list(eefast.load(tmp_path / "runs" / "mine").profiles) == ["full", "normal", "eco"]
    waiting = queue.Queue()
    for _ in range(600):
        waiting.put(None)
    batch = [SimpleNamespace(gold=i == 1, image=image) for i, image in enumerate(given["x"])]
    battery = SimpleNamespace(joules=lambda: 600.0)
    found |= {"battery": battery, "hours_until_charged": lambda: 1.0, "queue": waiting, "batch": batch}
    found = run(POLICIES, found)
    assert found["ids"].tolist() == [2, 0, 2], "the queue is long; gold customers never notice"
    assert found["result"].exit_index.tolist()[1] == 5
    choose = found["profile"]
    # Joules an image: 0.5, 0.09, 0.08, 0.05 and 0.01.
    names_of = [choose(joules, 2.0, 100) for joules in (100, 18, 16, 10, 2)]
    assert names_of == ["full", "normal", "eco", "eco", "eco"]
    assert set(names_of) == set(found["net"].profiles)


def test_exits_that_do_not_pay_and_online_choices_run():
    given = names(2)
    found = run(DROPPED, dict(given))
    assert found["net"].num_exits == 2 - len(found["left_out"])
    net = given["net"]
    net.profiles = {"full": [inf] * 2, "eco": [0.5] * 2}
    found = run(ONLINE, given | {"fast": eefast.accelerate(net, engine="compact"), "batches": [given["x"]] * 3})
    assert 0 < found["controller"].setpoint <= 1
    assert found["state"] == found["controller"].state_dict()


@pytest.mark.parametrize("line", [line for line in DOCUMENT.splitlines() if line.startswith("eefast calibrate")])
def test_the_commands_have_these_options(line):
    known = {option for p in get_command(app).commands["calibrate"].params for option in p.opts}
    assert {word for word in shlex.split(line, comments=True) if word.startswith("--")} <= known
