"""Generated sensor windows: what is promised of them, and that a network can learn and answer them faster."""

from __future__ import annotations

import pytest
import torch
from networks import assert_same_answers
from torch import nn

import eefast
from eefast.data.sensors import sensor_windows
from eefast.thresholds import outputs
from eefast.thresholds.calibration import calibrate
from eefast.train.losses import deep_supervision


def test_the_same_seed_gives_the_same_windows() -> None:
    x, labels = sensor_windows(97, 31, seed=3)
    assert x.shape == (97, 6, 31)
    assert (x.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert set(labels.tolist()) == set(range(6))
    again, _ = sensor_windows(97, 31, seed=3)
    assert torch.equal(x, again)
    other, _ = sensor_windows(97, 31, seed=4)
    assert not torch.equal(x, other)
    assert sensor_windows(0, 1)[0].shape == (0, 6, 1)


def test_a_class_has_its_frequency() -> None:
    x, labels = sensor_windows(600, 500)
    power = torch.fft.rfft(x - x.mean(2, keepdim=True), dim=2).abs().square().mean(1)
    hertz = torch.fft.rfftfreq(500, 1 / 50)
    for k in range(6):
        mean = power[labels == k].mean(0)
        # The fundamental or its harmonic, a tenth of a hertz being the resolution.
        peak = float(hertz[mean.argmax()])
        assert min(abs(peak - (1 + 0.35 * k)), abs(peak / 2 - (1 + 0.35 * k))) < 0.2, k


@pytest.mark.parametrize(("count", "length"), [(-1, 5), (5, 0)])
def test_numbers_that_make_no_windows(count: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"count={count} and length={length}"):
        sensor_windows(count, length)


def trained() -> eefast.EarlyExitNet:
    torch.manual_seed(0)

    def layers(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv1d(inputs, outputs, 7, 2, 3), nn.BatchNorm1d(outputs), nn.ReLU()]

    backbone = nn.Sequential(
        *layers(6, 16), *layers(16, 24), *layers(24, 48), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, 6)
    )
    net = eefast.attach(backbone, ["2", "5"], input_shape=(6, 64))
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(80):
        x, labels = sensor_windows(48, 64, seed=100 + step)
        optimiser.zero_grad()
        deep_supervision(net(x), labels, net.cost).backward()
        optimiser.step()
    return net.eval()


def test_training_calibration_and_every_engine() -> None:
    net = trained()
    x, labels = sensor_windows(400, 64, seed=1)
    found, wanted = outputs.collect(net, [(x, labels)])
    last = (found[-1].logits.argmax(1) == wanted).float().mean().item()
    assert last > 0.6  # one in six would be chance
    chosen = calibrate(found, wanted, net.cost, "max_probability", max_accuracy_drop=0.03)
    assert chosen.cost < 0.95
    assert chosen.accuracy >= last - 0.031
    net = net.with_criterion("max_probability", chosen.thresholds)
    test, truth = sensor_windows(200, 64, seed=2)
    with torch.no_grad():
        result = net(test)
    assert len(result.exit_index.unique()) > 1
    assert (result.labels == truth).float().mean() > last - 0.1
    for engine in ("compact", "auto"):
        assert_same_answers(eefast.accelerate(net, engine=engine)(test), result, net)
