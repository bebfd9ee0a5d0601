"""The path of an image file → an RGB image of 8 bits, or an error that names the file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .image_files import ImageFileError, shown


def decode(path: str | Path) -> Any:
    """The image in a file, [H, W] RGB of 8 bits: the first one of animations and of files with several pages.

    As torchvision's ImageFolder with Pillow's `convert("RGB")`: whatever the file's name ends in, the format is that of
    its content; transparency is dropped, not blended; the camera's orientation (EXIF) is not applied. Grey images of 16
    bits, which `convert` would clip to white, keep their high byte, as Pillow keeps it of 16-bit RGB; grey TIFFs of 12
    bits keep the 8 highest. Images of 32-bit integers and of floats have no agreed scale: they are read where all
    values are in 0 … 255 (floats not all in 0 … 1), and refused otherwise.
    Raises `ImageFileError`, which names the file, for everything that cannot be read whole.
    """
    return _decoded(path, lambda: open(path, "rb"))  # noqa: PTH123 (making a Path of a path takes microseconds)


def decode_bytes(content: bytes, name: str) -> Any:
    """As `decode`, of a file's content; name: of the image, for errors."""
    return _decoded(name, lambda: BytesIO(content))


def decode_image(image: Any, name: str) -> Any:
    """As `decode`, of an image of Pillow; name: of the image, for errors."""
    try:
        return _eight_bits(image.copy())
    except Exception as error:
        raise ImageFileError(
            f"{shown(name)} cannot be read as an image ({shown(error) or type(error).__name__})"
        ) from error


def size_of(path: str | Path) -> tuple[int, int] | None:
    """Width and height in pixels that an image file says it has; None where it cannot be read."""
    from PIL import Image

    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            return image.width, image.height
    except Exception:  # as in `_decoded`; reading it whole says what is wrong
        return None


def _decoded(name: str | Path, opened: Callable[[], BinaryIO]) -> Any:
    from PIL import Image

    try:
        with opened() as file, _identified(file) as image:
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit and pixels > limit:  # Pillow warns too, but does not name the file.
                warnings.warn(f"{shown(name)} has {pixels:,} pixels", Image.DecompressionBombWarning, stacklevel=3)
            return _eight_bits(image)
    except Exception as error:  # whatever the bytes cause: OSError, SyntaxError, struct.error, MemoryError, …
        why = shown(error) or type(error).__name__
        raise ImageFileError(
            f"{shown(name)} cannot be read as an image ({why}); replace it, or take it out of the data folder"
        ) from error


def _identified(file: BinaryIO) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        file.seek(0)
        raise ValueError("its content has no format that Pillow reads" if file.read(1) else "it is empty") from error


def _eight_bits(image: Any) -> Any:
    from PIL import Image

    # Older Pillow gives the mode "I" to grey PNGs of 16 bits, all versions to PGM files, which are scaled to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(_high_byte(image)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 255) or (image.mode == "F" and 0 < high <= 1):
            raise ValueError(
                f"its values, {low:g} … {high:g} in mode {image.mode}, have no agreed scale to 8 bits; "
                "save it with 8 bits, or 16, per channel"
            )
        return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
    if isinstance(image.info.get("transparency"), bytes):
        del image.info["transparency"]  # It would be dropped anyway, with a warning.
    return image.convert("RGB")


def _high_byte(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    values, bits = np.asarray(image).astype(np.int64), 16
    if image.format == "TIFF":
        bits = int(image.tag_v2.get(258, (16,))[0])
        if image.tag_v2.get(262) == 0:  # White is zero, which Pillow respects in images of 8 bits only.
            values = 2**bits - 1 - values
    if 0 < values.max() < 2 ** (bits - 8):
        raise ValueError(
            f"its values reach {values.max()} of {2**bits - 1} only, which would all become 0 in 8 bits; "
            "save it with 8 bits per channel"
        )
    return (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
