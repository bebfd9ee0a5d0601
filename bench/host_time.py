"""Host time of a streamed batch of the resident engine on a GPU whose launches are replaced by nothing, in turns.

Every side is a process of its own on one thread, with eefast as it is in a folder: the kernels' arguments are checked
and the answers' memory is made, but no image is looked at, and CUDA's streams and events are empty objects. What the
driver takes for them and for the kernel, which is counted, is not in it. Rows go to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parents[1]
BATCHES, TURNS = 64, 61
CASES = ((256, "eenet20"), (16, "eenet20"), (2048, "eenet20"))


class Nothing:
    """A stream or event of CUDA; calls: how often the host would have called CUDA."""

    calls = 0

    def __init__(self, *_: Any) -> None:
        Nothing.calls += 1

    def wait_stream(self, *_: Any) -> None:
        Nothing.calls += 3  # an event is made, recorded and waited for

    def wait_event(self, *_: Any) -> None:
        Nothing.calls += 1

    def record_event(self, *_: Any) -> Nothing:
        return Nothing()


def stream_of(model: str, size: int, batches: int) -> Any:
    """A call that streams `batches` batches of `size` images and returns the number of answers."""
    import torch

    import eefast
    from eefast import ops, zoo
    from eefast.engines.streaming import stream_on_cuda

    torch.set_num_threads(1)
    net = zoo.eenet(model, 3, "fine", "pool", input_shape=(3, 1, 1)).eval()
    fast = eefast.accelerate(net, engine="resident", frozen=True)
    engine: Any = fast.engine
    program, answered = engine.program, engine.run
    op = ops.resident_forward.run if program.image is None else ops.resident_int8.run

    def checked_alone(images: Any, *arguments: Any, **more: Any) -> Any:
        Nothing.calls += 2  # a memset and the kernel
        op(images[:0], *arguments, **more)
        n = len(images)
        return torch.empty(n, net.num_classes), torch.empty(n), torch.zeros(n, dtype=torch.int64)

    def streamed(given: Any) -> Any:
        return stream_on_cuda(given, torch.no_grad()(answered), torch.device("cuda"))

    x, home, nowhere = torch.zeros(size, 3, 1, 1), Nothing(), nullcontext()

    # Functions, since those of unittest.mock would take longer than what they replace.
    def here(device: Any) -> Any:
        return home

    def on(side: Any) -> Any:
        return nowhere

    def unrecorded(self: Any, side: Any) -> None:
        return None

    def run() -> int:
        with (
            mock.patch.object(ops.resident_forward, "run", checked_alone),
            mock.patch.object(torch.cuda, "Stream", Nothing),
            mock.patch.object(torch.cuda, "current_stream", here),
            mock.patch.object(torch.cuda, "stream", on),
            mock.patch.object(torch.Tensor, "record_stream", unrecorded, create=True),
            mock.patch.object(engine, "stream", streamed),
            mock.patch.object(eefast.api, "copied", torch.Tensor.clone),
        ):
            return sum(len(result.exit_index) for result in fast.stream(x for _ in range(batches)))

    return run


def answer_turns() -> None:
    """For the other process: turns asked for on standard input, microseconds and calls per batch on standard output."""
    made: dict[tuple[str, int], Any] = {}
    for line in sys.stdin:
        size, model = json.loads(line)
        run = made.get((model, size))
        if run is None:
            run = made[model, size] = stream_of(model, size, BATCHES)
            run()
        Nothing.calls, begin = 0, time.process_time()
        answered = run()
        seconds = time.process_time() - begin
        assert answered == size * BATCHES
        print(json.dumps([1e6 * seconds / BATCHES, Nothing.calls / BATCHES]), flush=True)


class Side:
    """A process with the eefast of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, str(Path(__file__).resolve()), "--turns"]
        variables = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=variables, **pipes)

    def turn(self, case: tuple[int, str]) -> tuple[float, float]:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(case), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process with {self.folder} ended; its error is above")
        microseconds, calls = json.loads(answer)
        return microseconds, calls

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measured(sides: Sequence[Side], case: tuple[int, str], turns: int) -> list[tuple[list[float], float]]:
    """Of each side microseconds per batch, turn by turn, and calls of CUDA."""
    found: list[tuple[list[float], float]] = [([], 0.0) for _ in sides]
    for turn in range(turns):
        order = list(enumerate(sides))
        for i, side in order if turn % 2 else reversed(order):
            microseconds, calls = side.turn(case)
            found[i] = [*found[i][0], microseconds], calls
    return found


def rows(before: Path | None, turns: int) -> Iterator[Any]:
    from rows import HostTimeRow

    folders = [HERE, before or HERE]
    with closing(Side(folders[0])) as now, closing(Side(folders[1])) as then:
        for case in CASES:
            (ours, calls), (base, base_calls) = measured([now, then], case, turns)
            yield HostTimeRow(
                host_time=case[1],
                batch_size=case[0],
                microseconds=typical(ours),
                calls=calls,
                base_microseconds=typical(base),
                base_calls=base_calls,
                ratio=typical(base) / typical(ours),
                turns=turns,
                base="" if before is None else revision(before),
            )


def typical(times: Sequence[float]) -> float:
    """The 20 % quantile: other processes only ever add time."""
    return statistics.quantiles(times, n=5)[0]


def revision(folder: Path) -> str:
    """The commit that is checked out there."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, with its C++ kernels built")
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=TURNS, help=f"of every side, in turns; default {TURNS}")
    arguments = parser.parse_args()
    if arguments.turns:
        answer_turns()
        return 0
    from rows import append, environment

    around = environment("cpu")
    for row in rows(arguments.before, arguments.repeats):
        append([row], around)
        ours = f"{row.microseconds:.1f} µs and {row.calls:.1f} calls of CUDA per batch"
        base = f"{row.base or 'itself'} {row.base_microseconds:.1f} µs and {row.base_calls:.1f}, {row.ratio:.2f}×"
        print(f"{row.host_time}, batch {row.batch_size}: {ours}; {base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
