"""One request's messages: bodies in pieces, too large or cut off; answers; futures of a client that leaves."""

import asyncio
import json
from concurrent.futures import Future

import pytest

from eefast.serving.client import Client, ClientGone, Refused


def client_of(*messages):
    """A client that sends these messages, then nothing, and what was sent to it."""
    left, sent = list(messages), []

    async def receive():
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    async def send(message):
        sent.append(message)

    return Client(receive, send), sent


def piece(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


def test_a_body_comes_in_pieces():
    client, _ = client_of(piece(b"ab"), piece(b""), piece(b"c", False))
    assert asyncio.run(client.body({}, 3)) == b"abc"


@pytest.mark.parametrize(
    ("messages", "headers", "error"),
    [
        ([piece(b"ab"), piece(b"cd", False)], {}, Refused),
        ([], {b"content-length": b"4"}, Refused),
        ([piece(b"ab"), GONE], {b"content-length": b"x"}, ClientGone),
    ],
)
def test_what_is_too_large_or_cut_off_has_no_body(messages, headers, error):
    client, _ = client_of(*messages)
    with pytest.raises(error) as found:
        asyncio.run(client.body(headers, 3))
    assert error is ClientGone or found.value.status == 413


def test_json_has_its_length():
    client, sent = client_of()
    asyncio.run(client.json(429, {"error": "é"}, [(b"retry-after", b"1")]))
    start, body = sent
    assert start["status"] == 429
    headers = dict(start["headers"])
    assert headers[b"retry-after"] == b"1"
    assert int(headers[b"content-length"]) == len(body["body"])
    assert json.loads(body["body"]) == {"error": "é"}
    assert not body["more_body"]


@pytest.mark.parametrize("leaves", [True, False])
def test_futures_are_cancelled_when_the_client_leaves_and_only_then(leaves):
    async def run():
        client, _ = client_of(*[GONE] * leaves)
        futures = [Future(), Future()]
        with client.cancels(futures, 0.0):
            await asyncio.sleep(0.05)
        return client.gone, [future.cancelled() for future in futures]

    assert asyncio.run(run()) == (leaves, [leaves] * 2)


def test_a_client_that_is_answered_soon_is_not_watched():
    async def run():
        client, _ = client_of(GONE)
        with client.cancels([future := Future()], 60.0):
            await asyncio.sleep(0.01)
        return client.gone, future.cancelled()

    assert asyncio.run(run()) == (False, False)
