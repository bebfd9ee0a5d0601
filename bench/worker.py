"""A process of its own for each family of peers: it prepares them, answers with them and times them when it is told.

Thread pools that spin for a while after a call slow down whoever runs next; apart, and with a pause between two turns,
each peer has the cores for itself.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peers import Peer, Run
from rows import first_line
from torch import Tensor

import eefast
from eefast.model import EarlyExitNet

IMAGES = "images.pt"


class PeerError(RuntimeError):
    """A peer that could not do what it was told to; the text is for a row's note."""


@dataclass(frozen=True)
class Setting:
    """How the network of a folder is to be run.

    thresholds: one per early exit. batch_size, batches: so many batches of so many of the folder's images.
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
    """

    logits: Tensor
    exits: Tensor | None
    setup_seconds: float
    details: str


def save(folder: Path, net: EarlyExitNet, images: Tensor) -> None:
    """Write what `Worker.open` reads."""
    net.save(folder)
    torch.save(images, folder / IMAGES)


class Worker:
    """The parent's end of a process; every method may raise `PeerError`."""

    def __init__(self, peers: Sequence[Peer], threads: int) -> None:
        self.peers = tuple(peers)
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.peers, threads), daemon=True)
        # A process is born with the variables that its libraries look at while they are loaded.
        variables = dict(peers[0].variables)
        before = {name: os.environ.get(name) for name in variables}
        _set(variables)
        self._process.start()
        _set(before)
        theirs.close()

    def open(self, folder: Path) -> None:
        """Forget the network before; the peers run that of `folder`."""
        self._ask("open", str(folder))

    def answer(self, peer: Peer, setting: Setting) -> Answer:
        return self._ask("answer", peer.name, setting)  # type: ignore[no-any-return]

    def seconds(self, peer: Peer, setting: Setting, turn: Sequence[int], least: float) -> float:
        """Time of the batches `turn`, the mean of as many passes as take `least` seconds."""
        return self._ask("seconds", peer.name, setting, tuple(turn), least)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            self._connection.send((what, *arguments))
            note, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise PeerError(f"its process has ended, exit code {self._process.exitcode}") from None
        if note:
            raise PeerError(note)
        return value


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _serve(connection: Connection, peers: Iterable[Peer], threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    own = _Process({peer.name: peer for peer in peers})
    while True:
        try:
            what, *arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = "", getattr(own, what)(*arguments)
        except Exception as error:
            reply = str(error) if isinstance(error, PeerError) else first_line(error), None
        connection.send(reply)


@dataclass
class _Process:
    """The other end: the network, and the peers that were asked for so far."""

    peers: Mapping[str, Peer]
    net: EarlyExitNet | None = None
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    runs: dict[str, Run] = field(default_factory=dict)
    parts: dict[tuple[int, torch.memory_format], Sequence[Tensor]] = field(default_factory=dict)

    def open(self, folder: str) -> None:
        self.net, self.images = eefast.load(folder).eval(), torch.load(Path(folder) / IMAGES)
        self.runs.clear()
        self.parts.clear()

    @torch.no_grad()
    def answer(self, name: str, setting: Setting) -> Answer:
        peer, begin = self.peers[name], time.perf_counter()
        run, batches = self._run(peer, setting.thresholds), self._batches(peer, setting)
        found = [run(batches[0])]
        setup = time.perf_counter() - begin
        found += [run(x) for x in batches[1:]]
        exits = None if peer.static else torch.cat([result.exit_index for result in found])
        logits = torch.cat([(part if peer.static else part.logits).float() for part in found])
        return Answer(logits, exits, setup, peer.describe())

    @torch.no_grad()
    def seconds(self, name: str, setting: Setting, turn: Sequence[int], least: float) -> float:
        peer = self.peers[name]
        run, batches = self._run(peer, setting.thresholds), self._batches(peer, setting)
        # Cores and caches that rested, or worked for others, get going first.
        _seconds(lambda: run(batches[turn[0]]), least / 2)
        return _seconds(lambda: [run(batches[i]) for i in turn], least)

    def _run(self, peer: Peer, thresholds: Sequence[float]) -> Run:
        assert self.net is not None
        self.net.thresholds.copy_(torch.tensor(thresholds))
        if peer.name not in self.runs:
            if not all(map(find_spec, peer.needs)):
                raise PeerError("not installed: pip install 'eefast[bench]'")
            self.runs[peer.name] = peer.prepare(self.net)
        return self.runs[peer.name]

    def _batches(self, peer: Peer, setting: Setting) -> Sequence[Tensor]:
        key = setting.batch_size, peer.memory_format
        if key not in self.parts:
            self.parts[key] = self.images.contiguous(memory_format=peer.memory_format).split(setting.batch_size)
        return self.parts[key][: setting.batches]


def _seconds(call: Callable[[], object], least: float) -> float:
    begin, passes = time.perf_counter(), 0
    while True:
        call()
        passes += 1
        passed = time.perf_counter() - begin
        if passed >= least:
            return passed / passes
