"""Connections that each send the next request when the last is answered → requests per second and their times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle


@dataclass
class Load:
    """seconds: of each request that was answered with 200. failed: others. spent: seconds in all."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    spent: float = 0.0

    @property
    def per_second(self) -> float:
        return len(self.seconds) / self.spent


def request(path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: bench", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body


class _Connection(asyncio.Protocol):
    """Cheap, since client and server share the machine: answers are cut by their Content-Length or last chunk."""

    def __init__(self, requests: Sequence[bytes], until: float, load: Load, ended: asyncio.Future[None]) -> None:
        self.requests, self.until, self.load, self.ended = cycle(requests), until, load, ended
        self.found = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._next()

    def _next(self) -> None:
        self.begin = time.perf_counter()
        if self.begin >= self.until:
            self.transport.close()
        else:
            self.transport.write(next(self.requests))

    def data_received(self, data: bytes) -> None:
        self.found += data
        head, blank, body = self.found.partition(b"\r\n\r\n")
        if not blank:
            return
        words = head.lower()
        if b"transfer-encoding: chunked" in words:
            if not body.endswith(b"0\r\n\r\n"):
                return
        elif len(body) < int(words.partition(b"content-length:")[2].partition(b"\r")[0]):
            return
        if head.split(b" ", 2)[1] == b"200":
            self.load.seconds.append(time.perf_counter() - self.begin)
        else:
            self.load.failed += 1
        self.found = b""
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def closed_loop(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    """A number of clients for so many seconds; `requests` in turn."""

    async def run() -> Load:
        loop, load, begin = asyncio.get_running_loop(), Load(), time.perf_counter()
        ends = [loop.create_future() for _ in range(clients)]
        for end in ends:
            await loop.create_connection(partial(_Connection, requests, begin + seconds, load, end), "127.0.0.1", port)
        await asyncio.gather(*ends)
        load.spent = time.perf_counter() - begin
        return load

    return asyncio.run(run())


def line_times(port: int, sent: bytes) -> list[float]:
    """Seconds from one request to each line of its answer."""

    async def run() -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        begin = time.perf_counter()
        writer.write(sent)
        await writer.drain()
        await reader.readuntil(b"\r\n\r\n")
        found: list[float] = []
        while (length := int((await reader.readline()).strip(), 16)) > 0:  # a chunk of lines
            chunk = await reader.readexactly(length + 2)
            found += [time.perf_counter() - begin] * chunk.count(b"\n", 0, length)
        writer.close()
        return found

    return asyncio.run(run())
