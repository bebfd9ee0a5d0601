"""Whole networks on the CPU: every peer in a process of its own, answers checked, then rounds A B C … C B A."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peers import KEY_PEERS, PEERS, STAND_INS, Peer
from prepared import (
    FLIP_MARGIN,
    MNIST,
    Checked,
    Network,
    Prepared,
    check,
    mix_of_cost,
    network_on_mnist,
    network_on_noise,
    thresholds,
)
from progress import track
from rows import NetworkRow, append, summary
from torch import Tensor
from worker import PeerError, Setting, Worker, save

from eefast.calibrate import collect, exits_taken
from eefast.cost import macs
from eefast.model import EarlyExitNet
from eefast.result import ExitOutput

ROUNDS = 7
# Every way answers the same images in a turn, again and again until the turn is long enough to be timed.
TURN_IMAGES, TURN_SECONDS = 32, 0.08
# ONNX Runtime's and OpenMP's threads have stopped spinning by then.
PAUSE_SECONDS = 0.06
LEAST_IMAGES = 512
OURS = "eefast"


@dataclass(frozen=True)
class Work:
    """One network at one batch size, at several mean costs; 1: no image leaves early, None: by its own thresholds.

    thorough: with the early-exit peers where no image leaves, too.
    seconds: a guess; with less of the budget left the work is skipped.
    """

    network: Network
    batch_size: int
    costs: tuple[float | None, ...]
    thorough: bool = False
    seconds: float = 20

    def __str__(self) -> str:
        return f"{self.network.name}, batch {self.batch_size}"


def _without_exits(name: str, num_exits: int) -> Network:
    return Network(name, (3, 32, 32), 10, (0.0,) * num_exits + (1.0,))


EENET20, EENET32 = _without_exits("eenet20", 2), _without_exits("eenet32", 3)
EENET56, EENET110 = _without_exits("eenet56", 4), _without_exits("eenet110", 8)
ON_MNIST = Network(MNIST, (1, 28, 28), 10, ())
LARGE = Network("eenet50", (3, 224, 224), 1000, (0.0, 0.0, 0.0, 1.0))
COSTS = (1.0, 0.5, 0.3, 0.2)
OWN = (1.0, None)

ALL_PEERS = (*PEERS, *STAND_INS)

# What matters most comes first within each network, since the budget of seconds may end before the list does.
KEY_COSTS = (1.0, 0.25)
KEY_WORK = (
    *(Work(EENET20, 256, KEY_COSTS, seconds=40), Work(EENET20, 16, KEY_COSTS), Work(EENET20, 1, KEY_COSTS)),
    *(Work(EENET110, 256, KEY_COSTS, seconds=70), Work(EENET110, 16, KEY_COSTS), Work(EENET110, 1, KEY_COSTS)),
    Work(ON_MNIST, 256, OWN, seconds=30),
)
ALL_WORK = (
    *(
        Work(network, batch_size, COSTS, thorough=True)
        for network in (EENET20, EENET110, EENET32, EENET56)
        for batch_size in (256, 16, 1, 1024)
    ),
    *(Work(ON_MNIST, batch_size, OWN, thorough=True) for batch_size in (256, 16, 1, 1024)),
    Work(LARGE, 16, (1.0, 0.5)),
)

Workers = Mapping[str, Worker]


@dataclass(frozen=True)
class Subject:
    """A network with images, and what its exits say about them; its thresholds are its own."""

    net: EarlyExitNet
    images: Tensor
    outputs: list[ExitOutput]


@dataclass(frozen=True)
class Case:
    """A network at one batch size and one mean cost.

    name: "no exits", "cost 0.25" or "own thresholds". mix: share of the images per exit.
    """

    name: str
    cost: float | None
    mix: tuple[float, ...]
    prepared: Prepared
    setting: Setting


@dataclass(frozen=True)
class Way:
    """A peer in a case, its answers found to be right."""

    peer: Peer
    case: Case
    checked: Checked
    setup_seconds: float
    details: str


def run(works: Sequence[Work], around: Mapping[str, Any], seconds: float, peers: Sequence[Peer] = KEY_PEERS) -> None:
    """Measure what fits into so many seconds, network by network; rows go to the file of this machine."""
    begin = time.perf_counter()
    opened: Network | None = None
    with started(peers) as workers:
        for work in track(works, "networks"):
            if time.perf_counter() - begin + work.seconds > seconds:
                append([skipped(work, f"skipped: the budget of {seconds:.0f} s is spent")], dict(around))
                continue
            if work.network != opened:
                most = max(w.batch_size for w in works if w.network == work.network)
                subject, opened = make_subject(work.network, max(most, LEAST_IMAGES)), work.network
                with saved(subject) as folder:
                    open_everywhere(workers, folder)
            append(measure(work, subject, workers, peers), dict(around))


@contextmanager
def started(peers: Sequence[Peer]) -> Iterator[Workers]:
    """One process per family, all starting at the same time."""
    families = groupby(sorted(peers, key=lambda peer: peer.family), key=lambda peer: peer.family)
    workers = {family: Worker(tuple(own), torch.get_num_threads()) for family, own in families}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def make_subject(network: Network, count: int) -> Subject:
    if network.name == MNIST:
        return Subject(*network_on_mnist(count))
    count = count if network is not LARGE else 64
    return Subject(*network_on_noise(network, count, min(count, LEAST_IMAGES), "cpu", torch.float32))


@contextmanager
def saved(subject: Subject) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), subject.net, subject.images)
        yield Path(folder)


def open_everywhere(workers: Workers, folder: Path) -> None:
    for worker in workers.values():
        try:
            worker.open(folder)
        except PeerError:
            continue  # its peers say so when they are asked to answer


def make_case(subject: Subject, batch_size: int, cost: float | None) -> Case:
    """Thresholds for a mean cost over all images; only those that the rounds come to are measured and checked."""
    net, outputs = subject.net, subject.outputs
    if cost is None:
        taken = exits_taken(outputs, net.criterion, net.thresholds)
        shares = (taken.bincount(minlength=net.num_exits + 1) / len(taken)).tolist()
        name, mix, found = "own thresholds", tuple(round(share, 4) for share in shares), net.thresholds.tolist()
    else:
        mix = tuple(round(share, 4) for share in mix_of_cost(net.cost.tolist(), cost))
        name, found = "no exits" if cost >= 1 else f"cost {cost:g}", thresholds(outputs, mix)
    batches = subject.images.split(batch_size)[: ROUNDS * turn_batches(batch_size)]
    seen = sum(map(len, batches))
    at = net.with_criterion(net.criterion.name, found).eval()
    prepared = Prepared(at, batches, [ExitOutput(*(part[:seen] for part in out)) for out in outputs])
    return Case(name, cost, mix, prepared, Setting(tuple(found), batch_size, len(batches)))


def turn_batches(batch_size: int) -> int:
    return max(TURN_IMAGES // batch_size, 1)


def measure(work: Work, subject: Subject, workers: Workers, peers: Sequence[Peer] = PEERS) -> list[NetworkRow]:
    rows, ways = [], []
    for peer, case in _pairs(work, subject, peers):
        try:
            way, note = answered(peer, case, workers[peer.family])
        except PeerError as error:
            way, note = None, str(error)
        if way is None:
            rows.append(NetworkRow(**_shape(work, peer, case), checked=False, note=note))
        else:
            ways.append(way)
    spans, notes = timed(ways, workers)
    rows += [
        NetworkRow(**_shape(work, way.peer, way.case), checked=True, note=note)
        for way, note in zip(ways, notes, strict=True)
        if note
    ]
    medians = {i: statistics.median(s for s, _ in own) for i, own in enumerate(spans) if not notes[i]}
    best = min((i for i in medians if _rivals(ways[i].peer)), key=medians.__getitem__, default=None)
    for i in medians:
        way = ways[i]
        rows.append(
            NetworkRow(
                **_shape(work, way.peer, way.case),
                checked=True,
                **summary(work.batch_size, spans[i], None if best is None else spans[best]),
                best_static=None if best is None else ways[best].peer.name,
                exits=way.checked.exits,
                flips=way.checked.flips,
                flip_margin=FLIP_MARGIN[way.peer.dtype],
                setup_seconds=way.setup_seconds,
                details=way.details,
            )
        )
    return rows


def _rivals(peer: Peer) -> bool:
    """Whether eefast's ratios are against it: in float32, and with the same network."""
    return peer.static and peer.dtype == torch.float32 and peer.stand_in is None


def _pairs(work: Work, subject: Subject, peers: Sequence[Peer]) -> Iterator[tuple[Peer, Case]]:
    """Who is measured in which case; static peers once, where no image leaves."""
    cases = [make_case(subject, work.batch_size, cost) for cost in work.costs]
    without = next((case for case in cases if case.cost == 1), None) or make_case(subject, work.batch_size, 1)
    for peer in (peer for peer in peers if work.batch_size <= peer.largest_batch):
        for case in (without,) if peer.static else cases:
            # Where no image leaves, a peer's static form is the faster one.
            if peer.static or case is not without or work.thorough or peer.name.startswith(OURS):
                yield peer, case


def answered(peer: Peer, case: Case, worker: Worker) -> tuple[Way | None, str]:
    answer = worker.answer(peer, case.setting)
    prepared = case.prepared if peer.stand_in is None else in_its_place(peer.stand_in, case.prepared)
    exits = answer.exits
    if exits is None:
        exits = torch.full((len(answer.logits),), prepared.net.num_exits)
    checked, note = check(prepared, peer.static, answer.logits, exits, peer.dtype)
    if checked is not None and peer.stand_in is not None:
        own, whole = (macs(net.plain(), net.input_shape)[0] for net in (prepared.net, case.prepared.net))
        checked = replace(checked, costs=(own / whole,) * len(checked.costs))
    return (None if checked is None else Way(peer, case, checked, answer.setup_seconds, answer.details)), note


def in_its_place(other: Callable[[EarlyExitNet], EarlyExitNet], prepared: Prepared) -> Prepared:
    """The same images for another network."""
    net = other(prepared.net)
    with torch.no_grad():
        outputs, _ = collect(net, [(x, torch.zeros(len(x))) for x in prepared.batches])
    return Prepared(net, prepared.batches, outputs)


def timed(ways: Sequence[Way], workers: Workers) -> tuple[list[list[tuple[float, float]]], list[str]]:
    """Per way and round: seconds per batch and mean cost; and per way why it could not be timed, or nothing."""
    found: list[list[tuple[float, float]]] = [[] for _ in ways]
    notes = ["" for _ in ways]
    for r in range(ROUNDS):
        order = range(len(ways)) if r % 2 == 0 else reversed(range(len(ways)))
        for i in order:
            way, setting = ways[i], ways[i].case.setting
            count = turn_batches(setting.batch_size)
            turn = [(r * count + j) % setting.batches for j in range(count)]
            time.sleep(PAUSE_SECONDS)
            try:
                seconds = workers[way.peer.family].seconds(way.peer, setting, turn, TURN_SECONDS)
            except PeerError as error:
                notes[i] = str(error)
                continue
            found[i].append((seconds / count, statistics.mean(way.checked.costs[j] for j in turn)))
    return found, notes


def skipped(work: Work, note: str) -> NetworkRow:
    shape: dict[str, Any] = {"network": work.network.name, "batch_size": work.batch_size, "dtype": "float32", "mix": ()}
    return NetworkRow(**shape, provider="all ways", checked=False, note=note)


def _shape(work: Work, peer: Peer, case: Case) -> dict[str, Any]:
    return {
        "network": work.network.name,
        "provider": peer.name,
        "batch_size": work.batch_size,
        "dtype": str(peer.dtype).removeprefix("torch."),
        "mix": case.mix,
        "setting": case.name,
    }
