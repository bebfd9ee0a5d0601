"""Whole networks on the CPU → rows: families of peers in separate processes, answers checked, then timed in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from energy import meter
from network_rows import Measured, network_rows
from peers import ALL_PEERS, PEERS, Peer, torch_compile_early
from progress import track
from rows import NetworkRow, Record, append, first_line
from runtime_process import PeerError, RuntimeProcess, Setting, save
from selection import NO_EXITS, OURS, OWN_THRESHOLDS
from subjects import (
    LARGE,
    MIDDLE,
    ON_MNIST,
    Checked,
    Network,
    Prepared,
    Subject,
    check,
    mix_of_cost,
    network_on_noise,
    thresholds,
)
from torch import Tensor

from eefast import criteria
from eefast.cost import macs
from eefast.measure.timing import PAUSE_SECONDS, in_turns
from eefast.model import EarlyExitNet
from eefast.result import ExitOutput
from eefast.thresholds.outputs import collect, exits_taken

ROUNDS = 7
# Every peer answers the same images in a turn, again and again until the turn is long enough to be timed.
TURN_IMAGES, TURN_SECONDS = 32, 0.08
LEAST_IMAGES = 512


@dataclass(frozen=True)
class CpuWork:
    """One network at one batch size, at several mean costs; 1: no image exits early, None: by its own thresholds.

    seconds: a guess with all peers on two cores; with less of the budget left the work is skipped.
    thorough: with the early-exit peers where no image exits early, too.
    deep: without torch.compile's early exits, each of which takes minutes there.
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
    *(CpuWork(EENET20, n, KEY_COSTS, seconds) for n, seconds in ((256, 190), (16, 100), (1, 70))),
    CpuWork(ON_MNIST, 256, OWN, 220),
    *(CpuWork(EENET110, n, KEY_COSTS, seconds, deep=True) for n, seconds in ((256, 240), (16, 110), (1, 80))),
)
ALL_WORK = (
    *KEY_WORK,
    *(CpuWork(ON_MNIST, n, OWN, 100) for n in (16, 1)),
    CpuWork(MIDDLE, 16, KEY_COSTS, 250),
    CpuWork(LARGE, 16, (1.0, 0.5), 700),
    CpuWork(EENET110, 256, KEY_COSTS, 600),
    *(CpuWork(EENET20, n, OTHER_COSTS, seconds, True) for n, seconds in ((256, 350), (16, 200), (1, 150))),
    *(CpuWork(EENET32, n, KEY_COSTS, seconds) for n, seconds in ((256, 260), (16, 150), (1, 100))),
    *(CpuWork(EENET56, n, KEY_COSTS, seconds) for n, seconds in ((256, 400), (16, 250), (1, 150))),
    *(CpuWork(EENET110, n, OTHER_COSTS, seconds, True) for n, seconds in ((256, 1000), (16, 600), (1, 400))),
    *(CpuWork(network, 1024, (*KEY_COSTS, *OTHER_COSTS), 800) for network in (EENET20, EENET32, EENET56)),
    *(CpuWork(EENET110, 1024, (*KEY_COSTS, *OTHER_COSTS), 2000), CpuWork(ON_MNIST, 1024, OWN, 300)),
)

Processes = Mapping[str, RuntimeProcess]


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
class CpuCase:
    """A network at one batch size and one mean cost.

    name: "no exits", "cost 0.25" or "own thresholds". mix: share of the images per exit.
    """

    name: str
    cost: float | None
    mix: tuple[float, ...]
    prepared: Prepared
    setting: Setting


@dataclass(frozen=True)
class CheckedPeer:
    """A peer in a case, its answers found to be right."""

    peer: Peer
    case: CpuCase
    checked: Checked
    setup_seconds: float
    details: str
    peak_memory: int | None


def run(works: Sequence[CpuWork], around: Record, seconds: float, peers: Sequence[Peer] = ALL_PEERS) -> None:
    """Measure what fits into `seconds`, network by network; rows go to the file of this machine.

    A work takes about its guess × how much longer than guessed those before it took.
    """
    begin, guessed, taken = time.perf_counter(), 0.0, 0.0
    budget = Budget(seconds, begin + seconds)
    opened: Network | None = None
    with started(peers) as processes, ExitStack() as folders:
        for work in track(works, "networks"):
            now = time.perf_counter()
            if now + work.seconds * (taken / guessed if guessed else 1) > budget.deadline:
                append([skipped(work, budget.note)], around)
                continue
            try:
                if work.network != opened:
                    opened = None
                    most = max(w.batch_size for w in works if w.network == work.network)
                    subject = make_subject(work.network, max(most, LEAST_IMAGES))
                    folders.close()
                    open_everywhere(processes, folders.enter_context(saved(subject)))
                    opened = work.network
                rows = measure(work, subject, processes, peers, budget)
            except Exception as error:  # one network that cannot be made is no reason to lose the others
                rows = [skipped(work, first_line(error))]
            append(rows, around)
            guessed, taken = guessed + work.seconds, taken + time.perf_counter() - now


@contextmanager
def started(peers: Sequence[Peer]) -> Iterator[Processes]:
    """One process per family, all starting at the same time."""
    families = groupby(sorted(peers, key=lambda peer: peer.family), key=lambda peer: peer.family)
    processes = {family: RuntimeProcess(tuple(members), torch.get_num_threads()) for family, members in families}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.close()


def make_subject(network: Network, count: int) -> Subject:
    if network.real is not None:
        return network.real(count)
    count = count if network is not LARGE else 64
    return network_on_noise(network, count, min(count, LEAST_IMAGES), "cpu", torch.float32)


@contextmanager
def saved(subject: Subject) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), subject.net, subject.images)
        yield Path(folder)


def open_everywhere(processes: Processes, folder: Path) -> None:
    for process in processes.values():
        try:
            process.open(folder)
        except PeerError:
            continue  # its peers say so when they are asked to answer


def make_case(subject: Subject, batch_size: int, cost: float | None, whole_batch: str | None = None) -> CpuCase:
    """Thresholds for a mean cost over all images; only the images used in the rounds are measured and checked.

    whole_batch: as `Peer.whole_batch`; at each exit as many images are sure as would exit there one by one.
    """
    net, outputs, criterion = subject.net, subject.outputs, subject.net.criterion.name
    if cost is None:
        taken = exits_taken(outputs, net.criterion, net.thresholds)
        shares = (taken.bincount(minlength=net.num_exits + 1) / len(taken)).tolist()
        name, mix = OWN_THRESHOLDS, tuple(round(share, 4) for share in shares)
    else:
        mix = tuple(round(share, 4) for share in mix_of_cost(net.cost.tolist(), cost))
        name = NO_EXITS if cost >= 1 else f"cost {cost:g}"
    if whole_batch is not None:
        # What is compared with the thresholds takes the place of the learned confidence.
        criterion, outputs = "learned", [_with_confidence(out, _confidence(out, whole_batch)) for out in outputs]
    unchanged = cost is None and whole_batch is None
    found = net.thresholds.tolist() if unchanged else thresholds(outputs, mix, criterion)
    batches = subject.images.split(batch_size)[: ROUNDS * turn_batches(batch_size)]
    seen = sum(map(len, batches))
    outputs = [ExitOutput(*(part[:seen] for part in out)) for out in outputs]
    if whole_batch is not None:
        outputs = [_with_confidence(out, _least(out.confidence, batch_size)) for out in outputs]
    prepared = Prepared(net.with_criterion(criterion, found).eval(), batches, outputs)
    return CpuCase(name, cost, mix, prepared, Setting(tuple(found), batch_size, len(batches)))


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
    work: CpuWork, subject: Subject, processes: Processes, peers: Sequence[Peer] = PEERS, budget: Budget = Budget()
) -> list[NetworkRow]:
    rows, right = [], []
    for peer, case, checked, note in answers(list(pairs_of(work, subject, peers)), processes, budget):
        if checked is None:
            rows.append(NetworkRow(**_shape(work, peer, case), checked=False, note=note))
        else:
            right.append(checked)
    timings = timed(right, processes, budget)
    rows += [
        NetworkRow(**_shape(work, one.peer, one.case), checked=True, note=timing.note)
        for one, timing in zip(right, timings, strict=True)
        if timing.note
    ]
    finished = [(one, timing) for one, timing in zip(right, timings, strict=True) if not timing.note]
    measured = [
        Measured(
            _shape(work, one.peer, one.case), one.checked, timing.spans, one.peer.dtype, _is_yardstick(one.peer),
            {
                "setup_seconds": one.setup_seconds,
                "details": one.details,
                "peak_memory": one.peak_memory,
                "joules_per_image": statistics.median(timing.joules) / work.batch_size if timing.joules else None,
            },
        )
        for one, timing in finished
    ]  # fmt: skip
    return rows + network_rows(measured)


def _is_yardstick(peer: Peer) -> bool:
    """Whether ratios may be against it: without exits, in float32, and with the same network."""
    return peer.static and peer.dtype == torch.float32 and peer.stand_in is None


def pairs_of(work: CpuWork, subject: Subject, peers: Sequence[Peer]) -> Iterator[tuple[Peer, CpuCase]]:
    """Which peer is measured in which case; static peers once, where no image exits early."""

    def cases(whole_batch: str | None) -> tuple[list[CpuCase], CpuCase]:
        made = [make_case(subject, work.batch_size, cost, whole_batch) for cost in work.costs]
        without = next((case for case in made if case.cost == 1), None)
        return made, without or make_case(subject, work.batch_size, 1, whole_batch)

    usual = cases(None)
    for peer in peers:
        if work.batch_size > peer.largest_batch or (work.deep and peer in torch_compile_early.PEERS):
            continue
        all_cases, without = usual if peer.whole_batch is None else cases(peer.whole_batch)
        for case in (without,) if peer.static else all_cases:
            # Where no image exits early, a peer's static form is the faster one.
            if peer.static or case is not without or work.thorough or peer.name.startswith(OURS):
                yield peer, case


def answers(
    pairs: Sequence[tuple[Peer, CpuCase]], processes: Processes, budget: Budget
) -> list[tuple[Peer, CpuCase, CheckedPeer | None, str]]:
    """What all peers answer, each from a process that still runs: a peer that lost it to another is asked again."""
    found: dict[int, tuple[CheckedPeer | None, str]] = {}
    ends: dict[int, int] = {}
    waiting = list(range(len(pairs)))
    while waiting:
        for i in waiting:
            peer, case = pairs[i]
            try:
                found[i] = (None, budget.note) if budget.spent else answered(peer, case, processes[peer.family])
            except Exception as error:  # whatever a peer makes of its answer, the others are asked, too
                found[i] = None, str(error) if isinstance(error, PeerError) else first_line(error)
            ends[i] = processes[peer.family].ends
        waiting = [i for i, (way, _) in found.items() if way and ends[i] < processes[pairs[i][0].family].ends]
    return [(*pairs[i], *found[i]) for i in range(len(pairs))]


def answered(peer: Peer, case: CpuCase, process: RuntimeProcess) -> tuple[CheckedPeer | None, str]:
    answer = process.answer(peer, case.setting)
    prepared = case.prepared if peer.stand_in is None else in_its_place(peer.stand_in, case.prepared)
    exits = answer.exits
    if exits is None:
        exits = torch.full((len(answer.logits),), prepared.net.num_exits)
    checked, note = check(prepared, peer.static, answer.logits, exits, peer.dtype)
    if checked is not None and peer.stand_in is not None:
        stand_in, whole = (macs(net.plain(), net.input_shape)[0] for net in (prepared.net, case.prepared.net))
        checked = replace(checked, costs=(stand_in / whole,) * len(checked.costs))
    found = answer.setup_seconds, answer.details, answer.peak_memory
    return (None if checked is None else CheckedPeer(peer, case, checked, *found)), note


def in_its_place(other: Callable[[EarlyExitNet], EarlyExitNet], prepared: Prepared) -> Prepared:
    """The same images for another network."""
    net = other(prepared.net)
    with torch.no_grad():
        outputs, _ = collect(net, [(x, torch.zeros(len(x))) for x in prepared.batches])
    return Prepared(net, prepared.batches, outputs)


@dataclass
class Timing:
    """spans: seconds per batch and mean cost, round by round; joules: per batch, where they are counted.

    note: why it could not be timed, "" where it was.
    """

    spans: list[tuple[float, float]] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    note: str = ""


def timed(right: Sequence[CheckedPeer], processes: Processes, budget: Budget) -> list[Timing]:
    found = [Timing() for _ in right]

    def turn(one: CheckedPeer, timing: Timing, number: int) -> None:
        if timing.note or budget.spent:
            timing.note = timing.note or budget.note
            return
        setting = one.case.setting
        count = turn_batches(setting.batch_size)
        batches = [(number * count + j) % setting.batches for j in range(count)]
        time.sleep(PAUSE_SECONDS)
        ask = partial(processes[one.peer.family].seconds, one.peer, setting, batches, TURN_SECONDS)
        begin = time.perf_counter()
        try:
            seconds, taken = meter("cpu").measure(ask)
        except PeerError as error:
            timing.note = str(error)
            return
        timing.spans.append((seconds / count, statistics.mean(one.checked.costs[j] for j in batches)))
        if taken is not None:
            # Meanwhile it has done the same work again and again, to warm up as well as to be timed.
            timing.joules.append(taken / (time.perf_counter() - begin) * seconds / count)

    for number in range(ROUNDS):
        in_turns([partial(turn, *pair, number) for pair in zip(right, found, strict=True)], number)
    return found


def skipped(work: CpuWork, note: str) -> NetworkRow:
    shape: dict[str, Any] = {"network": work.network.name, "batch_size": work.batch_size, "dtype": "float32", "mix": ()}
    return NetworkRow(**shape, provider="all ways", checked=False, note=note)


def _shape(work: CpuWork, peer: Peer, case: CpuCase) -> dict[str, Any]:
    return {
        "network": work.network.name,
        "provider": peer.name,
        "batch_size": work.batch_size,
        "dtype": str(peer.dtype).removeprefix("torch."),
        "mix": case.mix,
        "setting": case.name,
    }
