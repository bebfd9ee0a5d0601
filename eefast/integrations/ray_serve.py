"""Requests of Ray Serve → answers of a `eefast.serving.Server`: a deployment for a network in a folder."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..api import accelerate
from ..checkpoint.loading import load
from ..data.image_files import ImageFileError
from ..serving import Answer, Overloaded, Server
from ..serving.bodies import RAW, BodyError, Decoder


def deployment(folder: str | Path, max_queue: int = 256, engine: str = "auto", **options: Any) -> Any:
    """serve.run(deployment("runs/mine", num_replicas=2)); options: of `serve.deployment`."""
    from ray import serve

    made = serve.deployment(**{"max_ongoing_requests": max_queue, **options})(EarlyExits)
    return made.bind(folder, max_queue, engine)


class EarlyExits:
    """One image in the body, see `Decoder.images`: a JSON object; several: lines in the order in which they exit."""

    def __init__(self, folder: str | Path, max_queue: int = 256, engine: str = "auto") -> None:
        self.net = load(folder)
        self.decoder = Decoder.of(self.net)
        self.server = Server(accelerate(self.net, engine=engine, frozen=True), max_queue)

    async def __call__(self, request: Request) -> Response:
        try:
            images = self.decoder.images(request.headers.get("content-type", RAW), await request.body())
            if bad := [image for image in images if isinstance(image, ImageFileError)]:
                raise BodyError(400, str(bad[0]))
            good = [image for image in images if not isinstance(image, ImageFileError)]
            deadline = float(request.headers.get("x-deadline-ms", "inf")) / 1e3
            futures = self.server.submit_all(good, deadline)
        except (BodyError, Overloaded, ValueError) as error:
            status = 429 if isinstance(error, Overloaded) else getattr(error, "status", 422)
            return JSONResponse({"error": str(error)}, status)
        if len(futures) == 1:
            return JSONResponse((await asyncio.wrap_future(futures[0])).figures(self.net.classes))
        return StreamingResponse(self._lines(futures), media_type="application/x-ndjson")

    async def _lines(self, futures: Sequence[Future[Answer]]) -> AsyncIterator[str]:
        async def line(i: int, future: Future[Answer]) -> str:
            answer = await asyncio.wrap_future(future)
            return json.dumps({"index": i, **answer.figures(self.net.classes)}) + "\n"

        for done in asyncio.as_completed([line(i, future) for i, future in enumerate(futures)]):
            yield await done
