"""Verdicts: losses are said as plainly as wins, and the code that is printed runs."""

import dataclasses

import pytest
import torch
from networks import lived_in

import eefast
from eefast import zoo
from eefast.measure import verdicts
from eefast.measure.comparison import Row
from eefast.measure.verdicts import Verdict


def a_row(name, criterion, images_per_s, speedup, quantiles):
    known = {"images_per_s_quantiles": (1, 2), "mean_cost": 0.5, "accuracy": 0.9, "images": 4, "batch_size": 16}
    more = {"exits": (4,), "flips": 0, "flip_margin": 1e-4, "realised_ratio": 0.5 * speedup}
    speeds = {"images_per_s": images_per_s, "speedup": speedup, "speedup_quantiles": quantiles}
    return Row(name=name, criterion=criterion, **known, **more, **speeds)


@pytest.mark.parametrize(
    ("quantiles", "worth", "words"),
    [
        ((1.4, 1.6), True, "worth it: compact is 1.50 × as fast as plain, PyTorch, accuracy -0.47 points"),
        ((0.9, 1.6), None, "no clear difference: compact is 0.90 … 1.60 × as fast as plain, PyTorch"),
        ((0.4, 0.6), False, "not worth it: compact is 0.50 × as fast as plain, PyTorch"),
    ],
)
def test_losses_are_said_as_plainly_as_wins(quantiles, worth, words):
    speedup = 0.5 if worth is False else 1.5
    rows = [
        a_row("plain, PyTorch", None, 100, 1, (1, 1)),
        a_row(verdicts.LOOP, "learned", 200, 2, (2, 2)),
        a_row("compact", "learned", 100 * speedup, speedup, quantiles),
        a_row("resident", "learned", 10, 0.1, (0.1, 0.1)),
    ]
    verdict = verdicts.judge(rows, "plain, PyTorch")
    assert verdict.worth is worth
    sentence = verdicts.sentence(verdict, -0.0047)
    assert sentence.startswith(words)
    assert f"{speedup / 2:.2f} × the masked loop" in sentence
    # Without any of these engines eefast runs the loop.
    assert verdicts.judge(rows[:2], "plain, PyTorch").engine == "reference"


@pytest.mark.parametrize(
    ("off", "words"),
    [
        (75, "worth it: compact is 1.50 × as fast as plain, PyTorch (0.75 by the engine, 2.00 by the exits), accuracy"),
        (148, "the engine is worth it, the exits are not: compact is 1.50 × as fast as plain, PyTorch (1.48 by the en"),
    ],
)
def test_the_gain_is_split_into_engine_and_exits(off, words):
    rows = [
        a_row("plain, PyTorch", None, 100, 1, (1, 1)),
        a_row(verdicts.LOOP, "learned", 200, 2, (2, 2)),
        a_row("compact", "learned", 150, 1.5, (1.4, 1.6)),
        a_row("compact, exits off", "learned", off, off / 100, (1, 2)),
        a_row("resident", "learned", 10, 0.1, (0.1, 0.1)),
        a_row("resident, exits off", "learned", 1, 0.01, (0.1, 0.1)),
    ]
    assert verdicts.sentence(verdicts.judge(rows, "plain, PyTorch"), 0).startswith(words)


def test_the_code_runs_what_was_found(tmp_path):
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 3)
    net.save(tmp_path)
    net = net.with_criterion("entropy", [0.1, 1 / 3])
    first, second = (Verdict(n, True, "plain, PyTorch", "compact", (1.4, 1.5, 1.6), 2.0, 0.7) for n in (1, 9))
    lines = verdicts.code(str(tmp_path), net, [first, second], torch.float32, False)
    names = {"eefast": eefast, "torch": torch}
    exec(lines, names)
    assert names["fast"].plan.engine == "compact"
    assert names["net"].criterion.name == "entropy"
    assert torch.equal(names["net"].thresholds, net.thresholds)
    lines = verdicts.code(
        str(tmp_path), net, [first, dataclasses.replace(second, engine="reference")], torch.float64, True
    )
    assert "with_criterion" not in lines
    assert "engine='compact', dtype=torch.float64, frozen=True)  # batches of 1\n" in lines
    assert "engine='reference', dtype=torch.float64, frozen=True)  # batches of 9" in lines
    assert verdicts.code("x", net, [dataclasses.replace(first, worth=False)], torch.float32, False) == ""
    both = [first, dataclasses.replace(second, engine="resident")]
    lines = verdicts.code("x", net, both, torch.float32, True, "openvino")
    assert "engine='compact', stages='openvino', frozen=True)" in lines
    assert "engine='resident', frozen=True)" in lines


def test_int8_is_judged_against_int8():
    rows = [
        a_row("plain, PyTorch", None, 100, 1, (1, 1)),
        *(
            dataclasses.replace(a_row(name, None, speed, 1, (1, 1)), other_classes=0.01, accuracy=0.875)
            for name, speed in (("plain, slower", 200), ("plain, faster", 400))
        ),
        a_row("resident", "learned", 900, 9, (9, 9)),
    ]
    ours = dataclasses.replace(a_row(verdicts.IN_INT8["resident"], "learned", 1000, 10, (10, 10)), other_classes=0.02)
    words = "INT8, resident, is 2.50 × as fast as plain, faster, accuracy 90.00% and 87.50%"
    assert verdicts.int8_sentence([*rows, ours]) == words
    assert verdicts.int8_sentence(rows) == verdicts.int8_sentence([rows[0], ours]) == ""
