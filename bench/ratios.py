"""Runs that stop, networks on rows, the search for exits: each timed beside what it is compared with, as rows.

In one thread, by the time of the process, in turns; every answer is checked first. A minute each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from cases import mix_of_cost, thresholds
from progress import track
from rows import RatioRow, append, environment
from torch import Tensor

import eefast
from eefast import zoo
from eefast.data.sensors import CHANNELS, CLASSES, sensor_windows
from eefast.measure import baselines
from eefast.measure.tables import aligned
from eefast.measure.timing import in_turns
from eefast.model import EarlyExitNet
from eefast.search.supernet import of_network
from eefast.thresholds.outputs import collect
from eefast.train.losses import parse

N = 256
SHARES = 0.53, 0.15, 0.32
"""Of images per exit: 120 survive exit 0, 82 exit 1."""
ROWS_COST, ROWS_BOUND = 0.25, 1.5
STEPS_BATCH = 128

Call = Callable[[], object]
Way = Callable[[Tensor], object]


def measured(calls: Sequence[Call], rounds: int) -> list[tuple[float, ...]]:
    """Process seconds of every call in every round."""

    def timed(call: Call) -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin

    for call in calls:
        call()
    return [tuple(in_turns([lambda c=call: timed(c) for call in calls], i)) for i in range(rounds)]  # type: ignore[misc]


def chosen(net: EarlyExitNet, x: Tensor, mix: Sequence[float]) -> EarlyExitNet:
    """With the thresholds for these shares of images per exit."""
    outputs = collect(net, [(x, torch.zeros(len(x)))])[0]
    net.thresholds.copy_(torch.tensor(thresholds(outputs, mix)))
    return net


def partial(rounds: int, compiled: bool) -> Iterator[RatioRow]:
    """`until` and `resume` beside the whole run, in the resident engine."""
    for shape in ((1, 28, 28), (3, 32, 32)):
        torch.manual_seed(0)
        net, x = zoo.eenet("eenet20", 2, input_shape=shape).eval(), torch.rand(N, *shape)
        fast = eefast.accelerate(chosen(net, x, SHARES), engine="resident", frozen=True)
        for exit_index in range(2):
            until = fast.until(exit_index)

            def both(fast: eefast.Accelerated = fast, until: Callable = until, x: Tensor = x) -> eefast.ExitResult:
                stopped = until(x)
                return stopped.finished(fast.resume(stopped.survivors))

            whole = fast(x)
            checked = all(torch.equal(a, b) for a, b in zip(both(), whole, strict=True))
            times = measured([both, lambda fast=fast, x=x: fast(x)], rounds)  # type: ignore[misc]
            yield RatioRow(
                f"until + resume, exit {exit_index}", f"eenet20, {shape[1]}×{shape[2]}", N, "ms",
                *medians(times, 1e3), "whole run", median_ratio(times), 1.05, True, rounds, checked,
                f"{len(until(x).survivors)} images survive",
            )  # fmt: skip


def rows(rounds: int, compiled: bool) -> Iterator[RatioRow]:
    """A network on rows beside the best runtime without exits, in float32 and in INT8: the realised ratio."""
    for name in ("eenet20-1d", "eenet32-1d"):
        torch.manual_seed(0)
        net, x = zoo.eenet(name, 2, num_classes=CLASSES, input_shape=(CHANNELS, 128)).eval(), sensor_windows(N)[0]
        mix = mix_of_cost(net.cost.tolist(), ROWS_COST)
        yield realised(f"{name}, 6×128", chosen(net, x, mix), x, made(statics_of(net, compiled)), rounds)
        some = x[:64]
        if in_int8 := made(statics_in_int8(net, some)):
            quantized = chosen(eefast.quantize(net, some), x, mix)
            yield realised(f"{name}, 6×128, INT8", quantized, x, in_int8, rounds, 0.3)


def statics_of(net: EarlyExitNet, compiled: bool) -> dict[str, Callable[[], Way]]:
    found: dict[str, Callable[[], Way]] = {
        "PyTorch": lambda: baselines.eager(net),
        "ONNX Runtime": lambda: baselines.onnx_runtime(net),
        "OpenVINO": lambda: baselines.openvino(net),
    }
    return {**found, "torch.compile": lambda: baselines.compiled(baselines.plain(net))} if compiled else found


def statics_in_int8(net: EarlyExitNet, x: Tensor) -> dict[str, Callable[[], Way]]:
    return {
        "ONNX Runtime INT8": lambda: baselines.onnx_runtime_int8(net, x),
        "OpenVINO INT8": lambda: baselines.openvino_int8(net, x),
    }


def made(ways: dict[str, Callable[[], Way]]) -> dict[str, Way]:
    """Those that can run here; the others are named on stderr."""
    found: dict[str, Way] = {}
    for name, make in ways.items():
        try:
            found[name] = make()
        except (ImportError, RuntimeError) as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
    return found


def realised(
    model: str, net: EarlyExitNet, x: Tensor, statics: dict[str, Way], rounds: int, margin: float = 1e-3
) -> RatioRow:
    """statics: without exits; margin: of their logits, in standard deviations."""
    fast = eefast.accelerate(net, frozen=True)
    wanted, found = net(x), fast(x)
    with torch.no_grad():
        last = net.all_exits(x)[-1].logits
    checked = torch.equal(found.exit_index, wanted.exit_index) and all(
        torch.allclose(torch.as_tensor(run(x)), last, rtol=1e-3, atol=margin * float(last.std()))
        for run in statics.values()
    )
    calls: list[Call] = [lambda: fast(x), *(lambda run=run: run(x) for run in statics.values())]  # type: ignore[misc]
    times = measured(calls, rounds)
    cost = float(found.cost.mean())
    middle = [statistics.median(column) for column in zip(*times, strict=True)]
    best = min(range(1, len(middle)), key=middle.__getitem__)
    ratio = statistics.median(cost * each[best] / each[0] for each in times)
    each = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in zip(statics, middle[1:], strict=True))
    return RatioRow(
        "realised ratio on rows", model, N, "ms", middle[0] * 1e3, middle[best] * 1e3, [*statics][best - 1], ratio,
        ROWS_BOUND, False, rounds, checked, f"mean cost {cost:.3f}, {fast.plan.engine} engine; {each}",
    )  # fmt: skip


def search(rounds: int, compiled: bool) -> Iterator[RatioRow]:
    """A training step of all heads that a search tries at 8 places beside one of a network with three exits."""
    shape = (1, 28, 28)
    torch.manual_seed(0)
    net = zoo.eenet("eenet32", 3, input_shape=shape)
    x, labels = torch.randn(STEPS_BATCH, *shape), torch.randint(10, (STEPS_BATCH,))
    alone = step_of(net, x, labels, frozen=False)
    for frozen in (True, False):
        supernet = of_network(zoo.eenet("eenet32", 3, input_shape=shape), ("pool", "conv1"), None, 8)
        times = measured([step_of(supernet.net, x, labels, frozen), alone], rounds)
        places = len(set(supernet.places))
        yield RatioRow(
            "step of a search", f"eenet32, 28×28, {'heads only' if frozen else 'all weights'}", STEPS_BATCH, "ms",
            *medians(times, 1e3), "step of one early-exit training", median_ratio(times), 2.0, True, rounds,
            places == 8, f"{places} places, {len(supernet.kinds)} heads",
        )  # fmt: skip


def step_of(net: EarlyExitNet, x: Tensor, labels: Tensor, frozen: bool) -> Call:
    """One step of training as `EarlyExitModule` takes it, without Lightning."""
    from eefast.train.module import EarlyExitModule

    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module = EarlyExitModule(net, parse("deep_supervision"), frozen=frozen)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    images = x.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        loss = module.loss(net.all_exits(images), labels, net.cost, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def medians(times: Sequence[tuple[float, ...]], unit: float) -> tuple[float, float]:
    ours, base = zip(*times, strict=True)
    return statistics.median(ours) * unit, statistics.median(base) * unit


def median_ratio(times: Sequence[tuple[float, ...]]) -> float:
    return statistics.median(ours / base for ours, base in times)


MEASUREMENTS: dict[str, Callable[[int, bool], Iterator[RatioRow]]] = {
    "partial": partial, "rows": rows, "search": search,
}  # fmt: skip


def reached(row: RatioRow) -> bool:
    return row.ratio <= row.bound if row.at_most else row.ratio >= row.bound


def show(found: Sequence[RatioRow]) -> str:
    titles = ["", "network", "N", "eefast", "beside", "", "ratio", "bound", "", "details"]
    lines = []
    for row in found:
        figures = [f"{row.ours:.1f} {row.unit}", f"{row.base:.1f}", row.base_name, f"{row.ratio:.3f}"]
        state = "" if reached(row) else "MISSED"
        bound = f"{'≤' if row.at_most else '≥'} {row.bound:g}"
        state += "" if row.checked else " WRONG"
        lines.append([row.compared, row.model, str(row.batch_size), *figures, bound, state, row.details])
    return "\n".join(aligned(titles, lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--rounds", type=int, default=40, help="default %(default)s; a quarter of it for the search")
    parser.add_argument("--compile", action="store_true", help="torch.compile on rows, too: minutes")
    asked = parser.parse_args(arguments)
    if asked.rounds < 4:
        parser.error(f"--rounds {asked.rounds}: at least 4")
    torch.set_num_threads(1)
    around, found = environment("cpu"), list[RatioRow]()
    for name in track(asked.only, "measuring"):
        for row in MEASUREMENTS[name](asked.rounds // 4 if name == "search" else asked.rounds, asked.compile):
            found.append(row)
            append([row], around)
    print(show(found))
    return int(not all(row.checked for row in found))


if __name__ == "__main__":
    sys.exit(main())
