"""HTTP requests → a server's answers as JSON, or as lines of JSON in the order in which images exit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..data.image_files import ImageFileError
from ..model import EarlyExitNet
from .answer import Answer, Closed, Overloaded
from .bodies import RAW, TOO_LARGE, BodyError, Decoder
from .client import Client, ClientGone, Receive, Refused, Send
from .levels import Levels
from .metrics import Metrics
from .server import Server

Handler = Callable[[Any, Any, Any], Awaitable[None]]

WARMING, READY, LEAVING, DRAINING = "warming", "ready", "leaving", "draining"
"""States: it has no server yet; takes requests; takes them, but asks to get no more; takes none."""

GONE, UNPROCESSABLE, TOO_MANY, UNAVAILABLE, TOO_LATE = 499, 422, 429, 503, 504
"""Status codes; 499 is never sent."""

DECODERS = 2
"""Threads that decode image files."""

WATCH_SECONDS = 0.02
"""After which an image that waits is given up when its client leaves; watching every one would cost more."""


@dataclass
class Application:
    """What the handlers share.

    net: the network. decoder: of its images. levels: see there. deadline: seconds that requests get which name none.
    max_body: bytes. server: None while it is made. state: see above.
    """

    net: EarlyExitNet
    decoder: Decoder
    levels: Levels
    deadline: float | None = None
    max_body: int = 8 * 2**20
    server: Server | None = None
    state: str = WARMING
    metrics: Metrics = field(init=False)
    pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.net.num_exits + 1)
        self.pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="eefast-decode")

    def asgi(self) -> Handler:
        """The handlers as one application of ASGI."""
        predict = Predict(self)
        others = Starlette(
            routes=[
                Route("/v1/predict", predict, methods=["POST"]),
                Route("/v1/model", self._model),
                Route("/healthz", self._health),
                Route("/readyz", self._ready),
                Route("/metrics", self._metrics),
            ]
        )

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            # Looking for the route would take as long as reading the request.
            direct = scope["type"] == "http" and scope["path"] == "/v1/predict" and scope["method"] == "POST"
            await (predict if direct else others)(scope, receive, send)

        return answer

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"state": self.state})

    async def _ready(self, request: Request) -> Response:
        return JSONResponse({"state": self.state}, 200 if self.state == READY else UNAVAILABLE)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(self.server, self.levels), media_type="text/plain; version=0.0.4")

    async def _model(self, request: Request) -> Response:
        net, server = self.net, self.server
        return JSONResponse(
            {
                "name": net.name,
                "input_shape": net.input_shape,
                "dtype": "uint8",
                "image_files": not isinstance(self.decoder.how, str),
                "num_classes": net.num_classes,
                "classes": net.classes,
                "criterion": net.criterion.name,
                "exits": net.num_exits + 1,
                "costs": net.cost.tolist(),
                "levels": self.levels.names,
                "deadline_ms": None if self.deadline is None else 1e3 * self.deadline,
                "max_queue": None if server is None else server.max_queue,
                "engine": None if server is None else server.fast.plan.engine,
            }
        )


class Predict:
    """The handler of /v1/predict, without what Starlette's requests and responses cost."""

    def __init__(self, application: Application) -> None:
        self.app = application

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        client = Client(receive, send)
        try:
            status = await self._answer(dict(scope["headers"]), client)
        except (Refused, BodyError) as error:
            status = error.status
            headers = [(b"retry-after", b"1")] if status in (TOO_MANY, UNAVAILABLE) else []
            headers += [(b"connection", b"close")] if status == TOO_LARGE else []
            await client.json(status, {"error": str(error)}, headers)
        except ClientGone:
            status = GONE
        self.app.metrics.requests.labels(str(status)).inc()

    async def _answer(self, headers: Mapping[bytes, bytes], client: Client) -> int:
        """Sends the answer; its status code."""
        app = self.app
        if app.server is None or app.state == DRAINING:
            raise Refused(UNAVAILABLE, f"the server is {app.state}; send the request again later")
        deadline = deadline_of(headers, app.deadline)
        level = level_of(headers, app.levels, app.server)
        kind = headers.get(b"content-type", RAW.encode()).decode("latin-1")
        body = await client.body(headers, app.max_body)
        loop = asyncio.get_running_loop()
        if kind == RAW and len(body) == app.decoder.size:
            images = app.decoder.images(kind, body)
            futures = self._submit(images, deadline, level)
        else:
            images = await loop.run_in_executor(app.pool, app.decoder.images, kind, body)
            # Preparing many images would keep the other requests waiting.
            futures = await loop.run_in_executor(app.pool, self._submit, images, deadline, level)
        if level is not None:
            app.metrics.levels.labels(level).inc(len(futures))
        if len(futures) == 1:
            return await self._one(futures[0], deadline, level, client)
        await self._many(futures, level, client)
        return 200

    def _submit(self, images: Sequence[Any], deadline: float | None, level: str | None) -> list[Future[Answer]]:
        server = self.app.server
        assert server is not None
        if len(images) > server.max_queue:
            raise Refused(TOO_LARGE, f"{len(images)} images in a request; at most {server.max_queue} may wait")
        good = [image for image in images if not isinstance(image, ImageFileError)]
        try:
            submitted = iter(server.submit_all(good, deadline, profile=level))
        except Overloaded as error:
            raise Refused(TOO_MANY, str(error)) from error
        except Closed as error:
            raise Refused(UNAVAILABLE, "the server is draining; send the request to another one") from error
        return [failed(image) if isinstance(image, ImageFileError) else next(submitted) for image in images]

    async def _one(self, future: Future[Answer], deadline: float | None, level: str | None, client: Client) -> int:
        waited = asyncio.wrap_future(future)
        with client.cancels([future], WATCH_SECONDS):
            try:
                answer = await waited
            except asyncio.CancelledError:
                if not client.gone:
                    raise
                raise ClientGone from None
            except Exception as error:
                status, line = self._failure(error)
                await client.json(status, line)
                return status
        self.app.metrics.answered(answer)
        line = self._line(answer, level)
        if deadline is not None and answer.waited > deadline:
            await client.json(TOO_LATE, {"error": "the deadline passed while the image waited", **line})
            return TOO_LATE
        await client.json(200, line)
        return 200

    async def _many(self, futures: Sequence[Future[Answer]], level: str | None, client: Client) -> None:
        """Lines in the order in which images exit; those that exit together are sent together."""
        loop, done = asyncio.get_running_loop(), asyncio.Queue[int]()

        def tell(i: int, future: Future[Answer]) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(done.put_nowait, i)

        for i, future in enumerate(futures):
            future.add_done_callback(partial(tell, i))
        await client.start(200, b"application/x-ndjson")
        with client.cancels(futures, 0.0):
            left = len(futures)
            while left:
                lines = [await done.get()]
                while not done.empty():
                    lines.append(done.get_nowait())
                if client.gone:
                    raise ClientGone
                left -= len(lines)
                await client.more(b"".join(self._told(i, futures[i], level) for i in lines), bool(left))

    def _told(self, i: int, future: Future[Answer], level: str | None) -> bytes:
        error = future.exception()
        if error is not None:
            self.app.metrics.failed.inc()
            status, line = self._failure(error)
            line["status"] = status
        else:
            answer = future.result()
            self.app.metrics.answered(answer)
            line = self._line(answer, level)
        return json.dumps({"index": i, **line}).encode() + b"\n"

    def _failure(self, error: BaseException) -> tuple[int, dict[str, Any]]:
        if isinstance(error, Closed):
            return UNAVAILABLE, {"error": str(error)}
        if isinstance(error, (TypeError, ValueError)):
            return 400, {"error": str(error)}
        return 500, {"error": f"the network failed on this image: {type(error).__name__}: {error}"}

    def _line(self, answer: Answer, level: str | None) -> dict[str, Any]:
        return {**answer.figures(self.app.net.classes), "level": level}


def deadline_of(headers: Mapping[bytes, bytes], default: float | None) -> float | None:
    """Seconds; `Refused` for what is no number of milliseconds above 0."""
    text = headers.get(b"x-deadline-ms")
    if text is None:
        return default
    try:
        seconds = float(text) / 1e3
    except ValueError:
        seconds = 0.0
    if not (seconds > 0 and isfinite(seconds)):
        raise Refused(UNPROCESSABLE, f"X-Deadline-Ms: {text.decode('latin-1')} must be milliseconds from now, above 0")
    return seconds


def level_of(headers: Mapping[bytes, bytes], levels: Levels, server: Server) -> str | None:
    """The level that a request names, or that the load asks for; `Refused` for one that there is not."""
    chosen = levels.at(server.waiting() / server.max_queue)
    text = headers.get(b"x-level")
    if text is None:
        return chosen
    names = [text.decode("latin-1"), text.decode(errors="replace")]  # as HTTP has it, and as clients send it
    name = next((n for n in names if n in levels.names), names[0])
    if name not in levels.names:
        known = f"the levels are {', '.join(levels.names)}" if levels.names else "this server has none (--levels)"
        raise Refused(UNPROCESSABLE, f"X-Level: {name} is unknown; {known}")
    return name


def failed(error: Exception) -> Future[Answer]:
    future: Future[Answer] = Future()
    future.set_exception(error)
    return future
