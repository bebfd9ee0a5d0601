"""Servers in processes of their own, with clients that behave and clients that do not, until a signal."""

import asyncio
import json
import random
import signal
import socket
from pathlib import Path

import httpx
import pytest
import torch
from networks import lived_in, spread_thresholds
from served import Served, metrics

import eefast
from eefast.serving.lifetime import Options, run

RAW = {"content-type": "application/octet-stream"}


def saved(folder, model, shape, share):
    """A network that takes uint8 images, 31 of them, and its answers."""
    x = torch.randint(0, 256, (31, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = lived_in(eefast.zoo.eenet(model, 2, input_shape=shape, normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    spread_thresholds(net, net.prepare(x), share)
    net.preprocessing = eefast.Preprocessing(shape[1])
    net.save(folder)
    with torch.no_grad():
        return x, net(x)


def state(process):
    """Threads, open files and bytes of a process."""
    folder = Path(f"/proc/{process}")
    pages = int((folder / "statm").read_text().split()[1])
    return len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir())), pages * 4096


def body_that_ends_early(url, image):
    """A client that promises a body, sends half of it and leaves."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as raw:
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: {RAW['content-type']}\r\n"
        raw.sendall(f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image[: len(image) // 2])


def damaged(number):
    """A request in which anything may be wrong."""
    generator = random.Random(number)
    kinds = ["image/png", "application/octet-stream", "multipart/form-data; boundary=b", "multipart/form-data", "x", ""]
    headers = {"content-type": generator.choice(kinds)}
    if generator.random() < 0.3:
        headers[generator.choice(["x-deadline-ms", "x-level"])] = generator.choice(["", "-1", "1e999", "nan", "x", "0"])
    start = generator.choice([b"", b"\x89PNG\r\n\x1a\n", b"--b\r\n\r\n", b"--b\r\nContent-Type: image/png\r\n\r\n"])
    end = generator.choice([b"", b"\r\n--b--"])
    return start + generator.randbytes(generator.choice([0, 1, 432, 432, 60_000])) + end, headers


@pytest.mark.parametrize("requests", [64, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_life_of_a_server(tmp_path, requests):
    x, expected = saved(tmp_path, "eenet8", (3, 12, 12), 0.4)
    contents = [image.numpy().tobytes() for image in x]
    with Served(tmp_path, "--lame-duck", "30", "--max-body", "0.05") as served:

        async def ask(count):
            """Single images of 64 clients at once; status codes and what is wrong with answers."""
            limits = httpx.Limits(max_connections=64)
            async with httpx.AsyncClient(base_url=served.url, limits=limits, timeout=60) as client:
                room = asyncio.Semaphore(64)

                async def one(i):
                    async with room:
                        found = await client.post("/v1/predict", content=contents[i % 31], headers=RAW)
                    answer = found.json()
                    right = answer["label"] == int(expected.labels[i % 31])
                    return found.status_code, right and answer["exit"] == int(expected.exit_index[i % 31])

                return await asyncio.gather(*(one(i) for i in range(count)))

        assert asyncio.run(ask(64)) == [(200, True)] * 64
        before = state(served.process.pid)
        assert asyncio.run(ask(requests)) == [(200, True)] * requests
        with httpx.Client(base_url=served.url, timeout=60) as client:
            for _ in range(7):
                body_that_ends_early(served.url, contents[0])
            codes = []
            for number in range(60):
                content, headers = damaged(number)
                codes.append(client.post("/v1/predict", content=content, headers=headers).status_code)
            assert set(codes) <= {200, 400, 413, 415, 422}
            assert len(set(codes)) >= 4
            lines = client.post("/v1/predict", content=b"".join(contents), headers=RAW).text.splitlines()
            assert sorted(json.loads(line)["index"] for line in lines) == list(range(31))
            counted = metrics(client.get("/metrics").text)
            by_code = {name: n for name, n in counted.items() if name.startswith("eefast_requests_total")}
            gone = by_code.pop('eefast_requests_total{code="499"}')
            assert (sum(by_code.values()), gone) == (64 + requests + 60 + 1, 7)
            images = sum(n for name, n in counted.items() if name.startswith("eefast_images_total"))
            assert images >= 64 + requests + 31
            assert counted["eefast_queue_length"] == 0
            after = state(served.process.pid)
            assert after[0] <= before[0] + 2  # the threads that decode files
            assert after[1] <= before[1] + 2
            assert after[2] <= before[2] + 30e6
            # Asked to end it takes requests for half a minute; asked again it ends.
            served.process.send_signal(signal.SIGTERM)
            while client.get("/readyz").status_code == 200:
                pass
            assert client.post("/v1/predict", content=contents[0], headers=RAW).status_code == 200
            served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 128 + signal.SIGTERM


def test_sigterm_loses_no_image_that_was_taken(tmp_path):
    """All of them are taken, those of the last request wait when the signal comes."""
    x, expected = saved(tmp_path, "eenet20", (3, 48, 48), 0.0)
    content = x.numpy().tobytes()
    with Served(tmp_path, "--lame-duck", "0", "--drain", "60") as served:

        async def one(client, asked):
            async with client.stream("POST", "/v1/predict", content=content, headers=RAW) as response:
                lines = []
                async for line in response.aiter_lines():
                    asked.set()
                    lines.append(json.loads(line))
                return lines

        async def ask():
            async with httpx.AsyncClient(base_url=served.url, timeout=100) as client:
                begun = [asyncio.Event() for _ in range(3)]
                tasks = [asyncio.create_task(one(client, event)) for event in begun]
                await asyncio.gather(*(event.wait() for event in begun))
                served.process.send_signal(signal.SIGTERM)
                return await asyncio.gather(*tasks, return_exceptions=True)

        found = asyncio.run(asyncio.wait_for(ask(), 100))
        code = served.process.wait(60)
    assert [sorted(line["index"] for line in lines) for lines in found] == [list(range(31))] * 3
    assert all(line["label"] == int(expected.labels[line["index"]]) for lines in found for line in lines)
    assert code == 0


def test_what_cannot_be_served_is_refused_before_the_port_is_open(small):
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12), normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    said = []
    with pytest.raises(ValueError, match="no profile eco, fast, it has none; `eefast calibrate --profile"):
        run(net, Options(levels=("eco", "fast")), said.append)
    with pytest.raises(ValueError, match="lame_duck=-1"):
        run(net, Options(lame_duck=-1), said.append)
    with pytest.raises(ValueError, match="how pixels are normalised"):
        run(small[0], Options(), said.append)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be listened at: .*; take another --port"):
            run(net, Options(port=port), said.append)
    assert said == []
