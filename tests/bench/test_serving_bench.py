"""bench/serving.py on a small network: what clients see, what is checked, what rows say; a client of HTTP."""

import json
import socket
import threading
import time
from dataclasses import replace

import pytest
import rows
import serving
from http_load import closed_loop, line_times, request

import eefast


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return serving.prepare(tmp_path_factory.mktemp("serving"), "eenet8", 2, 8, 100, 1, 0.2)


def test_a_place_has_thresholds_for_the_cost(place):
    fast = eefast.accelerate(eefast.load(place.folder))
    found = fast(place.images)
    assert found.exit_index.tolist() == place.exits
    assert abs(float(found.cost.mean()) - max(serving.COST, float(place.fast.net.cost[0]))) < 0.1
    assert place.capacity > 0


def test_every_image_is_counted_once_from_its_time(place):
    with serving.Server(place.fast, 10**6) as server:
        seen = serving.offered(server, place.x, [0.0, 0.01, 0.3, *[0.3] * 200])
    serving.check(place, seen)
    assert sorted(i for i, *_ in seen.answers) == list(range(203))
    assert min(seen.waits()) > 0
    assert seen.seconds >= 0.3
    assert len(seen.waits(0)) == sum(at == 0 for _, _, at, _ in seen.answers)


def test_whole_batches_have_the_same_answers_and_are_done_at_their_end(place):
    with serving.WholeBatches(place.fast, 7) as server:
        futures = [server.submit(image) for image in place.x]
    assert [future.result(0).exit for future in futures] == place.exits
    ends = {round(answer.waited + answer.computed, 9) for answer in (future.result(0) for future in futures)}
    assert len(ends) > len(futures) / 7


def test_a_deadline_counts_from_the_time_of_an_image(place):
    """The second one's has passed when it is submitted."""
    found = []

    class Slow(serving.Refusing):
        def submit(self, image, deadline=None):
            found.append(deadline)
            time.sleep(0.02)
            return super().submit(image)

    seen = serving.offered(Slow(), place.x, [0.0, 0.001], 0.01)
    assert found == [max(0.01 - seen.late[0], 1e-9), 1e-9]
    assert seen.late[1] > 0.01


def test_refused_images_are_counted(place):
    with serving.Server(place.fast, 1) as server:
        seen = serving.offered(server, place.x, [0.0] * 500)
    assert seen.refused > 0
    assert seen.refused + len(seen.answers) == 500


def test_wrong_exits_are_no_result(place):
    with serving.Server(place.fast, 10**6) as server:
        seen = serving.offered(server, place.x, [0.0] * 100)
    with pytest.raises(ValueError, match="took another exit"):
        serving.check(replace(place, exits=[7]), seen)
    seen.answers += seen.answers[:3]
    with pytest.raises(ValueError, match="3 were answered twice"):
        serving.check(place, seen)


@pytest.mark.slow
def test_a_run_writes_its_rows_and_shows_them(place, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(serving, "prepare", lambda *_: place)
    assert serving.main(["--only", "first-exits", "full-queue", "deadlines"]) == 0
    (file,) = tmp_path.iterdir()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    names = [
        "median wait, first exit",
        "p99 of all",
        "full queue",
        *(f"in time, 3 × {which} stage" for which in ("median", "mean", "longest")),
    ]
    assert [row["serving"] for row in found] == names
    assert all(row["ours"] >= 0 and row["capacity"] == place.capacity for row in found)
    text = capsys.readouterr().out
    assert all(name in text for name in names)


def test_rows_are_medians_of_rounds(place):
    row = place.row("x", [(1.0, 2.0), (9.0, 3.0), (4.0, 4.0)], unit="ms", base_name="y", bound=0.5, checked=True)
    assert (row.ours, row.base, row.ratio, row.rounds) == (4.0, 3.0, 1.0, 3)


def answers(parts):
    """A server on a free port that sends these bytes for each request of 10 bytes of body; its port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def one(connection):
        with connection:
            while head := connection.recv(65536):
                while not head.endswith(b"0123456789"):
                    head += connection.recv(65536)
                for part in parts:
                    connection.sendall(part)

    def run():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    return listening


def test_a_client_counts_answers_that_come_in_pieces():
    sent = request("/x", b"0123456789", {"A": "b"})
    assert sent.startswith(b"POST /x HTTP/1.1\r\n")
    parts = [b"HTTP/1.1 200 OK\r\ncontent-", b"length: 5\r\n\r\nab", b"cde"]
    with answers(parts) as listening:
        load = closed_loop(listening.getsockname()[1], [sent], 3, 0.2)
    assert len(load.seconds) >= 3
    assert load.failed == 0
    assert load.per_second == len(load.seconds) / load.spent
    with answers([b"HTTP/1.1 429 Too Many\r\nContent-Length: 0\r\n\r\n"]) as listening:
        load = closed_loop(listening.getsockname()[1], [sent], 1, 0.1)
    assert load.failed > 0
    assert not load.seconds
    chunks = [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"2\r\nab\r\n", b"0\r\n\r\n"]
    with answers(chunks) as listening:
        load = closed_loop(listening.getsockname()[1], [sent], 2, 0.1)
    assert len(load.seconds) >= 2
    assert load.failed == 0


def test_lines_have_the_time_of_their_chunk():
    parts = [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"4\r\na\nb\n\r\n", b"2\r\nc\n\r\n0\r\n\r\n"]
    with answers(parts) as listening:
        times = line_times(listening.getsockname()[1], request("/x", b"0123456789", {}))
    assert len(times) == 3
    assert times[0] == times[1] <= times[2]
