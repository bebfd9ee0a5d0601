"""Exported files answer as the network does, under every kind of rule."""

import pytest
import torch
from networks import images, spread_thresholds
from torch import nn

import eefast
from eefast import rules
from eefast.exporting.exported import load_exported
from eefast.heads import ExitHead
from eefast.planning import probe

SHAPE = (3, 12, 12)
RULES = {
    "learned": "learned",
    "entropy": "entropy",
    "survival": rules.survival(2),
    "carried": rules.carried([0.0, 0.5, 0.25]),
}


def under(net, rule):
    made = net.with_criterion(rule)
    if isinstance(rule, rules.Rule):
        for i in range(made.num_exits):
            values = made(images(64, SHAPE), thresholds=probe.thresholds(made, i)).confidence
            made.thresholds[i] = (values.min() + values.max()) / 2
    else:
        spread_thresholds(made, images(64, SHAPE), 0.4)
    return made


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rule", RULES)
def test_programs_of_stages_have_the_bits_of_the_network(net, x, tmp_path, rule):
    made = under(net, RULES[rule])
    exported = load_exported(eefast.export(made, tmp_path / "out"))
    found, wanted = exported(x), made(x)
    assert found.exit_index.tolist() == wanted.exit_index.tolist()
    assert len(wanted.exit_index.unique()) > 1
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.confidence, wanted.confidence)
    assert found.cost.tolist() == wanted.cost.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_onnx_models_answer_as_the_network(net, x, tmp_path, rule):
    pytest.importorskip("onnx", reason="needs eefast[onnx]")
    pytest.importorskip("onnxruntime", reason="needs eefast[onnx]")
    made = under(net, RULES[rule])
    folder = eefast.export(made, tmp_path / "out", format="onnx")
    wanted, together, alone = made(x), load_exported(folder)(x), load_exported(folder, single=True)
    assert len(wanted.exit_index.unique()) > 1
    one_by_one = [alone(image) for image in x.split(1)]
    for found in (together, eefast.ExitResult(*map(torch.cat, zip(*one_by_one, strict=True)))):
        assert found.exit_index.tolist() == wanted.exit_index.tolist()
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.confidence, wanted.confidence, rtol=1e-4, atol=1e-4)


def test_thresholds_may_change_and_no_image_is_an_answer(folder, x):
    exported = load_exported(folder)
    exported.thresholds = torch.full((2,), -torch.inf)
    assert exported(x).exit_index.tolist() == [0] * len(x)
    assert exported(x[:0]).logits.shape == (0, 10)


def test_a_nan_confidence_never_exits_early(net, folder, x):
    exported = load_exported(folder)
    x[3] = torch.nan
    found = exported(x)
    assert found.exit_index[3] == 2
    assert found.exit_index.tolist() == net(x).exit_index.tolist()


def test_a_network_on_rows(tmp_path):
    torch.manual_seed(0)
    shape = 2, 24
    stages = [nn.Conv1d(2, 4, 3, 2), nn.Sequential(nn.ReLU(), nn.Conv1d(4, 6, 3))]
    heads = [ExitHead("pool", (4, 11), 5, shape), ExitHead("pool", (6, 9), 5, shape)]
    net = eefast.EarlyExitNet(stages, heads, input_shape=shape, criterion="max_probability", thresholds=[0.25]).eval()
    x = torch.randn(5, 2, 24)
    found, wanted = load_exported(eefast.export(net, tmp_path / "out"))(x), net(x)
    assert found.exit_index.tolist() == wanted.exit_index.tolist()
    assert torch.equal(found.logits, wanted.logits)
