"""The ways of a CPU: families of peers in separate processes, which answer and are timed there."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path

import network_runs
import torch
from cases import Case, make_case, mix_of_cost
from energy import meter
from network_runs import CheckedWay, Device
from peers import Peer, torch_compile_early
from runtime_process import Answer, PeerError, RuntimeProcess, Setting, save
from selection import NO_EXITS, OURS
from subjects import Network, Subject, network_on_noise
from torch import Tensor
from workloads import Workload

from eefast.measure.timing import PAUSE_SECONDS

# Every peer answers the same images in a turn, again and again until the turn is long enough to be timed.
# Of large images fewer are enough: each takes tens of milliseconds.
TURN_IMAGES, TURN_LARGE_IMAGES, TURN_SECONDS = 32, 8, 0.08
LARGE_IMAGE, LARGE_IMAGES = 2**16, 64
LEAST_IMAGES = 512


class CpuWays(Device):
    """peers: to be measured; processes: by the peers' families, see `started`; clock: name in `time` of what times."""

    def __init__(
        self, peers: Sequence[Peer], processes: Mapping[str, RuntimeProcess], clock: str = "perf_counter"
    ) -> None:
        self.peers, self.processes, self.clock = peers, processes, clock
        self._subject: tuple[Network, Subject] | None = None
        self._folders = ExitStack()

    def subject(self, work: Workload, works: Sequence[Workload]) -> Subject:
        if self._subject is None or self._subject[0] != work.network:
            self._subject = None
            most = max(w.batch_size for w in works if w.network == work.network)
            found = make_subject(work.network, max(most, LEAST_IMAGES))
            self.open(found)
            self._subject = work.network, found
        return self._subject[1]

    def open(self, subject: Subject) -> None:
        """In all processes; peers of one that cannot open it say so when they are asked to answer."""
        self._folders.close()
        folder = Path(self._folders.enter_context(tempfile.TemporaryDirectory()))
        save(folder, subject.net, subject.images)
        for process in self.processes.values():
            try:
                process.open(folder)
            except PeerError:
                continue

    def pairs(self, work: Workload, subject: Subject) -> Iterator[tuple[Peer, Case]]:
        return pairs_of(work, subject, self.peers)

    def answer(self, way: Peer, case: Case) -> Answer:
        return self.processes[way.family].answer(way, setting_in(case))

    def losses(self, way: Peer) -> int:
        return self.processes[way.family].ends

    def batches_per_turn(self, ways: Sequence[CheckedWay]) -> int:
        return turn_batches(ways[0].case.batches[0])

    def seconds(self, one: CheckedWay, turn: Sequence[int]) -> tuple[float, float | None]:
        time.sleep(PAUSE_SECONDS)
        timed = self.processes[one.way.family].seconds
        ask = partial(timed, one.way, setting_in(one.case), turn, TURN_SECONDS, self.clock)
        begin = time.perf_counter()
        seconds, joules = meter("cpu").measure(ask)
        each = seconds / len(turn)
        # Meanwhile it has done the same work again and again, to warm up as well as to be timed.
        return each, None if joules is None else joules / (time.perf_counter() - begin) * each

    def close(self) -> None:
        for process in self.processes.values():
            process.close()
        self._folders.close()


def started(peers: Sequence[Peer], clock: str = "perf_counter") -> CpuWays:
    """One process per family, all starting at the same time; to be closed. clock: see `CpuWays`."""
    families = groupby(sorted(peers, key=lambda peer: peer.family), key=lambda peer: peer.family)
    threads = torch.get_num_threads()
    return CpuWays(peers, {name: RuntimeProcess(tuple(part), threads) for name, part in families}, clock)


def make_subject(network: Network, count: int) -> Subject:
    if network.real is not None:
        return network.real(count)
    count = LARGE_IMAGES if math.prod(network.input_shape) > LARGE_IMAGE else count
    return network_on_noise(network, count, min(count, LEAST_IMAGES), "cpu", torch.float32)


def setting_in(case: Case) -> Setting:
    return Setting(tuple(case.net.thresholds.tolist()), len(case.batches[0]), len(case.batches))


def turn_batches(x: Tensor) -> int:
    """x: a batch of the images."""
    return max((TURN_LARGE_IMAGES if x[0].numel() > LARGE_IMAGE else TURN_IMAGES) // len(x), 1)


def case_of(subject: Subject, batch_size: int, cost: float | None, whole_batch: str | None = None) -> Case:
    """Only the images of the rounds are measured; whole_batch: as in `make_case`."""
    mix = () if cost is None else tuple(round(share, 4) for share in mix_of_cost(subject.net.cost.tolist(), cost))
    most = network_runs.ROUNDS * turn_batches(subject.images[:batch_size])
    return make_case(subject, batch_size, cost, most, mix=mix, whole_batch=whole_batch)


def pairs_of(work: Workload, subject: Subject, peers: Sequence[Peer]) -> Iterator[tuple[Peer, Case]]:
    """Which peer is measured in which case; static peers once, where no image exits early."""

    def cases(whole_batch: str | None) -> tuple[list[Case], Case]:
        made = [case_of(subject, work.batch_size, cost, whole_batch) for cost in work.costs]
        without = next((case for case in made if case.setting == NO_EXITS), None)
        return made, without or case_of(subject, work.batch_size, 1, whole_batch)

    usual = cases(None)
    for peer in peers:
        if work.batch_size > peer.largest_batch or (work.deep and peer in torch_compile_early.PEERS):
            continue
        all_cases, without = usual if peer.whole_batch is None else cases(peer.whole_batch)
        for case in (without,) if peer.static else all_cases:
            # Where no image exits early, a peer's static form is the faster one.
            if peer.static or case is not without or work.thorough or peer.name.startswith(OURS):
                yield peer, case
