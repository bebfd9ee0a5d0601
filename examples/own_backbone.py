"""A backbone of torchvision → the same with early exits: trained, its thresholds chosen, run and saved."""

import torch
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock, ResNet

import eefast
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.outputs import collect

SHAPE, CLASSES = (3, 32, 32), 4


def images(n, seed):
    """Noisy patterns, one for each class: put your own images here."""
    patterns = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return patterns[labels] + 2 * torch.randn(n, *SHAPE, generator=generator), labels


if __name__ == "__main__":
    torch.manual_seed(0)
    backbone = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)  # or torchvision.models.resnet18(weights=...)
    net = eefast.attach(backbone, ["layer1", "layer2"], input_shape=SHAPE, criterion="max_probability")

    optimiser = torch.optim.Adam(net.train().parameters(), 0.001)
    for step in range(20):
        x, labels = images(32, 1 + step)
        sum(cross_entropy(out.logits, labels) for out in net(x)).backward()
        optimiser.step()
        optimiser.zero_grad()

    outputs, labels = collect(net.eval(), [images(500, 1000)])  # held-out images: what every exit says
    found = calibrate(outputs, labels, net.cost, "max_probability", max_accuracy_drop=0.02)
    net.thresholds.copy_(torch.tensor(found.thresholds))

    fast = eefast.accelerate(net)
    x, labels = images(256, 2000)
    result = fast(x)
    print(f"{fast.plan.engine} engine, accuracy {(result.labels == labels).float().mean():.3f}, ", end="")
    print(f"mean cost {result.cost.mean():.3f}, images per exit {result.exit_index.bincount(minlength=3).tolist()}")
    torch.save(net.state_dict(), "net.pt")  # of a backbone by eefast.surgery.backbone: net.save("runs/mine")
