"""The deployment as Ray Serve calls it, and on Ray Serve where that is installed."""

import asyncio
import json
import os
import sys

import httpx
import pytest
import torch
from starlette.requests import Request

import eefast
from eefast.integrations.ray_serve import EarlyExits, deployment

RAW = "application/octet-stream"


def pixels(count):
    return torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def right(net, x, lines):
    """Whether these are the answers, by their index."""
    expected = net(x)
    assert sorted(line["index"] for line in lines) == list(range(len(x)))
    for line in lines:
        i = line["index"]
        assert (line["label"], line["exit"]) == (int(expected.labels[i]), int(expected.exit_index[i]))
        assert line["class"] == "abcdefghij"[line["label"]]


@pytest.fixture(scope="module")
def app(served_folder):
    made = EarlyExits(served_folder, max_queue=31)
    yield made
    made.server.close(0)


def call(app, body, **headers):
    """Status and text of the response."""

    async def run():
        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        names = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        response = await app(Request({"type": "http", "method": "POST", "headers": names}, receive))
        text = response.body if hasattr(response, "body") else "".join([part async for part in response.body_iterator])
        return response.status_code, text

    return asyncio.run(run())


def test_answers_are_the_networks(app):
    x = pixels(7)
    status, text = call(app, x.numpy().tobytes(), content_type=RAW)
    assert status == 200
    right(app.net, x, list(map(json.loads, text.splitlines())))
    status, text = call(app, x[0].numpy().tobytes(), x_deadline_ms="60000")
    right(app.net, x[:1], [{"index": 0, **json.loads(text)}])


@pytest.mark.parametrize(
    ("body", "headers", "status", "why"),
    [
        (b"12", {}, 400, "2 bytes"),
        (b"no image", {"content_type": "image/png"}, 400, "cannot be read as an image"),
        (b"", {"content_type": "x/y"}, 415, "x/y"),
        (bytes(432), {"x_deadline_ms": "soon"}, 422, "soon"),
        (bytes(432 * 32), {}, 429, "max_queue=31"),
    ],
)
def test_what_is_refused_has_its_status(app, body, headers, status, why):
    found, text = call(app, body, **headers)
    assert found == status
    assert why in json.loads(text)["error"]


@pytest.mark.slow
def test_on_ray_serve(served_folder):
    ray = pytest.importorskip("ray", reason='ray is not installed; pip install "ray[serve]" brings it')
    serve = pytest.importorskip("ray.serve", reason='Ray Serve is not installed; pip install "ray[serve]" brings it')
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8765})
        serve.run(deployment(served_folder))
        x = pixels(31)
        found = httpx.post("http://127.0.0.1:8765/", content=x.numpy().tobytes(), timeout=60)
        right(eefast.load(served_folder), x, list(map(json.loads, found.text.splitlines())))
        assert httpx.post("http://127.0.0.1:8765/", content=b"12").status_code == 400
    finally:
        serve.shutdown()
        ray.shutdown()
