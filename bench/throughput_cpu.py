"""Whole networks on the CPU: every peer in a process of its own, answers checked, then rounds A B C … C B A."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from energy import meter
from peers import ALL_PEERS, PEERS, Peer, torch_compile_early
from prepared import (
    LARGE,
    MIDDLE,
    ON_MNIST,
    Checked,
    Network,
    Prepared,
    check,
    mix_of_cost,
    network_on_noise,
    thresholds,
)
from progress import track
from rows import NetworkRow, append, first_line, summary
from torch import Tensor
from worker import PeerError, Setting, Worker, save

from eefast import criteria
from eefast.cost import macs
from eefast.measure.comparison import FLIP_MARGIN
from eefast.model import EarlyExitNet
from eefast.result import ExitOutput
from eefast.thresholds.outputs import collect, exits_taken

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

    seconds: a guess with all peers on two cores; with less of the budget left the work is skipped.
    thorough: with the early-exit peers where no image leaves, too.
    deep: without torch.compile's early exits, each of which takes it minutes there.
    """

    network: Network
    batch_size: int
    costs: tuple[float | None, ...]
    seconds: float = 20
    thorough: bool = False
    deep: bool = False

    def __str__(self) -> str:
        return f"{self.network.name}, batch {self.batch_size}{', without compiled early exits' * self.deep}"


def _without_exits(name: str, num_exits: int) -> Network:
    return Network(name, (3, 32, 32), 10, (0.0,) * num_exits + (1.0,))


EENET20, EENET32 = _without_exits("eenet20", 2), _without_exits("eenet32", 3)
EENET56, EENET110 = _without_exits("eenet56", 4), _without_exits("eenet110", 8)
KEY_COSTS, OTHER_COSTS, OWN = (1.0, 0.25), (0.5, 0.3, 0.2), (1.0, None)

# What matters most comes first, since the budget of seconds may end before the list does.
KEY_WORK = (
    *(Work(EENET20, n, KEY_COSTS, seconds) for n, seconds in ((256, 190), (16, 100), (1, 70))),
    Work(ON_MNIST, 256, OWN, 220),
    *(Work(EENET110, n, KEY_COSTS, seconds, deep=True) for n, seconds in ((256, 240), (16, 110), (1, 80))),
)
ALL_WORK = (
    *KEY_WORK,
    *(Work(ON_MNIST, n, OWN, 100) for n in (16, 1)),
    Work(MIDDLE, 16, KEY_COSTS, 250),
    Work(LARGE, 16, (1.0, 0.5), 700),
    Work(EENET110, 256, KEY_COSTS, 600),
    *(Work(EENET20, n, OTHER_COSTS, seconds, True) for n, seconds in ((256, 350), (16, 200), (1, 150))),
    *(Work(EENET32, n, KEY_COSTS, seconds) for n, seconds in ((256, 260), (16, 150), (1, 100))),
    *(Work(EENET56, n, KEY_COSTS, seconds) for n, seconds in ((256, 400), (16, 250), (1, 150))),
    *(Work(EENET110, n, OTHER_COSTS, seconds, True) for n, seconds in ((256, 1000), (16, 600), (1, 400))),
    *(Work(network, 1024, (*KEY_COSTS, *OTHER_COSTS), 800) for network in (EENET20, EENET32, EENET56)),
    *(Work(EENET110, 1024, (*KEY_COSTS, *OTHER_COSTS), 2000), Work(ON_MNIST, 1024, OWN, 300)),
)

Workers = Mapping[str, Worker]


@dataclass(frozen=True)
class Budget:
    """seconds: of the whole run, which end at `deadline` on the clock of `time.perf_counter`."""

    seconds: float = float("inf")
    deadline: float = float("inf")

    @property
    def note(self) -> str:
        return f"skipped: the budget of {self.seconds:.0f} s is spent"

    @property
    def spent(self) -> bool:
        return time.perf_counter() > self.deadline


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
    peak_memory: int | None


def run(works: Sequence[Work], around: Mapping[str, Any], seconds: float, peers: Sequence[Peer] = ALL_PEERS) -> None:
    """Measure what fits into so many seconds, network by network; rows go to the file of this machine.

    What a work takes is its guess × how much longer than guessed those before it took.
    """
    begin, guessed, taken = time.perf_counter(), 0.0, 0.0
    budget = Budget(seconds, begin + seconds)
    opened: Network | None = None
    with started(peers) as workers, ExitStack() as folders:
        for work in track(works, "networks"):
            now = time.perf_counter()
            if now + work.seconds * (taken / guessed if guessed else 1) > budget.deadline:
                append([skipped(work, budget.note)], dict(around))
                continue
            try:
                if work.network != opened:
                    opened = None
                    most = max(w.batch_size for w in works if w.network == work.network)
                    subject = make_subject(work.network, max(most, LEAST_IMAGES))
                    folders.close()
                    open_everywhere(workers, folders.enter_context(saved(subject)))
                    opened = work.network
                rows = measure(work, subject, workers, peers, budget)
            except Exception as error:  # one network that cannot be made is no reason to lose the others
                rows = [skipped(work, first_line(error))]
            append(rows, dict(around))
            guessed, taken = guessed + work.seconds, taken + time.perf_counter() - now


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
    if network.real is not None:
        return Subject(*network.real(count))
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


def make_case(subject: Subject, batch_size: int, cost: float | None, whole_batch: str | None = None) -> Case:
    """Thresholds for a mean cost over all images; only those that the rounds come to are measured and checked.

    whole_batch: as `Peer.whole_batch`; so many images are sure at each exit as would leave there by themselves.
    """
    net, outputs, criterion = subject.net, subject.outputs, subject.net.criterion.name
    if cost is None:
        taken = exits_taken(outputs, net.criterion, net.thresholds)
        shares = (taken.bincount(minlength=net.num_exits + 1) / len(taken)).tolist()
        name, mix = "own thresholds", tuple(round(share, 4) for share in shares)
    else:
        mix = tuple(round(share, 4) for share in mix_of_cost(net.cost.tolist(), cost))
        name = "no exits" if cost >= 1 else f"cost {cost:g}"
    if whole_batch is not None:
        # Whatever is compared with the thresholds takes the place of the learned confidence.
        criterion, outputs = "learned", [_with_confidence(out, _confidence(out, whole_batch)) for out in outputs]
    own = cost is None and whole_batch is None
    found = net.thresholds.tolist() if own else thresholds(outputs, mix, criterion)
    batches = subject.images.split(batch_size)[: ROUNDS * turn_batches(batch_size)]
    seen = sum(map(len, batches))
    outputs = [ExitOutput(*(part[:seen] for part in out)) for out in outputs]
    if whole_batch is not None:
        outputs = [_with_confidence(out, _least(out.confidence, batch_size)) for out in outputs]
    prepared = Prepared(net.with_criterion(criterion, found).eval(), batches, outputs)
    return Case(name, cost, mix, prepared, Setting(tuple(found), batch_size, len(batches)))


def _confidence(out: ExitOutput, criterion: str) -> Tensor:
    return criteria.get(criterion).confidence(out.logits, out.confidence_logit)


def _least(confidence: Tensor, batch_size: int) -> Tensor:
    """Every image as unsure as the least sure one of its batch."""
    return torch.cat([part.min().expand(len(part)) for part in confidence.split(batch_size)])


def _with_confidence(out: ExitOutput, confidence: Tensor) -> ExitOutput:
    return ExitOutput(out.logits, confidence, confidence.logit())


def turn_batches(batch_size: int) -> int:
    return max(TURN_IMAGES // batch_size, 1)


def measure(
    work: Work, subject: Subject, workers: Workers, peers: Sequence[Peer] = PEERS, budget: Budget = Budget()
) -> list[NetworkRow]:
    rows, ways = [], []
    for peer, case, way, note in answers(list(_pairs(work, subject, peers)), workers, budget):
        if way is None:
            rows.append(NetworkRow(**_shape(work, peer, case), checked=False, note=note))
        else:
            ways.append(way)
    spans, notes, joules = timed(ways, workers, budget)
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
                peak_memory=way.peak_memory,
                joules_per_image=statistics.median(joules[i]) / work.batch_size if joules[i] else None,
            )
        )
    return rows


def _rivals(peer: Peer) -> bool:
    """Whether eefast's ratios are against it: in float32, and with the same network."""
    return peer.static and peer.dtype == torch.float32 and peer.stand_in is None


def _pairs(work: Work, subject: Subject, peers: Sequence[Peer]) -> Iterator[tuple[Peer, Case]]:
    """Who is measured in which case; static peers once, where no image leaves."""

    def cases(whole_batch: str | None) -> tuple[list[Case], Case]:
        made = [make_case(subject, work.batch_size, cost, whole_batch) for cost in work.costs]
        without = next((case for case in made if case.cost == 1), None)
        return made, without or make_case(subject, work.batch_size, 1, whole_batch)

    usual = cases(None)
    for peer in peers:
        if work.batch_size > peer.largest_batch or (work.deep and peer in torch_compile_early.PEERS):
            continue
        own, without = usual if peer.whole_batch is None else cases(peer.whole_batch)
        for case in (without,) if peer.static else own:
            # Where no image leaves, a peer's static form is the faster one.
            if peer.static or case is not without or work.thorough or peer.name.startswith(OURS):
                yield peer, case


def answers(
    pairs: Sequence[tuple[Peer, Case]], workers: Workers, budget: Budget
) -> list[tuple[Peer, Case, Way | None, str]]:
    """What all peers answer, each from a process that still runs: who lost it to another peer is asked again."""
    found: dict[int, tuple[Way | None, str]] = {}
    ends: dict[int, int] = {}
    waiting = list(range(len(pairs)))
    while waiting:
        for i in waiting:
            peer, case = pairs[i]
            try:
                found[i] = (None, budget.note) if budget.spent else answered(peer, case, workers[peer.family])
            except Exception as error:  # whatever a peer makes of its answer, the others are asked, too
                found[i] = None, str(error) if isinstance(error, PeerError) else first_line(error)
            ends[i] = workers[peer.family].ends
        waiting = [i for i, (way, _) in found.items() if way and ends[i] < workers[pairs[i][0].family].ends]
    return [(*pairs[i], *found[i]) for i in range(len(pairs))]


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
    found = answer.setup_seconds, answer.details, answer.peak_memory
    return (None if checked is None else Way(peer, case, checked, *found)), note


def in_its_place(other: Callable[[EarlyExitNet], EarlyExitNet], prepared: Prepared) -> Prepared:
    """The same images for another network."""
    net = other(prepared.net)
    with torch.no_grad():
        outputs, _ = collect(net, [(x, torch.zeros(len(x))) for x in prepared.batches])
    return Prepared(net, prepared.batches, outputs)


def timed(
    ways: Sequence[Way], workers: Workers, budget: Budget
) -> tuple[list[list[tuple[float, float]]], list[str], list[list[float]]]:
    """Per way and round seconds per batch and mean cost; per way why it could not be timed, or nothing; per way and
    round joules per batch, where somebody counts them.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in ways]
    joules: list[list[float]] = [[] for _ in ways]
    notes = ["" for _ in ways]
    for r in range(ROUNDS):
        order = range(len(ways)) if r % 2 == 0 else reversed(range(len(ways)))
        for i in order:
            if notes[i] or budget.spent:
                notes[i] = notes[i] or budget.note
                continue
            way, setting = ways[i], ways[i].case.setting
            count = turn_batches(setting.batch_size)
            turn = [(r * count + j) % setting.batches for j in range(count)]
            time.sleep(PAUSE_SECONDS)
            ask, begin = (
                partial(workers[way.peer.family].seconds, way.peer, setting, turn, TURN_SECONDS),
                time.perf_counter(),
            )
            try:
                seconds, taken = meter("cpu").measure(ask)
            except PeerError as error:
                notes[i] = str(error)
                continue
            found[i].append((seconds / count, statistics.mean(way.checked.costs[j] for j in turn)))
            if taken is not None:
                # Meanwhile it has done the same work again and again, to get going as well as to be timed.
                joules[i].append(taken / (time.perf_counter() - begin) * seconds / count)
    return found, notes, joules


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
