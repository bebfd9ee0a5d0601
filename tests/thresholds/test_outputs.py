"""Cached outputs of all exits: written, read, and what they answer under thresholds."""

import pytest
import torch
from made_outputs import make_outputs
from networks import images, lived_in, spread_thresholds

from eefast import zoo
from eefast.thresholds import outputs as cached


def test_cached_outputs_come_back_bit_by_bit(tmp_path) -> None:
    outputs, labels = make_outputs(31, 3, 0)
    outputs[1].confidence_logit[3] = float("nan")
    path, made_of = tmp_path / "held.safetensors", {"network": "abc", "images": "31 of some"}
    cached.save_outputs(path, outputs, labels, made_of)
    again, same = cached.load_outputs(path, made_of)
    assert torch.equal(same, labels)
    for one, two in zip(outputs, again, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))
    with pytest.raises(ValueError, match=r"was collected with images=31 of some, not 7; delete it or name another"):
        cached.load_outputs(path, {**made_of, "images": "7"})
    with pytest.raises(ValueError, match=r"was collected with network=abc, not None"):
        cached.load_outputs(path, {"images": "31 of some"})


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-5], lambda whole: whole.replace(b"labels", b"labelz")], ids=["cut off", "renamed"]
)
def test_damaged_cache_is_named(tmp_path, damage) -> None:
    outputs, labels = make_outputs(3, 2, 0)
    path = tmp_path / "held.safetensors"
    cached.save_outputs(path, outputs, labels, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"held.safetensors is not a complete file of cached outputs.*delete it"):
        cached.load_outputs(path, {})


@pytest.mark.parametrize("criterion", ["learned", "entropy"])
def test_cached_outputs_answer_as_the_network(criterion) -> None:
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12), criterion=criterion), 1)
    x = images(31, (1, 12, 12))
    spread_thresholds(net, x, 0.4)
    outputs, _ = cached.collect(net, [(x, torch.zeros(31))])
    got = cached.by_thresholds(outputs, net, criterion, net.thresholds)
    expected = net(x)
    assert torch.equal(got.exit_index, expected.exit_index)
    assert torch.equal(got.cost, expected.cost)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("collect", [cached.collect, cached.collect_answers])
def test_batches_must_not_be_empty(collect) -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        collect(zoo.eenet("eenet8", input_shape=(1, 28, 28)), [])
