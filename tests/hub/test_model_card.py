"""The model card: its numbers are those of the evaluation, its code is the way to load the network."""

import re

import torch
from networks import images, lived_in

import eefast
from eefast.hub.model_card import card
from eefast.thresholds.evaluation import evaluate

SHAPE = (3, 12, 12)


def test_the_card_says_what_was_measured():
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, criterion="max_probability"), 1)
    net.thresholds.copy_(torch.tensor([0.25, 0.3]))
    net.classes = tuple("abcdefghij")
    result, labels = net(images(200, SHAPE)), torch.arange(200) % 10
    text = card(net, "me/small", evaluate(result, labels, net), "noise")
    right = result.labels == labels
    mean = net.cost[result.exit_index].double().mean()
    assert f"On 200 images of noise: accuracy **{right.float().mean():.2%}** at a mean cost of **{mean:.3f}**" in text
    rows = re.findall(r"^\| (\d) \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+) \|$", text, re.M)
    taken = result.exit_index.bincount(minlength=3)
    assert [(int(i), float(share)) for i, share, *_ in rows] == [(i, n / 2) for i, n in enumerate(taken.tolist()) if n]
    for i, _, accuracy, cost in rows:
        here = result.exit_index == int(i)
        assert float(accuracy) == round(100 * float(right[here].double().mean()), 2)
        assert float(cost) == round(float(net.cost[int(i)]), 3)
    assert "exits above the threshold. Thresholds of exits 0 … 1: 0.25, 0.3." in text
    assert "Classes: a, b, c, d, e, f, g, h, i, j." in text
    assert 'eefast.EarlyExitNet.from_pretrained("me/small")' in text
    assert text.startswith("---\nlibrary_name: eefast\n")


def test_what_is_not_known_is_said():
    net = eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, criterion="entropy")
    text = card(net, "me/small", None, None)
    assert "Not measured for this card." in text
    assert "an image exits below the threshold" in text
    assert "must be normalised as in training; the network does not say how" in text
    assert "not recorded which images" in text


def test_the_record_is_in_it():
    net = eefast.load(f"{eefast.__path__[0]}/assets/eenet-mnist")
    text = card(net, "me/mnist", None, None)
    assert "Trained on 55,000 images of mnist; 5,000 others were held out (seed 1)." in text
    assert "uint8 pixels, or floats normalised by mean 0.1307, std 0.3081" in text
