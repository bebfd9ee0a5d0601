"""Requests of LitServe → answers of a `eefast.serving.Server`: a LitAPI for a network in a folder."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import litserve
from fastapi import HTTPException
from torch import Tensor

from ..api import accelerate
from ..checkpoint.loading import load
from ..data.image_files import ImageFileError
from ..serving import Answer, Overloaded, Server
from ..serving.bodies import RAW, BodyError, Decoder


class EarlyExits(litserve.LitAPI):
    """LitServer(EarlyExits("runs/mine")).run(port=8000)

    A request is JSON: "image", the base64 of an image file or of pixels; "type", its content type, by default raw
    pixels, see `Decoder.images`; "deadline_ms". Requests are never batched: each is answered when its image exits.
    """

    def __init__(self, folder: str | Path, max_queue: int = 256, engine: str = "auto") -> None:
        super().__init__(enable_async=True)
        self.folder, self.max_queue, self.engine = str(folder), max_queue, engine

    def setup(self, device: str) -> None:
        self.net = load(self.folder).to(device)
        self.decoder = Decoder.of(self.net)
        self.server = Server(accelerate(self.net, engine=self.engine, frozen=True), self.max_queue)

    # Of an annotation of `request` LitServe would make the schema of a query.
    async def decode_request(self, request) -> tuple[Tensor, float | None]:  # type: ignore[no-untyped-def]
        try:
            if not isinstance(request, Mapping) or not isinstance(request.get("type", RAW), str):
                raise BodyError(400, 'give a JSON object whose "image", and "type" where there is one, are texts')
            image, *more = self.decoder.images(request.get("type", RAW), b64decode(request["image"], validate=True))
            if more:
                raise BodyError(400, f"{1 + len(more)} images in a request; give one")
            deadline = float(request["deadline_ms"]) / 1e3 if "deadline_ms" in request else None
        except (KeyError, TypeError, ValueError, OverflowError, BodyError) as error:
            raise HTTPException(getattr(error, "status", 400), f"{type(error).__name__}: {error}") from error
        if isinstance(image, ImageFileError):
            raise HTTPException(400, str(image))
        return image, deadline

    async def predict(self, given: tuple[Tensor, float | None]) -> Answer:
        try:
            return await asyncio.wrap_future(self.server.submit(*given))
        except Overloaded as error:
            raise HTTPException(429, str(error)) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    async def encode_response(self, output: Answer) -> dict[str, Any]:
        return output.figures(self.net.classes)
