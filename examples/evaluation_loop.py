"""Test images → accuracy with early exits and without: an accelerated network in the place of a classifier."""

from pathlib import Path

import torch
import torchmetrics
from torch.utils.data import DataLoader, TensorDataset

import eefast
from eefast.data.mnist import mnist_test

SHIPPED = Path(eefast.__file__).parent / "assets/eenet-mnist"


def evaluate(model, loader):
    """As written for any classifier."""
    accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for images, labels in loader:
            accuracy.update(model(images).argmax(1), labels)
    return float(accuracy.compute())


if __name__ == "__main__":
    net = eefast.load(SHIPPED)
    images, labels = mnist_test()
    loader = DataLoader(TensorDataset(images[:1000], labels[:1000]), batch_size=250)
    fast = eefast.accelerate(net, output="logits")
    print(f"accuracy with early exits {evaluate(fast, loader):.3f}")
    fast.thresholds.fill_(1.0)  # no image exits early
    print(f"accuracy without {evaluate(fast, loader):.3f}")
