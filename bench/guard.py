"""Guards the speed: eefast against the masked loop of PyTorch, in turn, and the ratio against its committed one."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from cases import Case, check, joined, make_case
from peers import MASKED, Peer, Run, eefast_engines, memory_kept
from rows import RESULTS, environment
from subjects import ON_MNIST, Network, network_on_noise
from torch import Tensor
from workloads import EENET20

from eefast.measure.environment import inspect_environment
from eefast.measure.timing import PAUSE_SECONDS, in_turns, mean_seconds, run_all

COMMITTED = RESULTS / "guard.json"
SHARE_THAT_MAY_BE_LOST = 0.25
# On shared machines a neighbour can spoil one attempt, hardly three with pauses between them.
ATTEMPTS, THREADS, IMAGES = 3, 2, 256
# Of one attempt at one case; fewer rounds where they take long.
ROUNDS, LEAST_ROUNDS, SECONDS = 7, 3, 2
PAUSE_BETWEEN_ATTEMPTS_SECONDS = 20
# Waiting threads give their core away, since a spinning one makes the ratio depend on what else is running. Page faults
# of the masked loop, whose price a virtual machine's host decides, moved it by half.
VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE", **dict(memory_kept.VARIABLES)}
PEERS = (MASKED, replace(eefast_engines.AUTO, name="eefast"))

Ratios = Mapping[str, float]


@dataclass(frozen=True)
class GuardCase:
    """A network at one batch size; cost: the mean that thresholds are to give, None: the network's own thresholds."""

    network: Network
    batch_size: int
    cost: float | None

    def __str__(self) -> str:
        return f"{self.network.name}, batch {self.batch_size}"


CASES = (GuardCase(EENET20, 256, 0.25), GuardCase(EENET20, 16, 0.25), GuardCase(ON_MNIST, 256, None))


@dataclass(frozen=True)
class Timed:
    """One way to run a case, its answers found to be right, with its images in the layout that it wants."""

    run: Run
    batches: Sequence[Tensor]

    def seconds(self) -> float:
        time.sleep(PAUSE_SECONDS)
        return mean_seconds(partial(run_all, self.run, self.batches))


Pair = tuple[Timed, Timed]


def prepared(case: GuardCase) -> Case:
    real = case.network.real
    subject = real(IMAGES) if real else network_on_noise(case.network, IMAGES, IMAGES, "cpu", torch.float32)
    return make_case(subject, case.batch_size, case.cost)


@torch.no_grad()
def checked(case: GuardCase, peers: Sequence[Peer] = PEERS) -> Pair:
    """The masked loop and eefast, in this order; `RuntimeError` where one of them answers wrongly."""
    ready, found = prepared(case), []
    for peer in peers:
        run = peer.prepare(ready.net)
        batches = [x.contiguous(memory_format=peer.memory_format) for x in ready.batches]
        right, note = check(ready, *joined(map(run, batches), static=False), peer.dtype)
        if right is None:
            raise RuntimeError(f"{case}, {peer.name}: {note}")
        found.append(Timed(run, batches))
    return found[0], found[1]


def ratio(pair: Pair) -> float:
    """Time of the masked loop ÷ time of eefast: median over rounds A B B A, see `in_turns`."""
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < LEAST_ROUNDS or (len(found) < ROUNDS and time.perf_counter() - begin < SECONDS):
        there, back = (in_turns([timed.seconds for timed in pair], number) for number in (0, 1))
        found.append((there[0] + back[0]) / (there[1] + back[1]))
    return statistics.median(found)


def attempts(pairs: Mapping[str, Pair], committed: Ratios) -> Iterator[tuple[int, str, float]]:
    """(attempt, case, ratio); a case that reached what is allowed is not measured again."""
    left = list(pairs)
    for attempt in range(1, ATTEMPTS + 1):
        if left and attempt > 1:
            time.sleep(PAUSE_BETWEEN_ATTEMPTS_SECONDS)
        found = {name: ratio(pairs[name]) for name in left}
        yield from ((attempt, name, value) for name, value in found.items())
        left = [name for name in left if not found[name] >= allowed(committed, name)]


def allowed(committed: Ratios, name: str) -> float:
    return committed.get(name, 0.0) * (1 - SHARE_THAT_MAY_BE_LOST)


def verdict(pairs: Mapping[str, Pair], committed: Ratios, say: Callable[[str], object] = print) -> bool:
    """Whether all cases are as fast as is allowed; a line per case and attempt."""
    last = {}
    for attempt, name, value in attempts(pairs, committed):
        last[name] = value
        known = committed.get(name)
        if known is None:
            say(f"{name}: {value:.2f} × the masked loop; no committed ratio, add one with --write")
        else:
            slow = f"; too slow, attempt {attempt} of {ATTEMPTS}" * (not value >= allowed(committed, name))
            say(f"{name}: now {value:.2f}, committed {known:.2f}, allowed {allowed(committed, name):.2f}{slow}")
    return all(value >= allowed(committed, name) for name, value in last.items())


def read() -> dict[str, Any]:
    """By CPU capability: ratios by case, and the environment that they were measured in."""
    found: dict[str, Any] = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    return found


def write(capability: str, ratios: Ratios) -> None:
    known = {**read(), capability: {"ratios": ratios, "environment": environment("cpu")}}
    COMMITTED.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def main(arguments: Sequence[str] | None = None, cases: Sequence[GuardCase] = CASES) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"measure, and write the ratios to {COMMITTED.name}")
    asked = parser.parse_args(arguments)
    capability = torch.backends.cpu.get_cpu_capability()
    committed = read().get(capability, {})
    known = committed.get("ratios", {})
    if not asked.write and not known:
        print(f"no committed ratios for {capability}: nothing to compare with; measure them with --write")
        return 0
    here = inspect_environment()["processor"]
    if not asked.write and (there := committed.get("environment", {}).get("processor", here)) != here:
        # The same instructions are worth more or less on another maker's processors.
        print(f"the committed ratios for {capability} are of {there}, this is {here}: nothing to compare with")
        return 0
    torch.set_num_threads(THREADS)
    try:
        pairs = {str(case): checked(case) for case in cases}
    except RuntimeError as error:
        print(error)
        return 1
    if asked.write:
        ratios = {name: round(ratio(pair), 2) for name, pair in pairs.items()}
        write(capability, ratios)
        print("\n".join(f"{name}: {value:.2f} × the masked loop" for name, value in ratios.items()))
        return 0
    return 0 if verdict(pairs, known) else 1


if __name__ == "__main__":
    # Libraries look at them while they are loaded.
    if not VARIABLES.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **VARIABLES})
    sys.exit(main())
