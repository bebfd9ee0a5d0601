"""Costs: multiply-accumulates as EENets counts them, and the cost of every exit."""

import pytest
import torch
from torch import nn

from eefast import zoo
from eefast.cost import StageCost, macs, path_costs, stage_costs
from eefast.heads import ExitHead

SHAPE = (3, 13, 11)


@pytest.mark.parametrize(
    ("module", "shape", "counted", "out"),
    [
        (nn.Conv2d(3, 8, 3, bias=False), (3, 7, 5), 27 * 120, (8, 5, 3)),
        (nn.Conv2d(3, 8, 3), (3, 7, 5), 28 * 120, (8, 5, 3)),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False), (4, 7, 5), 18 * 48, (8, 3, 2)),
        (nn.ConvTranspose2d(3, 8, 2, stride=2, bias=False), (3, 2, 2), 12 * 32, (8, 4, 4)),
        (nn.Linear(8, 5), (8,), 40, (5,)),
        (nn.BatchNorm2d(3), (3, 7, 5), 2 * 105, (3, 7, 5)),
        (nn.BatchNorm2d(3, affine=False), (3, 7, 5), 105, (3, 7, 5)),
        (nn.ReLU(), (3, 7, 5), 105, (3, 7, 5)),
        (nn.ReLU(inplace=True), (3, 7, 5), 105, (3, 7, 5)),
        (nn.AdaptiveAvgPool2d(1), (3, 7, 5), 105, (3, 1, 1)),
        (nn.MaxPool2d(2), (3, 7, 5), 105, (3, 3, 2)),
        (nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Sigmoid()), (3, 7, 5), 0, (105,)),
        (nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3)), (8,), 55, (3,)),
    ],
    ids=[
        "convolution", "with bias", "groups", "transposed", "linear", "BatchNorm", "without weights", "ReLU",
        "in place", "average", "maximum", "nothing", "sum",
    ],
)  # fmt: skip
def test_layers_cost_what_eenets_counts(module, shape, counted, out):
    assert macs(module.train(), shape) == (counted, out)
    assert module.training


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Attention(nn.Module):
    def forward(self, x):
        q = x.unflatten(2, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class OnTheCpu(nn.Module):
    """Does not run on the meta device."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x + torch.ones(x.shape[1:]).log())


@pytest.mark.parametrize(
    ("module", "counted"),
    [
        (Attention(), 2 * 5 * 5 * 8),
        (SelfAttention(), 5 * 4 * 8 * 8 + 2 * 5 * 5 * 8),
        *(
            (nn.TransformerEncoderLayer(8, 2, 12, 0.1, activation, batch_first=True), 336 * 5 + 2 * 5 * 12 * 8 + relu)
            for activation, relu in (("relu", 5 * 12), ("gelu", 0))
        ),
    ],
    ids=["attention", "with projections", "layer, ReLU", "layer, GELU"],
)
def test_attention_costs_the_same_on_every_device(module, counted):
    assert macs(OnTheCpu(module).eval(), (5, 8)) == (counted, (5, 8))
    assert macs(module.eval(), (5, 8)) == (counted, (5, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_cost_the_same(dtype):
    assert macs(nn.Conv2d(3, 8, 3).to(dtype), (3, 7, 5)) == (28 * 120, (8, 5, 3))


def test_costs_are_those_of_eval_mode():
    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(super().forward(x) if self.training else x)

    assert macs(Twice(8, 8).train(), (8,)) == (64, (8,))


def test_of_several_outputs_the_first_gives_the_shape():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    assert macs(Two(8, 5), (8,)) == (40, (5,))


def test_each_stage_reads_what_the_one_before_returns():
    stages = [nn.Conv2d(3, 4, 1, bias=False), nn.MaxPool2d(2)]
    heads = [ExitHead("pool", shape, 5, (3, 4, 4)) for shape in ((4, 4, 4), (4, 2, 2))]
    # A head: its average, five classes and the confidence row.
    assert stage_costs(stages, heads, (3, 4, 4)) == (
        StageCost(12 * 16, 64 + 24, (4, 4, 4), 5),
        StageCost(64, 16 + 24, (4, 2, 2), 5),
    )


def test_costs_are_shares_of_the_network_without_exits():
    # Without the confidence row of the final head, which reads two channels: 30 + 7 - 2.
    costs = [StageCost(10, 3, (2, 4, 4), 5), StageCost(20, 7, (2, 1, 1), 5)]
    cost, path_cost = path_costs(costs)
    assert cost.tolist() == torch.tensor([13 / 35, 1.0]).tolist()
    assert path_cost.tolist() == torch.tensor([13 / 35, 40 / 35]).tolist()


@pytest.mark.parametrize("head", ["pool", "conv2"])
def test_path_cost_counts_every_head_met(head):
    net = zoo.eenet("eenet20", 3, "fine", head)
    heads = [macs(h, c.feature_shape)[0] for h, c in zip(net.heads, net.stage_costs, strict=True)]
    stages = [c.stage_macs for c in net.stage_costs]
    plain = macs(zoo.resnet("resnet20"), (3, 32, 32))[0]
    expected = [(sum(stages[: i + 1]) + sum(heads[: i + 1])) / plain for i in range(4)]
    torch.testing.assert_close(net.path_cost, torch.tensor(expected))
    assert float(net.path_cost[-1]) == pytest.approx(1.35 if head == "conv2" else 1.001, abs=0.005)


def test_what_only_runs_with_values_is_counted_all_the_same():
    class Looking(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.amax().item() > -1e9 else x

    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    assert macs(Looking(*layers), SHAPE) == macs(nn.Sequential(*layers), SHAPE)


def test_counting_leaves_other_threads_modules_alone():
    """Torch's own counter hooks into every module of the process."""
    seen = []

    class Watching(nn.Conv2d):
        def forward(self, x):
            hooks = torch.nn.modules.module
            seen.append(len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks))
            return super().forward(x)

    macs(Watching(3, 8, 3), SHAPE)
    assert seen == [0]
