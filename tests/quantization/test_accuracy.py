"""The trained network that the package ships, quantised, on the test images that it ships."""

from importlib import resources

import pytest

import eefast
from eefast.data.mnist import mnist_test
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.outputs import collect, outcome


def shipped():
    with resources.as_file(resources.files("eefast") / "assets" / "eenet-mnist") as folder:
        return eefast.load(folder)


def outputs_of(net, images, labels):
    return collect(net, zip(images.split(250), labels.split(250), strict=True))[0]


def accuracy_of_last(outputs, labels):
    return float((outputs[-1].logits.argmax(1) == labels).double().mean())


@pytest.mark.parametrize(("winograd", "images"), [pytest.param(False, 1000, marks=pytest.mark.slow), ("auto", 100)])
def test_the_last_exit_stays_accurate(winograd, images):
    """Measured on all 10,000, ranges from 1,000 training images: 99.49 %, 99.49 % direct, 99.48 % with Winograd."""
    pixels, labels = mnist_test()
    net = shipped()
    # No training images are shipped; those of the calibration are not among those that are counted.
    quantized = eefast.quantize(net, pixels[-128:], winograd=winograd)
    pixels, labels = pixels[:images], labels[:images]
    expected = accuracy_of_last(outputs_of(net, pixels, labels), labels)
    assert accuracy_of_last(outputs_of(quantized, pixels, labels), labels) >= expected - 0.001 - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("winograd", [False, "auto"])
def test_recalibrated_thresholds_keep_the_accuracy_within_the_cost(winograd):
    """Beside the float network with thresholds that are chosen on the same images within the same cost."""
    pixels, labels = mnist_test()
    net, chosen, counted = shipped(), slice(0, None, 5), slice(1, None, 5)
    quantized = eefast.quantize(net, pixels[chosen], labels[chosen], winograd=winograd)
    before = outputs_of(net, pixels[chosen], labels[chosen])
    _, cost = outcome(before, labels[chosen], net.cost, "learned", net.thresholds.tolist())
    thresholds = calibrate(before, labels[chosen], net.cost, "learned", max_cost=cost).thresholds
    expected = outcome(
        outputs_of(net, pixels[counted], labels[counted]), labels[counted], net.cost, "learned", thresholds
    )
    outputs = outputs_of(quantized, pixels[counted], labels[counted])
    found = outcome(outputs, labels[counted], net.cost, "learned", quantized.thresholds.tolist())
    assert found[0] >= expected[0] - 0.004  # of 2,000 images; one standard error is 0.002
    assert found[1] <= cost + 0.01
