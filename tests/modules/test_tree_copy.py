"""Copies of module trees: the same answers, nothing shared, whatever the modules hold."""

from __future__ import annotations

import threading

import pytest
import torch
from networks import images
from torch import Tensor, nn

from eefast.modules.tree_copy import TreeCopy


class Holder(nn.Module):
    """Calls modules that it holds in a list and in a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(2)])
        self.listed, self.closed, self.lock = [self.convs[0]], lambda x: self.convs[1](x), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.closed(self.listed[0](x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_copy_shares_no_tensor_and_no_attribute():
    module = nn.Sequential(Holder(), nn.utils.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    module(images(2, (3, 4, 4))).sum().backward()  # the weight is no leaf any more: copy.deepcopy fails
    copied = TreeCopy(module, lambda t: t.detach().clone()).of(module).eval()
    x = images(2, (3, 4, 4))
    want = module.eval()(x)
    torch.testing.assert_close(copied(x), want)
    with torch.no_grad():
        for t in copied.state_dict().values():
            t.zero_()
    copied[0].listed.clear()
    torch.testing.assert_close(module(x), want)
    assert not copied[1].weight.requires_grad
    assert copied[0].convs[0] is not module[0].convs[0]
