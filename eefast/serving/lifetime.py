"""A network and a port → a process that answers HTTP requests until a signal, and then all that it has taken."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import uvicorn

from ..api import accelerate
from ..model import EarlyExitNet
from .application import DRAINING, LEAVING, READY, Application
from .bodies import Decoder
from .levels import Levels
from .server import Server

SWITCH_SECONDS = 0.0002
"""After which a Python thread hands on to another one; by default 5 ms, in which a small network answers ten images."""


@dataclass(frozen=True)
class Options:
    """host, port: to listen at; port 0: any free one. engine, stages, crop_fraction: see `eefast.score`.

    max_queue, workers: see `Server`. levels: names of profiles, see `Levels`. deadline_ms: of requests
    that name none, 0: none. max_body: bytes. drain: seconds to answer what waits after SIGTERM. lame_duck: seconds
    before that, in which requests are still taken.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    engine: str = "auto"
    stages: str = "auto"
    crop_fraction: float | None = None
    max_queue: int = 256
    workers: int | None = None
    levels: tuple[str, ...] = ()
    deadline_ms: float = 0.0
    max_body: int = 8 * 2**20
    drain: float = 10.0
    lame_duck: float = 2.0

    def check(self, net: EarlyExitNet) -> None:
        """`ValueError` for what the network or the server cannot do."""
        for name in ("deadline_ms", "drain", "lame_duck", "port"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if missing := [name for name in self.levels if name not in net.profiles]:
            known = f"it has {', '.join(net.profiles)}" if net.profiles else "it has none"
            raise ValueError(
                f"levels: the network has no profile {', '.join(missing)}, {known}; `eefast calibrate --profile "
                "NAME:BOUND=VALUE --save` makes them"
            )


def run(net: EarlyExitNet, options: Options, say: Callable[[str], object]) -> None:
    """Serve until SIGTERM or SIGINT; say: is told where it listens, and when it is ready.

    The port is open at once, so that it can be told that the network is not ready. A second signal ends the process.
    Raises `ValueError` and `OSError` before it listens, and what `accelerate` raises.
    """
    options.check(net)
    deadline = options.deadline_ms / 1e3 or None
    application = Application(
        net, Decoder.of(net, options.crop_fraction), Levels(options.levels), deadline, options.max_body
    )
    listening = bound(options.host, options.port)
    config = uvicorn.Config(
        application.asgi(), log_level="warning", access_log=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=ceil(options.drain) + 1,
    )  # fmt: skip
    # A thread that has computed an answer waits for Python's lock for as long, and the event loop is always busy.
    sys.setswitchinterval(SWITCH_SECONDS)
    with listening:
        host = f"[{options.host}]" if ":" in options.host else options.host
        say(f"listening at http://{host}:{listening.getsockname()[1]}")
        loop = new_loop()
        try:
            loop.run_until_complete(_serve(application, options, _Web(config), listening, say))
        finally:
            loop.close()


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; `OSError` that names the port."""
    # asyncio sends answers without delay only where the socket says that it is TCP; others wait 40 ms for their end.
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(2048)
    except OSError as error:
        made.close()
        raise OSError(f"{host}:{port} cannot be listened at: {error.strerror}; take another --port") from error
    return made


def new_loop() -> asyncio.AbstractEventLoop:
    """That of uvloop where it is installed, which is faster."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Web(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Those of this process are handled below."""
        yield


async def _serve(
    application: Application, options: Options, web: _Web, listening: socket.socket, say: Callable[[str], object]
) -> None:
    loop, begin = asyncio.get_running_loop(), time.perf_counter()
    stopping: list[asyncio.Task[None]] = []

    def stop(number: int) -> None:
        if stopping or application.server is None:  # asked again, or nothing was taken yet
            os._exit(128 + number)
        stopping.append(loop.create_task(_stop(application, options, web)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)

    def make() -> Server:
        fast = accelerate(application.net, engine=options.engine, stages=options.stages, frozen=True)
        server = Server(fast, options.max_queue, options.workers)
        # Python's collector would look through all of PyTorch's objects now and then, for 0.1 s without an answer.
        gc.collect()
        gc.freeze()
        return server

    serving = loop.create_task(web.serve([listening]))
    try:
        application.server = await loop.run_in_executor(None, make)
        application.state = READY
        say(f"ready after {time.perf_counter() - begin:.1f} s, {application.server.fast.plan.engine} engine")
    except BaseException:
        web.should_exit = True
        await serving
        raise
    await serving
    application.server.close(0)


async def _stop(application: Application, options: Options, web: _Web) -> None:
    """Ready no more → taking no requests → all that waits is answered → no connections."""
    application.state = LEAVING
    await asyncio.sleep(options.lame_duck)
    application.state = DRAINING
    assert application.server is not None
    await asyncio.get_running_loop().run_in_executor(None, application.server.close, options.drain)
    web.should_exit = True
