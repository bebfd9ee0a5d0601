"""Many streams, calls and plans in one process: right answers, and no memory, thread or file that stays.

`python tests/helpers/soak.py` makes 10,000 streams (read to the end, closed, dropped, dropped in cycles, never begun,
with sources that fail) from three threads, 100,000 calls of changing sizes and 1,000 plans, printing a line for
every fifth.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import eefast
from eefast import ops

ENGINES = ("resident", "compact", "reference")[ops.CPP_MISSING is not None :]
ENDS = ("full", "closed", "dropped", "cycle", "fails", "never begun")
SHAPE = (1, 6, 6)


class Counts:
    """What the process holds: megabytes of memory, threads, files."""

    def __init__(self) -> None:
        gc.collect()
        end = time.monotonic() + 10
        while threading.active_count() > 1 and time.monotonic() < end:
            time.sleep(0.001)
        with open("/proc/self/status") as status:  # noqa: PTH123
            self.megabytes = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
        self.threads, self.files = threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def __str__(self) -> str:
        return f"{self.megabytes:.1f} MB, {self.threads} threads, {self.files} files"


class Network:
    """A small network, its engines, and batches with the answers that the network itself gives."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        normalization = ([0.5], [0.5])
        net = eefast.zoo.eenet("eenet8", num_classes=3, input_shape=SHAPE, filters=2, normalization=normalization)
        self.net = net.eval()
        self.net.thresholds.fill_(0.5)
        self.batches = [torch.randn(n, *SHAPE) for n in (0, 1, 2, 5, 16, 17, 33)]
        self.answers = [self.net(x) for x in self.batches]
        # Installed libraries have threads of their own, which stay.
        self.engines = {
            name: eefast.accelerate(self.net, engine=name, stages="pytorch" if name == "compact" else "auto")
            for name in ENGINES
        }

    def check(self, i: int, got: Any) -> None:
        expected = self.answers[i]
        assert torch.equal(got.exit_index, expected.exit_index), f"batch {i}: other exits"
        assert torch.allclose(got.logits, expected.logits, atol=1e-4), f"batch {i}: other logits"


def one_stream(network: Network, rng: random.Random) -> None:
    numbers = [rng.randrange(len(network.batches)) for _ in range(rng.randint(0, 8))]
    end, at = rng.choice(ENDS), rng.randint(0, len(numbers))
    buffer = torch.empty(33, *SHAPE)

    def source() -> Iterator[Tensor]:
        for k, i in enumerate(numbers):
            if end == "fails" and k == at:
                raise KeyError("mine")
            x = network.batches[i]
            yield buffer[: len(x)].copy_(x)
        if end == "fails" and at == len(numbers):
            raise KeyError("mine")

    results, got = network.engines[rng.choice(ENGINES)].stream(source()), 0
    try:
        for result in () if end == "never begun" else results:
            network.check(numbers[got], result)
            got += 1
            if end in ("closed", "dropped", "cycle") and got > at:
                break
        assert end != "fails", "the error of the source is lost"
    except KeyError:
        assert end == "fails"
        assert got == at, "results before an error are lost"
    if end == "full":
        assert got == len(numbers), "results are lost"
    if end == "closed":
        results.close()
    if end == "cycle":
        cycle: list[Any] = [results]
        cycle.append(cycle)


def streams(network: Network, count: int) -> None:
    """From three threads; any failure is raised."""
    failed: list[BaseException] = []

    def some(seed: int) -> None:
        rng = random.Random(f"{seed}, {count}")
        try:
            for _ in range(seed, count, 3):
                one_stream(network, rng)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=some, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def calls(network: Network, count: int) -> None:
    for k in range(count):
        i = k % len(network.batches)
        network.check(i, network.engines[ENGINES[k % len(ENGINES)]](network.batches[i]))


def plans(network: Network, count: int) -> None:
    """New weights, the same in value: every engine plans again and answers as before."""
    for k in range(count):
        with torch.no_grad():
            next(network.net.parameters()).add_(0)
        name = ENGINES[k % len(ENGINES)]
        before = network.engines[name].plan
        network.check(6, network.engines[name](network.batches[6]))
        assert network.engines[name].plan is not before


def flat(what: str, work: Callable[[Network, int], None], network: Network, count: int, growth: float) -> None:
    """Fails where more than `growth` megabytes are added in the last three fifths, or a thread or file stays.

    Before, oneDNN and the allocator fill caches of a limited size.
    """
    if count == 0:
        return
    begin, marks = time.monotonic(), []
    for _ in range(5):
        work(network, count // 5)
        marks.append(Counts())
        print(f"{what} {len(marks) * (count // 5):>7}: {marks[-1]}", flush=True)
    added = marks[-1].megabytes - marks[1].megabytes
    print(f"{what}: {added:+.1f} MB in the last three fifths, {time.monotonic() - begin:.0f} s", flush=True)
    assert added < growth, f"{what}: memory grew by {added:.1f} MB"
    assert (marks[-1].threads, marks[-1].files) == (1, marks[0].files), f"{what}: threads or files are left"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--plans", type=int, default=1_000)
    parser.add_argument("--growth", type=float, default=10.0, help="megabytes that may be added")
    wanted = parser.parse_args()
    torch.set_num_threads(2)
    network = Network()
    for what, work in (("streams", streams), ("calls", calls), ("plans", plans)):
        flat(what, work, network, getattr(wanted, what), wanted.growth)
    print("done")


if __name__ == "__main__":
    main()
