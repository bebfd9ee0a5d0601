"""bench/int8_accuracy.py: its rows are what the networks answer, on images that no range and no threshold came from."""

import re
from dataclasses import replace

import int8_accuracy
import pytest
import torch
from idx_files import write_mnist
from int8_accuracy import Images
from networks import images, lived_in, spread_thresholds
from targets import int8_checks

import eefast
from eefast.data import datasets

SHAPE, HELD_OUT, SEED = (1, 12, 12), 37, 3


@pytest.fixture(scope="module")
def measured():
    """A network, its test images and their rows."""
    torch.manual_seed(0)
    net = lived_in(eefast.zoo.eenet("eenet20", 2, input_shape=SHAPE), 5)
    held_out, test = (Images(images(n, SHAPE), torch.arange(n) % 10) for n in (48, 31))
    spread_thresholds(net, test.pixels, 0.4)
    return net, test, int8_accuracy.measured("eenet20 on mnist", net, held_out, test)


def test_every_way_has_both_thresholds(measured):
    _, _, rows = measured
    assert [(row.way, row.origin) for row in rows] == [
        (way, origin)
        for way in ("float32", "int8, direct", "int8, F(2, 3)", "int8, F(2×2, 3×3)", "int8")
        for origin in ("of float32", "recalibrated")
    ]
    assert {row.images for row in rows} == {31}
    assert {sum(row.exits) for row in rows} == {31}
    assert rows[0].details == ""
    assert re.fullmatch(r"\d+ direct in stages 0, 1, 2", rows[2].details)
    for row, name in ((rows[4], r"F\(2,3\)"), (rows[6], r"F\(2×2\)")):
        direct, fast = map(
            int, re.fullmatch(rf"(\d+) direct in .*; (\d+) {name} in stages 0, 1, 2", row.details).groups()
        )
        assert direct + fast == int(rows[2].details.split()[0])


@pytest.mark.parametrize("number", range(4))
def test_a_row_is_what_the_network_answers(measured, number):
    net, test, rows = measured
    row, expected = rows[number], net(test.pixels)
    made = net
    if number >= 2:
        made = eefast.quantize(net, images(48, SHAPE), winograd=False)
    answer = made.with_criterion(net.criterion.name, row.thresholds)(test.pixels)
    assert row.accuracy == pytest.approx(float((answer.labels == test.labels).double().mean()))
    assert row.mean_cost == pytest.approx(float(answer.cost.mean()))
    assert row.elsewhere == int((answer.exit_index != expected.exit_index).sum())
    assert row.other_answers == int((answer.labels != expected.labels).sum())
    last = made.plain()(test.pixels).argmax(1)
    assert row.last_accuracy == pytest.approx(float((last == test.labels).double().mean()))


def test_float32_takes_its_own_exits(measured):
    _, _, rows = measured
    assert (rows[0].elsewhere, rows[0].other_answers) == (0, 0)
    assert min(rows[0].exits) > 0


@pytest.fixture
def trained(tmp_path):
    """A network trained on 100 images, of which `HELD_OUT` were kept aside; the folder of the images."""
    write_mnist(tmp_path / "mnist", "train", 100)
    write_mnist(tmp_path / "mnist", "t10k", 60)
    net = eefast.zoo.eenet("eenet8", 2, input_shape=(1, 28, 28))
    known = datasets.dataset("mnist", tmp_path, "train")
    net.record = datasets.record("eenet8", 10, (1, 28, 28), "mnist", known, HELD_OUT, SEED)
    return net.eval(), tmp_path


@pytest.mark.parametrize("most", [None, 16])
def test_images_are_those_held_out_and_those_of_the_test(trained, most):
    net, root = trained
    held_out, test = int8_accuracy.data_of(net, root, root, most)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(SEED))[100 - HELD_OUT :]
    train, last = (datasets.dataset("mnist", root, part) for part in ("train", "test"))
    assert torch.equal(held_out.pixels, torch.stack([train[int(i)][0] for i in order])[:most])
    assert test.labels.tolist() == [int(last[i][1]) for i in range(most or 60)]
    assert int8_accuracy.name_of(net) == "eenet8 on mnist"


def test_a_network_of_unknown_data_is_refused(trained):
    net, root = trained
    net.record = None
    with pytest.raises(ValueError, match=r"has no training\.json, so its data are unknown"):
        int8_accuracy.data_of(net, root, root)


def test_the_thresholds_of_a_folder_are_those_of_its_file():
    assert int8_accuracy.opened(int8_accuracy.SHIPPED).thresholds[0] == pytest.approx(0.97785, abs=1e-5)


@pytest.mark.parametrize(
    ("data", "field", "lost", "verdict"),
    [
        ("mnist", "last_accuracy", 0.001, "reached: eenet20 on mnist, int8: last exit loses ≤ 0.1 points: +0.10"),
        ("mnist", "last_accuracy", 0.0011, "NOT REACHED: eenet20 on mnist, int8: last exit"),
        ("cifar10", "last_accuracy", 0.003, "reached: eenet20 on cifar10, int8: last exit loses ≤ 0.3 points: +0.30"),
        ("cifar10", "last_accuracy", 0.0031, "NOT REACHED: eenet20 on cifar10, int8: last exit"),
        ("mnist", "accuracy", 0.002, "reached: eenet20 on mnist, int8: recalibrated, ≤ 0.2 points less: +0.20"),
        ("mnist", "accuracy", 0.0021, "NOT REACHED: eenet20 on mnist, int8: recalibrated"),
    ],
)
def test_bounds_of_accuracy(measured, data, field, lost, verdict):
    before = replace(measured[2][1], quantized=f"eenet20 on {data}", accuracy=0.9, last_accuracy=0.95)
    after = replace(before, way="int8", **{field: getattr(before, field) - lost})
    found = int8_checks([vars(before), vars(after)])
    assert len(found) == 2
    assert any(line.startswith(verdict) for line in found), found
