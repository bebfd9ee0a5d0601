"""bench/drift.py: images drift as it says, rows hold what each way answered, the figure is drawn."""

import drift
import pytest
import torch
from networks import images, lived_in

from eefast import zoo
from eefast.online import BudgetController
from eefast.result import ExitResult

SHAPE = (1, 12, 12)


@pytest.fixture(scope="module")
def stream():
    pixels = torch.arange(120, dtype=torch.uint8)[:, None, None, None].expand(-1, *SHAPE).contiguous()
    return drift.stream_of(pixels, torch.arange(120) % 10, 6)


def test_images_as_they_are_then_drifting_then_drifted(stream):
    assert stream.strength == pytest.approx([0.0] * 9 + [0.5] + [1.0] * 10)
    middles = torch.cat([part[:, 0, 6, 6] for part in stream.images])  # of even images, which nothing changes
    assert middles.sort().values.tolist() == list(range(120))
    assert torch.cat(stream.labels).equal(middles.long() % 10)
    assert not middles.equal(middles.sort().values)


def test_turned_and_blurred():
    """A dot right of the centre moves by the angle, counter-clockwise, and spreads by σ."""
    pixels = torch.zeros(1, 1, 41, 41, dtype=torch.uint8)
    pixels[0, 0, 19:22, 33:36] = 255  # 14 to the right
    assert drift.drifted(pixels, 0.0).equal(pixels)
    for strength in (0.5, 1.0):
        found = drift.drifted(pixels, strength)[0, 0].double()
        along = torch.arange(41, dtype=torch.float64) - 20
        x, y = (float((found.sum(dim) * along).sum() / found.sum()) for dim in (0, 1))
        angle = torch.deg2rad(torch.tensor(drift.DEGREES * strength, dtype=torch.float64))
        assert (x, y) == pytest.approx((14 * float(angle.cos()), -14 * float(angle.sin())), abs=0.3)
        spread = float((found.sum(0) * (along - x) ** 2).sum() / found.sum())
        assert spread == pytest.approx(2 / 3 + (drift.SIGMA * strength) ** 2, abs=0.35)


def test_a_row_holds_means_of_batches_before_and_after(stream, tmp_path):
    random = torch.Generator().manual_seed(0)
    results = []

    def answer(batch):
        n = len(batch)
        logits, confidence = torch.randn(n, 10, generator=random), torch.rand(n, generator=random)
        results.append(ExitResult(logits, torch.zeros(n, dtype=torch.int64), confidence, confidence.square()))
        return results[-1], "eco" if len(results) % 2 else "full"

    row = drift.measured("made", drift.Way("bandit", answer, price=0.25), stream)
    accuracy = [float((r.labels == labels).double().mean()) for r, labels in zip(results, stream.labels, strict=True)]
    assert row.accuracy == pytest.approx(accuracy)
    assert row.cost == pytest.approx([float(r.cost.mean()) for r in results])
    assert row.confidence == pytest.approx([float(r.confidence.mean()) for r in results])
    for figures, part in ((row.before, slice(0, 9)), (row.after, slice(10, 20))):
        assert figures == pytest.approx([sum(f[part]) / len(f[part]) for f in (row.accuracy, row.cost, row.confidence)])
    assert row.profiles == ("eco", "full") * 10
    assert (row.batch_size, row.price, row.target) == (6, 0.25, None)
    assert "bandit" in drift.table([row])[-1]
    drift.draw([row], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_every_way_answers_with_the_thresholds_that_it_says():
    net = lived_in(zoo.eenet("eenet20", 2, input_shape=SHAPE), 5).with_criterion(drift.CRITERION).eval()
    x = images(31, SHAPE)
    path = torch.tensor([[torch.inf] * 2, [0.6, 0.6], [0.2, 0.2]])
    controller = BudgetController(path, [1.0, 0.1, 0.05], 0.1, images=31)
    named = {way.name: way for way in drift.ways(net, controller, 0.1)}
    assert (named["no early exit"].answer(x)[0].exit_index == 2).all()
    first = net(x, thresholds=path[1])
    for name in ("fixed thresholds", "budget"):  # the controller's first row is the fixed one
        assert named[name].answer(x)[0].exit_index.equal(first.exit_index)
    assert controller.setpoint < 0.1  # the budget's answers were counted
    result, profile = named["bandit"].answer(x)
    assert profile in net.profiles
    assert result.exit_index.equal(net(x, profile=profile).exit_index)
