"""Bodies of requests: raw pixels, files, parts; each fault has its status and names its image."""

from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
import torch
from networks import lived_in
from pictures import photograph

import eefast
from eefast.data.cropping import prepared
from eefast.data.image_files import ImageFileError
from eefast.serving.bodies import RAW, BodyError, Decoder

SHAPE = (3, 5, 7)
DECODER = Decoder(SHAPE, eefast.Preprocessing(6))
FORM = 'multipart/form-data; boundary="x-y"'


def pixels(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8))


def png(seed=0):
    content = BytesIO()
    photograph(9, 11, seed=seed).save(content, "PNG")
    return content.getvalue()


def form(*given, boundary=b"x-y"):
    """A multipart body of (content type, content)."""
    parts = [b"--%s\r\nContent-Disposition: form-data\r\n%s\r\n\r\n%s\r\n" % (boundary, kind, c) for kind, c in given]
    return b"".join(parts) + b"--%s--\r\n" % boundary


@pytest.mark.parametrize("count", [1, 3, 31])
def test_raw_pixels(count):
    x = pixels(count)
    found = DECODER.images(RAW, x.numpy().tobytes())
    assert torch.equal(torch.stack(found), x)
    found[0].zero_()  # may be written to


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/JPEG; q=1", "image/anything"])
def test_a_file_is_read_by_its_content(kind):
    (found,) = DECODER.images(kind, png())
    assert torch.equal(found, prepared(photograph(9, 11, seed=0), SHAPE, eefast.Preprocessing(6)))


def test_parts_of_several_kinds_are_one_list_of_images():
    """Also contents that look like lines, and a part without a type, which is raw."""
    x = pixels(4)
    x[0, :, 0] = torch.tensor(list(b"\r\n--\n\r-"), dtype=torch.uint8)
    raw = b"Content-Type: " + RAW.encode()
    body = form(
        (raw, x[:2].numpy().tobytes()),
        (b"content-type:image/png; q=1", b"no image"),
        (b"X: y", x[2:].numpy().tobytes()),
    )
    found = DECODER.images(FORM, body)
    assert torch.equal(torch.stack(found[:2] + found[3:]), x)
    assert isinstance(found[2], ImageFileError)
    assert "part 1 cannot be read as an image" in str(found[2])


@pytest.mark.parametrize(
    ("kind", "body", "status", "why"),
    [
        (RAW, b"", 400, "no image"),
        (RAW, b"123", 400, "the image has 3 bytes, no multiple of 105"),
        ("text/plain", b"123", 415, "'text/plain'"),
        ("", b"123", 415, "content type ''"),
        ("multipart/form-data", form((b"A: b", b"")), 400, "no boundary"),
        (FORM, form((b"A: b", bytes(105)))[:-4], 400, "before its last boundary"),
        (FORM, b"", 400, "before its last boundary"),
        (FORM, b"--x-y--", 400, "no image"),
        (FORM, b"--x-y\r\nbody\r\n--x-y--", 400, "no empty line"),
        (FORM, form((b"Content-Type: text/html", b"")), 415, "'text/html' of part 0"),
        (FORM, form((b"A: b", bytes(7))), 400, "part 0 has 7 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_a_status(kind, body, status, why):
    with pytest.raises(BodyError, match=why) as found:
        DECODER.images(kind, body)
    assert found.value.status == status


def test_random_bodies_are_read_or_refused():
    generator = np.random.default_rng(0)
    good = form((b"Content-Type: image/png", png()), (b"A: b", bytes(105)))
    for _ in range(257):
        body = bytearray(good)
        for at in generator.integers(0, len(body), 5):
            body[at] = generator.integers(256)
        begin, end = sorted(generator.integers(0, len(body), 2))
        with suppress(BodyError):
            found = DECODER.images(FORM, bytes(body[begin:end] if generator.random() < 0.5 else body))
            assert all(isinstance(image, ImageFileError) or image.shape == SHAPE for image in found)


def test_a_decoder_is_what_the_network_says():
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12), normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    with pytest.raises(BodyError, match=r"does not say how images are scaled.*or send raw pixels") as found:
        Decoder.of(net).images("image/png", png())
    assert found.value.status == 415
    assert Decoder.of(net, 0.75).how == eefast.Preprocessing(16)
    net.preprocessing = eefast.Preprocessing(13)
    assert Decoder.of(net) == Decoder((3, 12, 12), net.preprocessing)
    with pytest.raises(ValueError, match="crop_fraction"):
        Decoder.of(net, 2.0)
    with pytest.raises(ValueError, match=r"set net\.normalization"):
        Decoder.of(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12)))
