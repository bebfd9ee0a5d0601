"""A separate process for each family of peers: it prepares them, answers with them and times them on request.

Thread pools that spin for a while after a call slow down whatever runs next; in separate processes, and with a pause
between two turns, each peer has the cores for itself.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from cases import joined
from peak_memory import peak_memory
from peers import Peer, Run
from rows import first_line
from torch import Tensor

import eefast
from eefast.measure.timing import mean_seconds
from eefast.model import EarlyExitNet

IMAGES, WRONG = "images.pt", "WRONG"
# How long a process may take for a network or an answer, start and compilation included, and for a turn; then it hangs.
ANSWER_SECONDS, TURN_SECONDS = 180.0, 60.0

LONG = 8
"""Time of a turn ÷ the least one from which on nothing runs before it to warm up."""


class PeerError(RuntimeError):
    """A peer that could not do what it was told to; the text is for a row's note."""


def note_of(error: Exception) -> str:
    """For a row's note."""
    text = str(error)
    return text if isinstance(error, PeerError) or text.startswith(WRONG) else first_line(error)


class _EndedError(PeerError):
    """The process has ended; `hung`: it was killed, as it did not answer in time."""

    def __init__(self, note: str, hung: bool) -> None:
        super().__init__(note)
        self.hung = hung


@dataclass(frozen=True)
class Setting:
    """How the network of a folder is to be run.

    thresholds: one per early exit. batch_size: images per call; batches: number of calls, on the folder's first images.
    """

    thresholds: tuple[float, ...]
    batch_size: int
    batches: int


@dataclass(frozen=True)
class Answer:
    """What a peer says about all batches of a setting.

    exits: of every image; None from a static one.
    setup_seconds: until the first answer: export, compilation, first call.
    details: versions and settings of the peer.
    peak_memory: bytes that the process held meanwhile, see `peak_memory.peak_memory`.
    """

    logits: Tensor
    exits: Tensor | None
    setup_seconds: float
    details: str
    peak_memory: int | None


def save(folder: Path, net: EarlyExitNet, images: Tensor) -> None:
    """Write what `RuntimeProcess.open` reads."""
    net.save(folder)
    torch.save(images, folder / IMAGES)


class RuntimeProcess:
    """The parent's end of a process, which is restarted after a peer has ended it; every method but `close` may
    raise `PeerError`.

    A peer that ended it is not asked again before the next network, and never again in this run if it hung.
    ends: how often that happened. What was prepared in a process is lost with it.
    """

    def __init__(self, peers: Sequence[Peer], threads: int) -> None:
        self.peers, self.ends = tuple(peers), 0
        self._threads, self._folder = threads, Path()
        self._crashed: dict[str, str] = {}
        self._hung: dict[str, str] = {}
        self._last = ""
        self._start()

    def open(self, folder: Path) -> None:
        """Forget the network before; the peers run that of `folder`, which must stay: a new process reads it again."""
        self._folder = folder
        self._crashed.clear()
        if self._process is None:
            self._start()
        self._ask(ANSWER_SECONDS, "open", str(folder))

    def answer(self, peer: Peer, setting: Setting) -> Answer:
        known = self._hung.get(peer.name) or self._crashed.get(peer.name)
        if known:
            raise PeerError(f"not asked again: {known}")
        if self._process is None:
            self._start()
            self._ask(ANSWER_SECONDS, "open", str(self._folder))
        return self._ask_peer(peer, ANSWER_SECONDS, "answer", setting)  # type: ignore[no-any-return]

    def seconds(
        self, peer: Peer, setting: Setting, turn: Sequence[int], least: float, clock: str = "perf_counter"
    ) -> float:
        """Time of the batches `turn`, the mean of as many passes as take `least` seconds; clock: its name in `time`.

        Only in the process that answered for the peer, where its answers were checked.
        """
        if self._process is None:
            raise PeerError(f"it lost its process to {self._last}")
        limit = TURN_SECONDS + 10 * least
        return self._ask_peer(peer, limit, "seconds", setting, tuple(turn), least, clock)  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._process is None:
            return
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: SpawnProcess | None = context.Process(
            target=_serve, args=(theirs, self.peers, self._threads), daemon=True
        )
        # Libraries read these variables while they are loaded, so the process must start with them.
        variables = dict(self.peers[0].variables)
        before = {name: os.environ.get(name) for name in variables}
        _set(variables)
        self._process.start()
        _set(before)
        theirs.close()

    def _ask_peer(self, peer: Peer, limit: float, what: str, *arguments: Any) -> Any:
        try:
            return self._ask(limit, what, peer.name, *arguments)
        except _EndedError as error:
            (self._hung if error.hung else self._crashed)[peer.name] = str(error)
            self._last = f"{peer.name} ({error})"
            raise

    def _ask(self, limit: float, what: str, *arguments: Any) -> Any:
        process = self._process
        assert process is not None
        try:
            self._connection.send((what, *arguments))
            if not self._connection.poll(limit):
                process.kill()
                self._end(process)
                raise _EndedError(f"no answer within {limit:.0f} s, so its process was killed", hung=True)
            note, value = self._connection.recv()
        except (EOFError, OSError):
            self._end(process)
            raise _EndedError(f"its process has ended, exit code {process.exitcode}", hung=False) from None
        if note:
            raise PeerError(note)
        return value

    def _end(self, process: SpawnProcess) -> None:
        process.join(5)
        self._connection.close()
        self._process = None
        self.ends += 1


def _plan(run: Run) -> list[str]:
    """What an engine of eefast runs; nothing of other ways."""
    plan = getattr(run, "plan", None)
    return (
        [f"{plan.engine} engine", *(f"stage {i}: {stage.note}" for i, stage in enumerate(plan.stages))] if plan else []
    )


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _serve(connection: Connection, peers: Iterable[Peer], threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    server = Server({peer.name: peer for peer in peers})
    while True:
        try:
            what, *arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = "", getattr(server, what)(*arguments)
        except Exception as error:
            reply = note_of(error), None
        connection.send(reply)


@dataclass
class Server:
    """The other end: the network, and the peers that were asked for so far; spent: seconds of their last turns."""

    peers: Mapping[str, Peer]
    net: EarlyExitNet | None = None
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    runs: dict[str, Run] = field(default_factory=dict)
    parts: dict[tuple[int, torch.memory_format], Sequence[Tensor]] = field(default_factory=dict)
    spent: dict[tuple[str, Setting], float] = field(default_factory=dict)

    def open(self, folder: str) -> None:
        # First forget: where the next network cannot be read, no peer may answer with the one before.
        self.net = None
        self.runs.clear()
        self.parts.clear()
        self.spent.clear()
        self.images = torch.load(Path(folder) / IMAGES)
        self.net = eefast.load(folder).eval()

    @torch.no_grad()
    def answer(self, name: str, setting: Setting) -> Answer:
        found, memory = peak_memory(partial(self._answer, self.peers[name], setting), "cpu")
        return replace(found, peak_memory=memory)

    def _answer(self, peer: Peer, setting: Setting) -> Answer:
        begin = time.perf_counter()
        run, batches = self._run(peer, setting.thresholds), self._batches(peer, setting)
        found = [run(batches[0])]
        setup = time.perf_counter() - begin
        found += [run(x) for x in batches[1:]]
        return Answer(*joined(found, peer.static), setup, "; ".join([peer.describe(), *_plan(run)]), None)

    @torch.no_grad()
    def seconds(self, name: str, setting: Setting, turn: Sequence[int], least: float, clock: str) -> float:
        peer = self.peers[name]
        run, batches = self._run(peer, setting.thresholds), self._batches(peer, setting)
        # Cores and caches that rested, or worked for others, warm up first; in a long turn that takes no time.
        if self.spent.get((name, setting), 0.0) < LONG * least:
            mean_seconds(lambda: run(batches[turn[0]]), least / 2)
        spent = mean_seconds(lambda: [run(batches[i]) for i in turn], least, clock=getattr(time, clock))
        self.spent[name, setting] = spent
        return spent

    def _run(self, peer: Peer, thresholds: Sequence[float]) -> Run:
        if self.net is None:
            raise PeerError("its process could not open the network")
        self.net.thresholds.copy_(torch.tensor(thresholds))
        if peer.name not in self.runs:
            if not all(map(find_spec, peer.needs)):
                raise PeerError("not installed: pip install 'eefast[bench]'")
            self.runs[peer.name] = peer.prepare(self.net, *([self.images] if peer.calibrated else []))
        return self.runs[peer.name]

    def _batches(self, peer: Peer, setting: Setting) -> Sequence[Tensor]:
        key = setting.batch_size, peer.memory_format
        if key not in self.parts:
            self.parts[key] = self.images.contiguous(memory_format=peer.memory_format).split(setting.batch_size)
        return self.parts[key][: setting.batches]
