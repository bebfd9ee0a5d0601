"""`eefast.predict`: the answers of the network on pixels that torchvision prepared, image by image."""

from pathlib import Path

import pytest
import torch
from pictures import photograph
from PIL import Image
from torchvision import transforms

import eefast


def by_hand(network: Path, path: Path, resize: int = 20) -> tuple[eefast.EarlyExitNet, eefast.ExitResult]:
    net = eefast.load(network)
    steps = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(17), transforms.PILToTensor()])
    with Image.open(path) as image:
        pixels = steps(image.convert("RGB"))
    with torch.no_grad():
        return net, net(pixels[None])


@pytest.mark.parametrize("crop_fraction", [None, 1.0])
def test_answers_are_the_networks(network: Path, pictures: Path, crop_fraction: float | None) -> None:
    found = eefast.predict(network, pictures, top=3, crop_fraction=crop_fraction, batch_size=7)
    assert [answer.image for answer in found] == sorted(str(path) for path in pictures.rglob("*.*"))
    assert len(found) == 23
    assert len({answer.exit for answer in found}) > 1
    for answer in found:
        net, expected = by_hand(network, Path(answer.image), 20 if crop_fraction is None else 17)
        best = expected.probs[0].topk(3)
        assert [candidate.label for candidate in answer.top] == best.indices.tolist()
        assert [candidate.name for candidate in answer.top] == [net.classes[i] for i in best.indices]
        assert [candidate.probability for candidate in answer.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert answer.exit == int(expected.exit_index)
        assert answer.cost == float(expected.cost)
        assert answer.confidence == pytest.approx(float(expected.confidence), abs=1e-5)
        assert (answer.label, answer.name) == (int(best.indices[0]), net.classes[best.indices[0]])


def test_images_of_pillow_paths_and_networks(network: Path, tmp_path: Path) -> None:
    net = eefast.load(network).train()
    net.classes = None
    picture = photograph(25, 21, seed=5)
    picture.save(tmp_path / "no ending", "PNG")
    first, second = eefast.predict(net, [picture, str(tmp_path / "no ending")])
    assert net.training
    assert (first.image, second.image) == ("0", str(tmp_path / "no ending"))
    assert first.top == second.top
    assert first.name is None
    assert eefast.predict(net, picture)[0].top == first.top


def test_images_that_cannot_be_read(network: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    photograph().save(good)
    bad.write_bytes(good.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        eefast.predict(network, [good, bad])
    whole, broken, again = eefast.predict(network, [good, bad, good], on_error="record")
    assert whole.top == again.top
    assert whole.error is None
    assert "bad.png cannot be read" in broken.error
    assert broken.label is broken.name is broken.probability is broken.exit is None
    assert eefast.predict(network, bad, on_error="record")[0].error == broken.error


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        ([], {}, "there are no images to answer"),
        ("nowhere.png", {}, r"nowhere\.png does not exist; give image files, or folders"),
        ([], {"top": 0}, "top=0 must be at least 1"),
        ([], {"on_error": "skip"}, "on_error='skip' is unknown; choose fail or record"),
    ],
)
def test_wrong_calls(network: Path, images: object, more: dict, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        eefast.predict(network, images, **more)
    with pytest.raises(TypeError, match=r"images\[0\] is a int; give paths, or images of Pillow"):
        eefast.predict(network, [3])
