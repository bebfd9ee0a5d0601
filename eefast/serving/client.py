"""Messages of ASGI for one request → its body; an answer → messages; a client that leaves → cancelled futures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from .answer import Answer
from .bodies import TOO_LARGE

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Refused(Exception):  # noqa: N818
    """A request that gets no answer. status: of HTTP."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class ClientGone(Exception):  # noqa: N818
    """The client has closed the connection."""


class Client:
    """One request's connection. gone: whether the client has closed it, once something watches."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.receive, self.send, self.gone = receive, send, False

    async def body(self, headers: Mapping[bytes, bytes], most: int) -> bytes:
        """`Refused` for more than `most` bytes, `ClientGone` where it ends early."""
        too_large = Refused(TOO_LARGE, f"the body has more than {most} bytes; send fewer images, or --max-body")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise too_large
        found = b""
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            found += message.get("body", b"")
            if len(found) > most:
                raise too_large
            if not message.get("more_body", False):
                return found

    async def json(self, status: int, content: Mapping[str, Any], headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        text = json.dumps(content).encode()
        await self.start(status, b"application/json", [(b"content-length", b"%d" % len(text)), *headers])
        await self.more(text, False)

    async def start(self, status: int, kind: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        sent = [(b"content-type", kind), *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": sent})

    async def more(self, content: bytes, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": content, "more_body": more})

    def cancels(self, futures: Sequence[Future[Answer]], after: float) -> Watch:
        """A context in which the futures are cancelled when the client leaves; looked at after so many seconds."""
        return Watch(self, futures, after)


class Watch:
    """See `Client.cancels`."""

    def __init__(self, client: Client, futures: Sequence[Future[Answer]], after: float) -> None:
        self.client, self.futures = client, futures
        self.task: asyncio.Task[None] | None = None
        self.timer = asyncio.get_running_loop().call_later(after, self._begin)

    def _begin(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self.client.receive())["type"] != "http.disconnect":
            pass
        self.client.gone = True
        for future in self.futures:
            future.cancel()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.timer.cancel()
        if self.task is not None:
            self.task.cancel()
