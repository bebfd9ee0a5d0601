"""A network in a folder → servers that answer whole batches, or nothing: LitServe, Ray Serve, an empty handler."""

from __future__ import annotations

import os
import sys
from base64 import b64decode
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

import eefast

FOLDER = "SERVED_FOLDER"
BATCH, WAIT = 32, 0.002
"""Images of a batch at most, and seconds that one waits for company."""


class Answers:
    """Batches of contents of images → labels and exits; the same network and engine as `eefast serve` has."""

    def __init__(self, folder: str) -> None:
        net = eefast.load(folder)
        self.fast, self.shape = eefast.accelerate(net, frozen=True), net.input_shape
        self.fast.warmup()

    @torch.no_grad()
    def __call__(self, contents: Sequence[bytes]) -> list[dict[str, int]]:
        pixels = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, *self.shape).copy()
        found = self.fast(torch.from_numpy(pixels))
        pairs = zip(found.labels.tolist(), found.exit_index.tolist(), strict=True)
        return [{"label": label, "exit": exit_index} for label, exit_index in pairs]


if find_spec("litserve") is not None:
    import litserve as ls

    class Api(ls.LitAPI):
        def setup(self, device: str) -> None:
            self.answers = Answers(os.environ[FOLDER])

        # Of an annotation of `request` LitServe would make the schema of a query.
        def decode_request(self, request) -> bytes:  # type: ignore[no-untyped-def]
            return b64decode(request["image"])

        def batch(self, inputs: list[bytes]) -> list[bytes]:
            return inputs

        def predict(self, x: list[bytes]) -> list[dict[str, int]]:
            return self.answers(x)

        def unbatch(self, output: list[dict[str, int]]) -> list[dict[str, int]]:
            return output

        def encode_response(self, output: dict[str, int]) -> dict[str, int]:
            return output


def litserve(folder: str, port: int) -> None:
    os.environ[FOLDER] = folder  # the class is made again in processes that LitServe spawns
    api = Api(max_batch_size=BATCH, batch_timeout=WAIT)
    ls.LitServer(api, accelerator="cpu", timeout=120).run(port=port, host="127.0.0.1", generate_client_file=False)


def ray(folder: str, port: int) -> None:
    import ray as library
    from ray import serve
    from starlette.requests import Request

    @serve.deployment(max_ongoing_requests=256)
    class Deployment:
        def __init__(self) -> None:
            self.answers = Answers(folder)

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT)
        async def answer(self, contents: list[bytes]) -> list[dict[str, int]]:
            return self.answers(contents)

        async def __call__(self, request: Request) -> Any:
            return await self.answer(await request.body())

    library.init(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(Deployment.bind(), blocking=True)  # type: ignore[attr-defined]


def empty(folder: str, port: int) -> None:
    """`eefast serve` without a network: the same body is read, an answer of the same length is sent."""
    import uvicorn

    from eefast.serving.client import Client

    class Nothing:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            client = Client(receive, send)
            await client.body(dict(scope["headers"]), 2**23)
            await client.json(200, {"label": 1, "exit": 0, "rest": "x" * 130})

    uvicorn.run(
        Nothing(), host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off", ws="none"
    )


KINDS = {"litserve": litserve, "ray": ray, "empty": empty}

if __name__ == "__main__":
    KINDS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
