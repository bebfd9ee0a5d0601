"""The handlers without a network between: status codes, order of lines, clients that leave, levels, deadlines."""

import asyncio
import json

import httpx
import pytest
import torch
from networks import lived_in, spread_thresholds
from served import metrics

import eefast
from eefast.serving.application import DRAINING, LEAVING, READY, Application
from eefast.serving.bodies import Decoder
from eefast.serving.levels import Levels

SHAPE = (3, 12, 12)
RAW = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def bytes_net():
    """A network that takes uint8 images, and 31 of them."""
    x = torch.randint(0, 256, (31, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    spread_thresholds(net, net.prepare(x), 0.4)
    net.preprocessing = eefast.Preprocessing(12)
    net.profiles = {"all": [2.0, 2.0], "first": [-1.0, -1.0]}
    return net, x


@pytest.fixture
def ready(bytes_net, serve):
    """An application with a server."""
    net, _ = bytes_net
    made = Application(net, Decoder.of(net), Levels(("all", "first")), max_body=31 * 432)
    made.server = serve(eefast.accelerate(net), max_queue=31)
    made.state = READY
    return made


def ask(application, *requests):
    """Responses to (method, path, keywords), all at once."""

    async def run():
        transport = httpx.ASGITransport(application.asgi(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await asyncio.gather(*(client.request(m, path, **words) for m, path, words in requests))

    return asyncio.run(run())


def predict(application, content, **headers):
    (found,) = ask(application, ("POST", "/v1/predict", {"content": content, "headers": {**RAW, **headers}}))
    return found


def test_one_image_is_one_object(ready, bytes_net):
    net, x = bytes_net
    expected = net(x, profile="all")
    found = predict(ready, x[3].numpy().tobytes())
    assert found.status_code == 200
    answer = found.json()
    assert answer["label"] == int(expected.labels[3])
    assert answer["confidence"] == pytest.approx(expected.confidence[3].item(), abs=1e-5)
    assert (answer["exit"], answer["cost"], answer["level"], answer["late"]) == (2, 1.0, "all", False)


def test_many_images_are_lines_with_their_index(ready, bytes_net):
    net, x = bytes_net
    ready.levels = Levels()
    found = predict(ready, x.numpy().tobytes())
    assert found.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in found.text.splitlines()]
    expected = net(x)
    assert sorted(line["index"] for line in lines) == list(range(31))
    assert all(line["label"] == int(expected.labels[line["index"]]) for line in lines)
    assert all(line["exit"] == int(expected.exit_index[line["index"]]) for line in lines)
    assert len({line["exit"] for line in lines}) == 3


@pytest.mark.parametrize(
    ("content", "headers", "status", "why"),
    [
        (b"12", {}, 400, "2 bytes"),
        (bytes(32 * 432), {}, 413, "more than 13392 bytes"),
        (bytes(432), {"content-type": "text/html"}, 415, "text/html"),
        (b"no image", {"content-type": "image/png"}, 400, "cannot be read as an image"),
        (bytes(432), {"x-level": "cheap"}, 422, "the levels are all, first"),
        (bytes(432), {"x-deadline-ms": "soon"}, 422, "X-Deadline-Ms: soon"),
        (bytes(432), {"x-deadline-ms": "-1"}, 422, "above 0"),
        (bytes(432), {"x-deadline-ms": "nan"}, 422, "above 0"),
        (bytes(432), {"x-deadline-ms": "1e-322"}, 422, "above 0"),
    ],
)
def test_what_is_wrong_with_a_request_has_its_status(ready, content, headers, status, why):
    found = predict(ready, content, **headers)
    assert found.status_code == status
    assert why in found.json()["error"]
    assert (
        metrics(ready.metrics.text(ready.server, ready.levels).decode())[f'eefast_requests_total{{code="{status}"}}']
        == 1
    )


def test_levels_and_deadlines_are_those_of_the_request(ready, bytes_net):
    _, x = bytes_net
    image = x[0].numpy().tobytes()
    assert predict(ready, image, **{"x-level": "first"}).json()["exit"] == 0
    assert predict(ready, image, **{"x-level": "all", "x-deadline-ms": "60000"}).json()["exit"] == 2
    late = predict(ready, image, **{"x-deadline-ms": "0.000001"})
    assert late.status_code == 504
    assert (late.json()["exit"], late.json()["late"]) == (0, True)
    assert "passed while the image waited" in late.json()["error"]


@pytest.mark.parametrize(
    ("state", "status", "is_ready"), [("warming", 503, 503), (LEAVING, 200, 503), (DRAINING, 503, 503)]
)
def test_states(ready, state, status, is_ready):
    ready.state = state
    if state == "warming":
        ready.server = None
    health, readiness, model, _, answer = ask(
        ready, ("GET", "/healthz", {}), ("GET", "/readyz", {}), ("GET", "/v1/model", {}), ("GET", "/metrics", {}),
        ("POST", "/v1/predict", {"content": bytes(432), "headers": RAW}),
    )  # fmt: skip
    assert (health.status_code, readiness.status_code, answer.status_code) == (200, is_ready, status)
    assert model.json()["input_shape"] == [3, 12, 12]
    if status == 503:
        assert answer.headers["retry-after"] == "1"
        assert state in answer.json()["error"]


def test_a_closed_server_is_unavailable(ready):
    ready.server.close()
    assert predict(ready, bytes(432)).status_code == 503


def test_a_full_queue_is_429_after_the_cheapest_level(gated, serve):
    """All requests are there before the first is answered."""
    net = gated.net
    net.normalization = ((0.0,), (1.0,))
    net.profiles = {"dear": net.thresholds.tolist(), "cheap": [0.0, 0.0]}
    application = Application(net, Decoder(net.input_shape, "none"), Levels(("dear", "cheap")))
    application.server, application.state = serve(gated.fast, max_queue=4), READY
    gated.shut(0)

    async def run():
        transport = httpx.ASGITransport(application.asgi())
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            post = lambda: client.post("/v1/predict", content=bytes(4), headers=RAW)  # noqa: E731
            tasks = [asyncio.create_task(post())]
            while not gated.entered[0].is_set():
                await asyncio.sleep(0.001)
            for _ in range(4):
                tasks.append(asyncio.create_task(post()))
                while application.server.waiting() < len(tasks) - 1:
                    await asyncio.sleep(0.001)
            refused = await post()
            gated.open()
            return refused, await asyncio.gather(*tasks)

    refused, answered = asyncio.run(run())
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert "4 images wait, max_queue=4 may" in refused.json()["error"]
    assert [found.json()["level"] for found in answered] == ["dear", "dear", "dear", "cheap", "cheap"]


def test_more_images_than_may_wait_are_too_large(ready):
    ready.max_body = 10**6
    found = predict(ready, bytes(32 * 432))
    assert found.status_code == 413
    assert "at most 31 may wait" in found.json()["error"]


def test_a_bad_file_among_others_is_a_line(ready, bytes_net):
    _, x = bytes_net
    part = b"--b\r\nContent-Type: %s\r\n\r\n%s\r\n"
    body = part % (b"image/png", b"no image") + part % (b"application/octet-stream", x[:2].numpy().tobytes()) + b"--b--"
    found = predict(ready, body, **{"content-type": "multipart/form-data; boundary=b"})
    lines = {line["index"]: line for line in map(json.loads, found.text.splitlines())}
    assert lines[0]["status"] == 400
    assert "part 0 cannot be read" in lines[0]["error"]
    assert lines[1]["exit"] == lines[2]["exit"] == 2


@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_leaves_frees_its_images(gated, serve, count):
    net = gated.net
    net.normalization = ((0.0,), (1.0,))
    application = Application(net, Decoder(net.input_shape, "none"), Levels())
    application.server, application.state = serve(gated.fast), READY
    gated.shut(0)
    busy = application.server.submit(gated.image(1.0))
    assert gated.entered[0].wait(20)

    async def run():
        messages = [{"type": "http.request", "body": bytes(4 * count)}]
        waiting, sent = asyncio.Event(), []

        async def receive():
            if messages:
                return messages.pop()
            await waiting.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/predict",
            "headers": [(b"content-type", b"application/octet-stream")],
        }
        task = asyncio.create_task(application.asgi()(scope, receive, send))
        while application.server.waiting() < count:
            await asyncio.sleep(0.001)
        waiting.set()
        await asyncio.wait_for(task, 20)
        return sent

    sent = asyncio.run(run())
    gated.open()
    assert busy.result(20).exit == 0
    assert application.server.submit(gated.image(2.0)).result(20).exit == 0
    assert [values for _, values in gated.seen] == [[1.0], [2.0]]
    assert not any(message.get("body") for message in sent)
    assert (
        metrics(application.metrics.text(application.server, application.levels).decode())[
            'eefast_requests_total{code="499"}'
        ]
        == 1
    )


def test_a_network_that_fails_is_500_and_says_why(gated, serve):
    net = gated.net
    net.normalization = ((0.0,), (1.0,))
    application = Application(net, Decoder(net.input_shape, "none"), Levels())
    application.server, application.state = serve(gated.fast), READY

    def fails(layers, x):
        raise ArithmeticError("of this image")

    net.stages[0].run = fails
    found = predict(application, bytes(4))
    assert found.status_code == 500
    assert found.json()["error"] == "the network failed on this image: ArithmeticError: of this image"
