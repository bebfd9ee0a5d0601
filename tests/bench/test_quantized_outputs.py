"""bench/quantized_outputs.py: the outputs are those of PyTorch's exact integers, or an error says that they are not."""

import pytest
import quantized_outputs
import torch
from networks import images, lived_in

import eefast
from eefast.engines.resident import ResidentEngine
from eefast.thresholds.outputs import collect

SHAPE = (3, 11, 9)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = lived_in(eefast.zoo.eenet("eenet14", 2, "linear", "conv1", input_shape=SHAPE), 5)
    return eefast.quantize(made, images(20, SHAPE))


def test_outputs_are_those_of_pytorch(net):
    batches = images(45, SHAPE).split(37)
    found = quantized_outputs.outputs(net, batches)
    expected, _ = collect(net, [(x, torch.zeros(len(x))) for x in batches])
    assert len(found) == 3
    for got, wanted in zip(found[:-1], expected, strict=False):
        assert all(map(torch.equal, got, wanted))
    torch.testing.assert_close(found[-1].logits, expected[-1].logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [0, 2])
def test_other_integers_are_an_error(net, first, monkeypatch):
    part = ResidentEngine.part

    def wrong(self, x, thresholds, begin, end):
        made = part(self, x, thresholds, begin, end)
        if begin == first:
            for answer in (made.features, made.result.logits):
                if answer is not None:
                    answer[0] += 1
        return made

    monkeypatch.setattr(ResidentEngine, "part", wrong)
    with pytest.raises(RuntimeError, match=["exit 0: the resident engine's maps", "", "the final exit: "][first]):
        quantized_outputs.outputs(net, [images(5, SHAPE)])
