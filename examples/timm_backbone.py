"""A vision transformer of timm → the same with exits that read its class token, saved and loaded by its name."""

import torch
from torch.nn.functional import cross_entropy

import eefast
from eefast.surgery import backbone, new_parameters

SHAPE, CLASSES = (3, 224, 224), 4

if __name__ == "__main__":
    torch.manual_seed(0)
    # Of timm by its name, so that it can be saved; its published weights: eefast train --backbone --weights NAME.
    body = backbone("timm:vit_tiny_patch16_224", num_classes=CLASSES)
    net = eefast.attach(body, ["blocks.2", "blocks.6"], head="token", input_shape=SHAPE, criterion="max_probability")

    # Exits that agree with the network's last answer, which needs no labels; the backbone stays as it is.
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    optimiser = torch.optim.Adam([parameter for _, parameter in new_parameters(net)], 0.01)
    net.train()
    net.stages.eval()
    for _ in range(2):
        *early, final = net(torch.randn(8, *SHAPE))
        answers = final.logits.detach().argmax(1)
        sum(cross_entropy(out.logits, answers) for out in early).backward()
        optimiser.step()
        optimiser.zero_grad()

    net.eval().save("runs/vit")
    fast = eefast.accelerate(eefast.load("runs/vit"))
    fast.thresholds.fill_(0.3)
    result = fast(torch.randn(8, *SHAPE))
    print(f"{fast.plan.engine} engine, cost of each exit {[round(c, 3) for c in net.cost.tolist()]}, ", end="")
    print(f"images per exit {result.exit_index.bincount(minlength=3).tolist()}")
