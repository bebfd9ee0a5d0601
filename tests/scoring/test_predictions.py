"""`eefast.predict`: the answers of the network on pixels that torchvision prepared, image by image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import lived_in
from pictures import photograph
from PIL import Image
from torchvision import transforms

import eefast
from eefast import zoo
from eefast.data.image_files import ImageFileError


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


@pytest.mark.parametrize("mode", ["I;16", "L", "P", "RGBA", "LA", "CMYK"])
def test_images_of_pillow_are_read_as_their_files(network: Path, tmp_path: Path, mode: str) -> None:
    picture = photograph(25, 21, seed=5)
    if mode == "I;16":
        picture = Image.fromarray(np.arange(25 * 21, dtype=np.uint16).reshape(25, 21) * 100)
    else:
        picture = picture.convert(mode)
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    picture.save(path)
    assert eefast.predict(network, picture)[0].top == eefast.predict(network, path)[0].top


def test_floats_of_pillow_have_no_agreed_scale(network: Path) -> None:
    with pytest.raises(
        ImageFileError, match=r"0 cannot be read as an image \(its values, 0 … 1 in mode F, have no agreed"
    ):
        eefast.predict(network, Image.fromarray(np.linspace(0, 1, 525, dtype=np.float32).reshape(25, 21)))


def test_images_of_pillow_that_cannot_be_read_are_recorded(network: Path, tmp_path: Path) -> None:
    photograph(25, 21, seed=5).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:300])
    with Image.open(tmp_path / "x.png") as picture:
        first, second = eefast.predict(network, [picture, photograph(25, 21, seed=5)], on_error="record")
    assert "cannot be read as an image" in first.error
    assert second.error is None


@pytest.mark.parametrize(("name", "shape"), [("eenet8", (3, 17, 17)), ("eenet20-1d", (6, 31))])
@pytest.mark.parametrize("bytes_", [False, True])
def test_rows_of_arrays(tmp_path: Path, name: str, shape: tuple[int, ...], bytes_: bool) -> None:
    net = lived_in(zoo.eenet(name, num_classes=4, input_shape=shape, normalization=((0.5,) * shape[0],) * 2), 1)
    values = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    normalised = values.astype(np.float64) / 127.5 - 1
    np.save(tmp_path / "x.npy", values if bytes_ else normalised)
    with torch.no_grad():
        expected = net(torch.from_numpy(normalised).float())
    found = eefast.predict(net, tmp_path / "x.npy", batch_size=2)
    assert [answer.image for answer in found] == [f"{tmp_path / 'x.npy'}:{row}" for row in range(5)]
    assert [(answer.label, answer.exit) for answer in found] == list(
        zip(expected.labels.tolist(), expected.exit_index.tolist(), strict=True)
    )
    assert [answer.probability for answer in found] == pytest.approx(expected.probs.amax(1).tolist(), abs=1e-4)


def test_rows_beside_image_files(network: Path, pictures: Path, pixels: dict, tmp_path: Path) -> None:
    first, second = list(pixels)[:2]
    np.save(tmp_path / "x.npy", np.stack([pixels[second], pixels[first]]))
    found = eefast.predict(network, [pictures / first, tmp_path / "x.npy", pictures / second])
    assert [found[i].top for i in (2, 1)] == [found[i].top for i in (0, 3)]
    assert found[0].top != found[1].top
    windows = zoo.eenet("eenet20-1d", 1, input_shape=(6, 31))
    with pytest.raises(ValueError, match=r"takes windows \[N, 6, L\], no image files"):
        eefast.predict(windows, pictures / first)
    with pytest.raises(ValueError, match=r"save \[N, 6, L\]"):
        eefast.predict(windows, tmp_path / "x.npy")


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
        ("nowhere.png", {}, r"nowhere\.png does not exist; give image files, folders"),
        ([], {"top": 0}, "top=0 must be at least 1"),
        ([], {"on_error": "skip"}, "on_error='skip' is unknown; choose fail or record"),
    ],
)
def test_wrong_calls(network: Path, images: object, more: dict, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        eefast.predict(network, images, **more)
    with pytest.raises(TypeError, match=r"images\[0\] is a int; give paths, or images of Pillow"):
        eefast.predict(network, [3])
