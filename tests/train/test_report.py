"""The report of a run: thresholds chosen on the held-out images alone, and shares beside loops over the images."""

import json
from pathlib import Path

import pytest
import torch
from networks import images, lived_in, one_by_one

from eefast import EarlyExitNet, criteria, zoo
from eefast.data.image_sets import ImageTensors
from eefast.data.loaders import batches
from eefast.train.options import TrainOptions
from eefast.train.report import TrainReport, make_report, write_report
from eefast.train.trainer import Fitted

Case = tuple[EarlyExitNet, dict[str, tuple[torch.Tensor, torch.Tensor]], dict[bool, TrainReport]]
MAX_COST = 0.8


@pytest.fixture(scope="module")
def case() -> Case:
    """A network, held-out and test images with labels, and reports: with test images under a cost, and without."""
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12), normalization=((0.5,), (0.25,))), 1)
    sets = {}
    for name, n in (("held-out", 67), ("test", 31)):
        pixels = (images(n, (1, 12, 12), n) * 60 + 128).clamp(0, 255).to(torch.uint8)
        labels = torch.randint(10, (n,), generator=torch.Generator().manual_seed(n))
        labels[::2] = net(net.prepare(pixels)).labels[::2]
        sets[name] = pixels, labels
    fitted = Fitted({"epoch": 4}, 0.125, [1.5, 2.5], torch.device("cpu"), True)
    held_out, test = (batches(ImageTensors(*sets[name]), 16) for name in ("held-out", "test"))
    reports = {
        True: make_report(TrainOptions(max_cost=MAX_COST), fitted, net, held_out, test),
        False: make_report(TrainOptions(max_accuracy_drop=0.25), fitted, net, held_out, None),
    }
    return net, sets, reports


@pytest.mark.parametrize("name", criteria.CRITERIA)
@pytest.mark.parametrize("part", ["held-out", "test"])
def test_figures_are_those_of_one_image_at_a_time(case: Case, name: str, part: str) -> None:
    net, sets, reports = case
    report, (pixels, labels) = reports[True], sets[part]
    measured, agreement = {
        "held-out": (report.held_out, report.held_out_agreement),
        "test": (report.test, report.test_agreement),
    }[part]
    found = measured[name]
    assert found.thresholds == report.held_out[name].thresholds
    answer = one_by_one(net.with_criterion(name, found.thresholds), net.prepare(pixels))
    final = net.all_exits(net.prepare(pixels))[-1].logits.argmax(dim=1)
    assert found.accuracy == pytest.approx(float((answer.labels == labels).double().mean()))
    assert found.cost == pytest.approx(float(answer.cost.double().mean()), abs=1e-6)
    assert agreement[name] == pytest.approx(float((answer.labels == final).double().mean()))


def test_exits_are_judged_on_all_held_out_images(case: Case) -> None:
    net, sets, reports = case
    pixels, labels = sets["held-out"]
    answers = [out.logits.argmax(dim=1) for out in net.all_exits(net.prepare(pixels))]
    for report in reports.values():
        assert report.exit_accuracy == pytest.approx([float((a == labels).double().mean()) for a in answers])
        assert report.exit_agreement == pytest.approx([float((a == answers[-1]).double().mean()) for a in answers])
    assert report.exit_agreement[-1] == 1


@pytest.mark.parametrize("name", criteria.CRITERIA)
def test_the_bound_is_the_cost_or_the_drop_below_the_final_exit(case: Case, name: str) -> None:
    _, _, reports = case
    assert reports[True].held_out[name].cost <= MAX_COST + 1e-9
    found = reports[False]
    assert found.held_out[name].accuracy >= found.exit_accuracy[-1] - 0.25 - 1e-9
    assert found.held_out[name].cost < reports[True].held_out[name].cost


def test_without_test_images_there_are_no_test_figures(case: Case) -> None:
    report = case[2][False]
    assert (report.test, report.test_agreement) == (None, None)
    assert set(report.held_out) == set(criteria.CRITERIA)


def test_the_network_gets_the_thresholds_of_its_criterion(case: Case) -> None:
    net, _, reports = case
    assert net.thresholds.tolist() == torch.tensor(reports[False].held_out["learned"].thresholds).tolist()


def test_the_run_is_described(case: Case) -> None:
    report = case[2][True]
    assert (report.best_epoch, report.best_held_out_loss, report.seconds_per_epoch) == (5, 0.125, [1.5, 2.5])
    # Where the option is not given, what was taken is recorded.
    assert report.arguments == {**TrainOptions(max_cost=MAX_COST).record(), "held_out": 67}


def test_the_files_hold_the_report(case: Case, tmp_path: Path) -> None:
    report = case[2][True]
    write_report(tmp_path, report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "thresholds.json"]
    thresholds = json.loads((tmp_path / "thresholds.json").read_text())
    assert thresholds == {name: list(c.thresholds) for name, c in report.held_out.items()}
    written = json.loads((tmp_path / "report.json").read_text())
    assert set(written) == set(vars(report))
    assert written["test"]["margin"]["accuracy"] == report.test["margin"].accuracy
