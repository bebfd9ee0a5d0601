"""The body of a request → the images in it, or for each what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..data.cropping import prepared
from ..data.decoding import decode_bytes
from ..data.image_files import ImageFileError
from ..model import EarlyExitNet
from ..preprocessing import Preprocessing
from ..scoring.preparation import preprocessing_of

RAW, MULTIPART = "application/octet-stream", "multipart/form-data"

BAD, TOO_LARGE, UNSUPPORTED = 400, 413, 415
"""Status codes of HTTP."""


class BodyError(ValueError):
    """No image of a request can be answered. status: of HTTP."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Decoder:
    """shape: (C, H, W) of the network's images. how: image files are prepared, or why it takes none."""

    shape: tuple[int, ...]
    how: Preprocessing | str

    @classmethod
    def of(cls, net: EarlyExitNet, crop_fraction: float | None = None) -> Decoder:
        """`ValueError` for a network that takes no uint8 images, and for a crop_fraction that it cannot use."""
        if net.normalization is None:
            raise ValueError(
                "the network takes no uint8 images, since it does not say how pixels are normalised; set "
                "net.normalization = (mean, std), one number per channel on the scale 0 … 1, and net.save(folder)"
            )
        try:
            return cls(net.input_shape, preprocessing_of(net, crop_fraction))
        except ValueError as error:
            if crop_fraction is not None:
                raise
            return cls(net.input_shape, str(error))

    @property
    def size(self) -> int:
        """Bytes of an image."""
        return prod(self.shape)

    def images(self, content_type: str, body: bytes) -> list[Tensor | ImageFileError]:
        """uint8 [C, H, W] each.

        content_type: image/…, one file; application/octet-stream, pixels [N, C, H, W] of any number of images; or
            multipart/form-data, a part of these types for each image or several.
        Raises `BodyError` where the body as a whole cannot be read.
        """
        kind = content_type.partition(";")[0].strip().lower()
        if kind != MULTIPART:
            found = self._part(kind, body, "the image")
        else:
            found = []
            for i, (of_part, content) in enumerate(parts(content_type, body)):
                found += self._part(of_part, content, f"part {i}")
        if not found:
            raise BodyError(BAD, "there is no image in the body")
        return found

    def _part(self, kind: str, content: bytes, name: str) -> list[Tensor | ImageFileError]:
        if kind.startswith("image/"):
            if isinstance(self.how, str):
                raise BodyError(UNSUPPORTED, f"{self.how}; or send raw pixels as {RAW}")
            try:
                return [prepared(decode_bytes(content, name), self.shape, self.how)]
            except ImageFileError as error:
                return [error]
        if kind != RAW:
            raise BodyError(UNSUPPORTED, f"content type {kind!r} of {name} is none of image/…, {RAW}, {MULTIPART}")
        if len(content) % self.size:
            raise BodyError(
                BAD,
                f"{name} has {len(content)} bytes, no multiple of {self.size}, uint8 pixels {list(self.shape)}",
            )
        return list(torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(-1, *self.shape))


def parts(content_type: str, body: bytes) -> Iterator[tuple[str, bytes]]:
    """(content type, content) of every part of a multipart body; `BodyError` where it is damaged."""
    found = re.search(r'boundary="?([^";,]+)"?', content_type)
    if not found:
        raise BodyError(BAD, f"content type {content_type!r} names no boundary")
    _, *rest = (b"\r\n" + body).split(b"\r\n--" + found[1].strip().encode("latin-1"))
    if not rest or not rest[-1].startswith(b"--"):
        raise BodyError(BAD, "the multipart body ends before its last boundary")
    for part in rest[:-1]:
        head, blank, content = part.partition(b"\r\n\r\n")
        if not blank:
            raise BodyError(BAD, "a part of the multipart body has no empty line after its headers")
        kind = re.search(rb"(?i)^content-type:[ \t]*([^;\r\n]+)", head, re.MULTILINE)
        yield (kind[1].strip().decode("latin-1").lower() if kind else RAW), content
